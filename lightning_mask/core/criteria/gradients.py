"""Criteria from the gradients of the training loss, taken batch by batch at the weights as they are.

Below, ``g_b`` is the gradient of the mean loss of batch b, B the number of batches of all ranks, and ``g`` the mean of all
``g_b``. What a rank sums is in float32, one or two tensors for each in scope. A criterion that is a mean over batches of
something is averaged over ranks as a score; the others reduce ``g`` itself over ranks before they go on from it. Ranks
count alike, whatever the number of their batches.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_mask.core.criteria.context import Context, Loss
from lightning_mask.core.criteria.registry import Scores, criterion, not_of_shards
from lightning_mask.core.distributed import mean_over_ranks
from lightning_mask.core.sharding import is_sharded, whole


def _zeros(params: Mapping[str, Tensor]) -> Scores:
    return {name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for name, p in params.items()}


def _mean(
    params: Mapping[str, Tensor],
    context: Context,
    of: Callable[[Tensor], Tensor],
    loss: Loss | None = None,
    split: bool = False,
) -> Scores:
    """The mean over this rank's batches, or their single examples, of ``of(g_b)``."""
    total, count = _zeros(params), 0
    for grads in context.gradients(params, loss, split=split):
        count += 1
        for name, g in grads.items():
            total[name] += of(g.float())
    return {name: value.div_(count) for name, value in total.items()}


def _mean_gradient(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``g``, equal on all ranks: the mean over the batches of all of them."""
    return {name: _over_ranks(value) for name, value in _mean(params, context, lambda g: g).items()}


def _over_ranks(value: Tensor) -> Tensor:
    """The mean over ranks; gradients of sharded parameters are that already."""
    return value if is_sharded(value) else mean_over_ranks(value)


@criterion("gradient")
def gradient(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``sum over batches of |g_b|``.

    Source: Song et al., "Sparse is Enough in Fine-tuning Pre-trained Large Language Models" (SIFT, 2023), on batches. With
    allocation=row it is the choice of Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning" (GPS,
    2023): of each output unit, the inputs with the largest gradients.
    """
    total = _zeros(params)
    for grads in context.gradients(params):
        for name, g in grads.items():
            total[name] += g.abs()
    return total


@criterion("fisher")
def fisher(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of g_b^2``: the empirical Fisher information with squared *batch* gradients.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-D, 2021), equation (6), as its code takes it. The
    squares of single examples are :func:`fisher_per_example`.
    """
    return _mean(params, context, torch.square)


criterion("child_tuning_d")(fisher)


@criterion(
    "fisher_per_example",
    check=not_of_shards(
        "fisher_per_example needs gradients of single examples, and those of sharded parameters are means over ranks; take "
        "score=fisher or fisher_sampled."
    ),
)
def fisher_per_example(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/N * sum over examples of g_i^2``: the empirical Fisher information, of the N examples of all batches.

    A backward pass for each example. A batch is split along dimension 0 of its tensors
    (:func:`lightning_mask.core.criteria.examples.examples`).

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH, 2021), the Fisher information with the labels
    of the data.

    Raises:
        ValueError: If a batch cannot be split, or parameters are sharded.
    """
    return _mean(params, context, torch.square, split=True)


@criterion("fisher_sampled")
def fisher_sampled(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of g_b^2`` for labels drawn from the model's own predictions: the true Fisher information.

    With such labels the gradients of single examples have mean zero and are independent, so a squared batch gradient
    estimates the mean squared gradient of single examples without bias, up to the factor of the batch's size: no batch
    needs to be split. The module defines ``mask_sampled_loss(batch)``: draw the labels, return the mean loss against them.

    Source: Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH, 2021), the definition of the Fisher
    information with its expectation over labels; the batch estimate is that of Liu et al., "Sophia" (2023), algorithm 2.

    Raises:
        ValueError: If the module has no ``mask_sampled_loss``.
    """
    return _mean(params, context, torch.square, context.sampled_loss)


@criterion("snip")
def snip(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|g * w|``: by how much the loss would change for a small change of a factor on the entry.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity" (2019), equations (4) and (5),
    without the norm, which ranks alike. Signs of several batches may cancel, as on one large batch; ``g`` is reduced first.
    """
    mean = _mean_gradient(params, context)
    return {name: value.mul_(params[name].detach()).abs_() for name, value in mean.items()}


@criterion("taylor")
def taylor(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of (g_b * w)^2``: the squared change of the loss, to first order, if the entry were zero.

    Half of it is also the saliency ``w^2 * F / 2`` of optimal brain damage with the Fisher information F in place of the
    Hessian's diagonal, so it ranks as that does.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning" (2019), equation (8), averaged over batches;
    LeCun et al., "Optimal Brain Damage" (1989).
    """
    mean = _mean(params, context, torch.square)
    return {name: value.mul_(params[name].detach().float().square()) for name, value in mean.items()}


@criterion("movement")
def movement(params: Mapping[str, Tensor], context: Context) -> Scores:
    """The sum of ``-g * w`` over the optimizer steps so far: high where training has moved the entry away from zero.

    Before the first step, and without a training that keeps the sum, it is the mean over batches at the weights as they are.
    PruneMask, a later phase and ``refresh`` have the sum, of what was in scope and trained.

    Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), equation (3).
    """
    if context.movement is not None and all(name in context.movement for name in params):
        return {name: context.movement[name] for name in params}
    mean = _mean(params, context, torch.neg)
    return {name: value.mul_(params[name].detach()) for name, value in mean.items()}


@criterion("relative_gradient")
def relative_gradient(params: Mapping[str, Tensor], context: Context) -> Scores:
    """One number a tensor, ``1/B * sum over batches of ||g_b|| / ||w||``: for structure=tensor.

    A tensor of zeros that has a gradient gets infinity: first.

    Source: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (2022), the relative gradient norm
    of Auto-RGN, averaged over batches as its code does.
    """
    total = {name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in params.items()}
    count = 0
    for grads in context.gradients(params):
        count += 1
        for name, g in grads.items():
            total[name] += _norm(g)
    # 0 / 0 is 0 here: such a tensor cannot move. Above 0 it is infinite.
    ratios = {name: torch.where(value > 0, value / count / _norm(params[name]), value) for name, value in total.items()}
    return {name: ratio.expand(params[name].shape) for name, ratio in ratios.items()}


def _norm(tensor: Tensor) -> Tensor:
    return whole(torch.linalg.vector_norm(tensor.detach().float()))


@criterion("grad_variance")
def grad_variance(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of (g_b - g)^2``: high where batches disagree about the entry.

    Fisher information without the squared mean. Each rank sums the squares about its own mean as it goes (Welford), and
    the ranks' means are joined afterwards (Chan et al. 1983), so nothing cancels; of sharded parameters every ``g_b`` is the
    mean over ranks. One batch alone has no variance: all are 0.

    Source: the local gradient variance of Mahsereci et al., "Early Stopping without a Validation Set" (2017), section 2, over
    batches.
    """
    mean, spread, count = _zeros(params), _zeros(params), 0
    for grads in context.gradients(params):
        count += 1
        for name, g in grads.items():
            off = g.float() - mean[name]
            mean[name] += off / count
            spread[name] += off.mul_(g - mean[name])
    for name, value in spread.items():
        value.div_(count).add_((mean[name] - _over_ranks(mean[name])).square_())
        del mean[name]
    return spread


@criterion(
    "grasp",
    check=not_of_shards("grasp needs gradients of gradients, which sharded parameters do not give; take score=snip."),
)
def grasp(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``w * (H g)``: what pruning keeps so that the gradient's norm, and with it training, does not fall; H is the Hessian.

    Two passes over the batches: ``g`` first, reduced over ranks, then the product with each batch's Hessian, by a second
    backward pass through the first one's graph (which takes about twice the memory of a training step).

    Source: Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow" (GraSP, 2020), equation (8):
    the highest of ``-w * (H g)`` are pruned. Without the temperature that its code divides logits by.

    Raises:
        ValueError: If parameters are sharded.
    """
    mean = _mean_gradient(params, context)
    total, count = _zeros(params), 0
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels cannot be differentiated twice
        for product in context.hessian_products(params, mean):
            count += 1
            for name, value in product.items():
                total[name] += value
    return {name: value.div_(count).mul_(params[name].detach()) for name, value in total.items()}
