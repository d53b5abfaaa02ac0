"""Criteria from the weights alone."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion
from lightning_mask.core.criteria.seeds import named_seed
from lightning_mask.core.patterns import aliases, repeated_blocks
from lightning_mask.core.sharding import shard, whole
from lightning_mask.core.transposed import transposed_weights, turned


def random_scores(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Scores:
    """Return uniform float32 scores on the CPU, independent for each name and seed."""
    scores = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(named_seed(seed, name))
        scores[name] = torch.rand(shape, generator=generator, dtype=torch.float32)
    return scores


@criterion("random")
def random(params: Mapping[str, Tensor], context: Context) -> Scores:
    """Uniform noise, independent for each tensor and seed.

    Source: Xu and Zhang, "Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning" (2024).
    """
    return random_scores({name: tuple(p.shape) for name, p in params.items()}, context.seed)


@criterion("magnitude")
def magnitude(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w|``. Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015)."""
    return {name: p.detach().abs() for name, p in params.items()}


@criterion("magnitude_lowest")
def magnitude_lowest(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``-|w|``: what pruning would remove first trains.

    Source: the bottom-k choice of Super-Tuning (2026, arXiv 2607.09287), as PEFT offers it.
    """
    return {name: -p.detach().abs() for name, p in params.items()}


@criterion("spectral")
def spectral(params: Mapping[str, Tensor], context: Context, rank: int = 32) -> Scores:
    """``|W_r|``: magnitude after the best approximation of rank r, ``W_r = sum over i <= r of s_i u_i v_i^T``.

    A tensor of more than two dimensions is the matrix of its output units, ``[out, everything else]``. A matrix of at most
    r rows or columns, and a vector, is its own approximation. It is found as ``W V_r V_r^T`` from the r leading
    eigenvectors of the smaller of ``W^T W`` and ``W W^T``, in float64.

    Source: Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction" (LIFT, 2025); its
    runs take r from 32 for models of 1 billion parameters to 128 for 8.

    Args:
        params: Name to parameter.
        context: Its model says which weights lie as ``(in, out, ...)``.
        rank: The r above, 1 or more.

    Raises:
        ValueError: If ``rank`` is no whole number from 1.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"spectral: rank={rank!r} must be a whole number from 1.")
    groups = transposed_weights(context.model)
    scores = {}
    for name, p in params.items():
        across = groups.get(name, 0)
        near = _approximation(turned(whole(p.detach()), across), rank)
        scores[name] = shard(turned(near.abs(), across).contiguous(), p)
    return scores


def _approximation(tensor: Tensor, rank: int) -> Tensor:
    """The best approximation of rank ``rank`` of a tensor seen as a matrix, float32; the tensor itself if that is exact."""
    if tensor.dim() < 2 or min(len(tensor), tensor[0].numel()) <= rank:
        return tensor.float()
    matrix = tensor.flatten(1).double()
    if len(matrix) < matrix.shape[1]:
        leading = torch.linalg.eigh(matrix @ matrix.T).eigenvectors[:, -rank:]
        near = leading @ (leading.T @ matrix)
    else:
        leading = torch.linalg.eigh(matrix.T @ matrix).eigenvectors[:, -rank:]
        near = (matrix @ leading) @ leading.T
    return near.float().reshape(tensor.shape)


@criterion("snr")
def snr(params: Mapping[str, Tensor], context: Context) -> Scores:
    """One number a tensor, ``sum of s_i > e / (sum of s_i <= e) / s_1`` over its singular values: for structure=tensor.

    The edge is that of the Marchenko-Pastur law, ``e = sigma * (1 + sqrt(short / long side))``, with the noise level taken
    from the singular values' interquartile range, ``sigma = IQR / 1.349``. Where nothing lies below the edge the noise
    counts as 1. A tensor of more than two dimensions is the matrix ``[out, everything else]``. A vector has no spectrum and
    gets 0, as does a tensor of zeros: last.

    Source: Hartford et al., "Spectrum: Targeted Training on Signal to Noise Ratio" (2024), as its code takes it (it
    ranks tensors of each kind among themselves: give a scope of one kind, or several selections).
    """
    groups = transposed_weights(context.model)
    return {
        name: _signal_to_noise(turned(whole(p.detach()), groups.get(name, 0))).expand(p.shape)
        for name, p in params.items()
    }


def _signal_to_noise(tensor: Tensor) -> Tensor:
    if tensor.dim() < 2:
        return torch.zeros((), dtype=torch.float32, device=tensor.device)
    matrix = tensor.flatten(1).float()
    values = torch.linalg.svdvals(matrix)
    short, long = sorted(matrix.shape)
    lower, upper = torch.quantile(values, values.new_tensor([0.25, 0.75]))
    edge = (upper - lower) / 1.349 * (1 + (short / long) ** 0.5)
    signal, below = values[values > edge].sum(), values[values <= edge].sum()
    noise = torch.where(below > 0, below, torch.ones_like(below))
    return torch.where(values[0] > 0, signal / noise / values[0], torch.zeros_like(below))


def _blocks(names: Sequence[str], model: nn.Module) -> list[str]:
    """The repeated blocks of a model."""
    blocks = repeated_blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks, so its tensors have no depth; name tensors in train."
        )
    return blocks


@criterion("last_layers", check=_blocks)
def last_layers(params: Mapping[str, Tensor], context: Context) -> Scores:
    """The depth of the block that a tensor is in: a budget goes to the last blocks first.

    Blocks are those of the pattern ``layers:`` and count from 1; what comes before them has 0, what comes after them one
    more than the last, what lies between two that of the one before. Give ``structure=layer`` or ``tensor`` for whole
    ones. (To name the number of blocks instead of a budget, there is ``train=["layers:-2:"]``.)

    Source: Lee et al., "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning" (2019).

    Raises:
        ValueError: If the model has no repeated blocks.
    """
    return {name: value.expand(params[name].shape) for name, value in _depths(params, context).items()}


@criterion("first_layers", check=_blocks)
def first_layers(params: Mapping[str, Tensor], context: Context) -> Scores:
    """The depth of ``last_layers`` with its sign turned: a budget goes to the first blocks first.

    Source: Lee et al., "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts" (2022): the first block suits a
    shift of the input.

    Raises:
        ValueError: If the model has no repeated blocks.
    """
    return {name: -value.expand(params[name].shape) for name, value in _depths(params, context).items()}


def _depths(params: Mapping[str, Tensor], context: Context) -> Scores:
    blocks = _blocks(list(params), context.model)
    found: dict[str, int] = {}
    reached = 0
    for name, every in aliases(context.model).items():
        inside = [i for i, block in enumerate(blocks, 1) if any(n.startswith(f"{block}.") for n in every)]
        reached = max(inside, default=reached)
        found[name] = inside[0] if inside else (len(blocks) + 1 if reached == len(blocks) else reached)
    return {name: torch.tensor(float(found[name]), dtype=torch.float32, device=p.device) for name, p in params.items()}
