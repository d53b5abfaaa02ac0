"""Criteria from the activations of linear and convolution layers, on training batches in eval mode without gradients.

What a hook sums over a layer's inputs or outputs is one float32 number a channel, so no activation is kept. Sums are
averaged over ranks before anything that is not linear is made of them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_mask.core.convolutions import CONVOLUTIONS, Given, convolve, first_input, met
from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion
from lightning_mask.core.distributed import mean_over_ranks
from lightning_mask.core.patterns import aliases
from lightning_mask.core.sharding import shard
from lightning_mask.core.structures import Tiles, attention_layers
from lightning_mask.core.transposed import is_conv1d


def _check_layers(asked: str, kinds: tuple[str, ...], names: Sequence[str], model: nn.Module) -> None:
    for name in names:
        if all(isinstance(layer, NonDynamicallyQuantizableLinear) for layer in _layers(name, model, kinds, asked)):
            raise ValueError(_not_run(name))  # MultiheadAttention never calls it


@criterion("wanda", check=partial(_check_layers, "wanda", ("weight",)))
def wanda(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w_ij| * ||x_j||``: magnitude times the norm of the input that the weight meets, over all tokens of all batches.

    Of a convolution, ``x_j`` is what an entry of the kernel meets at all positions. The squared norm is the mean over ranks
    of each rank's sum. For weights of Linear, Conv1d to Conv3d and transformers' Conv1D; the paper ranks within each output
    unit, which is allocation=row.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, 2023), equation (1).

    Raises:
        ValueError: If a tensor in scope is no weight of such a layer, or its layer was not run.
    """
    layers = {name: _layers(name, context.model, ("weight",), "wanda") for name in params}
    shapes = {layer: _met(layer) for every in layers.values() for layer in every}
    sums = _observe(_squared_inputs, shapes, layers, context)
    scores = {}
    for name, p in params.items():
        norm = sums[name][0].sqrt()
        if is_conv1d(layers[name][0]):
            norm = norm.T
        elif p.dim() > 2:
            norm = norm.repeat_interleave(p.shape[0] // len(norm), dim=0)  # one to each group of output channels
        scores[name] = p.detach().float().abs() * shard(norm.expand(p.shape), p)
    return scores


@criterion("activation", check=partial(_check_layers, "activation", ("weight", "bias")))
def activation(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``mean of |y_i|`` over all tokens or positions of all batches, given to every entry of output unit i.

    The output is that of the layer, before what follows it. For weights and biases of Linear, Conv1d to Conv3d and
    transformers' Conv1D, and for structure=row: all entries of a row are equal. Heads are :func:`head_activation`.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (2024), section 2.1, the
    importance of neurons; Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference" (2017),
    the mean activation of section 2.2, who take it behind the nonlinearity.

    Raises:
        ValueError: If a tensor in scope is not of such a layer, or its layer was not run.
    """
    layers = {name: _layers(name, context.model, ("weight", "bias"), "activation") for name in params}
    shapes = {layer: (_outputs(layer),) for every in layers.values() for layer in every}
    sums = _observe(_absolute_outputs, shapes, layers, context)
    scores = {}
    for name, p in params.items():
        total, count = sums[name]
        dim = 1 if p.dim() > 1 and is_conv1d(layers[name][0]) else 0
        mean = (total / count).view([-1 if d == dim else 1 for d in range(p.dim())])
        scores[name] = shard(mean.expand(p.shape), p)
    return scores


def _heads_of(
    names: Sequence[str], model: nn.Module
) -> tuple[dict[str, tuple[str, Tiles]], dict[str, nn.Module], dict[nn.Module, tuple[int, int]]]:
    """The output projection that reads the heads of a tensor, and its tiles, by the tensor's name; layers; heads that they read.

    Raises:
        ValueError: If no output projection reads the heads of one of ``names``.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[str, tuple[str, Tiles]] = {}
    sizes: dict[nn.Module, tuple[int, int]] = {}
    layers: dict[str, nn.Module] = {}
    for groups in attention_layers(model):
        tensors = {name: tiles for group in groups for name, tiles in group.items()}
        for name, tiles in tensors.items():
            layer = modules[name.rpartition(".")[0]]
            read = _heads_read(layer, tiles) if name.endswith("weight") else None
            if read is not None:
                sizes[layer], layers[name] = read, layer
                places |= {each: (name, tiles) for each, tiles in tensors.items()}
    odd = next((name for name in names if name not in places), None)
    if odd is not None:
        raise ValueError(
            f"head_activation scores attention heads that an output projection, a layer of its own, reads, and {odd} is of none; "
            f"take it away with '!{odd}', or choose score=taylor."
        )
    return places, layers, sizes


def _heads_read(layer: nn.Module, tiles: Tiles) -> tuple[int, int] | None:
    """Number and width of the heads that are the inputs of a layer; None: its weight is not of an output projection."""
    if is_conv1d(layer):
        return (tiles.view[0], tiles.view[1]) if tiles.dims == (0,) else None
    called = isinstance(layer, nn.Linear) and not isinstance(
        layer, NonDynamicallyQuantizableLinear
    )  # MultiheadAttention's
    is_output = called and len(tiles.view) == 3 and tiles.dims == (1,)
    return (tiles.view[1], tiles.view[2]) if is_output else None


@criterion("head_activation", check=_heads_of)
def head_activation(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``mean of ||a_h||`` over all tokens of all batches, a_h what attention head h gives to the output projection.

    All entries of the head are given it: rows of query, key and value projections, columns of the output projection. Keys and
    values that several query heads share get the mean of these. For structure=head and the tensors that it takes.

    Source: Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (2024), section 2.1, the
    importance of heads.

    Raises:
        ValueError: If a tensor in scope has no heads, or the output projection was not run as a layer.
    """
    places, every, sizes = _heads_of(list(params), context.model)
    layers = {output: [every[output]] for output in dict.fromkeys(places[name][0] for name in params)}

    def norms(layer: nn.Module, given: Given, y: Tensor) -> Tensor:
        return first_input(given).float().reshape(-1, *sizes[layer]).norm(dim=-1).sum(0)

    sums = _observe(norms, {layer: sizes[layer][:1] for (layer,) in layers.values()}, layers, context)
    scores = {}
    for name, p in params.items():
        output, tiles = places[name]
        total, count = sums[output]
        (dim,) = tiles.dims
        mean = (total / count).view(tiles.view[dim], -1).mean(1)
        seen = mean.view([-1 if d == dim else 1 for d in range(len(tiles.view))]).expand(tiles.view)
        scores[name] = shard(seen.reshape(p.shape), p)
    return scores


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _outputs(layer: nn.Module) -> int:
    return int(_weight(layer).shape[1 if is_conv1d(layer) else 0])


def _met(layer: nn.Module) -> tuple[int, ...]:
    """Shape of what the weights of one output unit of each group meet: (groups, inputs of a group, kernel)."""
    shape = tuple(_weight(layer).shape)
    groups = layer.groups if isinstance(layer, CONVOLUTIONS) else 1
    return (groups, shape[0]) if is_conv1d(layer) else (groups, *shape[1:])


def _layers(name: str, model: nn.Module, kinds: tuple[str, ...], asked: str) -> list[nn.Module]:
    """The linear or convolution layers that ``name`` is a parameter of, under all names that it answers to.

    Raises:
        ValueError: If there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, None] = {}
    for each in aliases(model).get(name, ()):
        path, _, kind = each.rpartition(".")
        layer = modules[path]
        if kind in kinds and (isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(layer)):
            found[layer] = None
    if not found:
        raise ValueError(
            f"{asked} scores the {' or '.join(kinds)} of linear and convolution layers, and {name} is none; name such "
            f"tensors in scope, for example scope='weights:', or take it away with '!{name}'."
        )
    return list(found)


def _not_run(name: str) -> str:
    return (
        f"The layer of {name} was not run on the batches (a fused kernel may read its weight without calling it), so there is "
        f"nothing to score it by; take it away with '!{name}' in scope."
    )


def _observe(
    observe: Callable[[nn.Module, Given, Tensor], Tensor],
    shapes: Mapping[nn.Module, tuple[int, ...]],
    layers: Mapping[str, list[nn.Module]],
    context: Context,
) -> dict[str, tuple[Tensor, float]]:
    """Run the batches through the model and sum what ``observe`` makes of each layer's input and output.

    Returns:
        For each name the sum over its layers, float32 of the shape given for them, and the number of positions that it is
        over; both are means over ranks.

    Raises:
        ValueError: If no layer of a name was run on any rank.
    """
    sums = {
        layer: torch.zeros(shape, dtype=torch.float32, device=_weight(layer).device) for layer, shape in shapes.items()
    }
    counts = dict.fromkeys(shapes, 0)

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        sums[layer] += observe(layer, (args, kwargs), output.detach())
        counts[layer] += output.numel() // _outputs(layer)

    with ExitStack() as hooks:
        for layer in shapes:
            hooks.callback(layer.register_forward_hook(add, with_kwargs=True).remove)
        for _ in context.forward():
            pass
    seen = torch.tensor(list(counts.values()), dtype=torch.float64, device=next(iter(sums.values())).device)
    counted = dict(zip(shapes, mean_over_ranks(seen).tolist(), strict=True))
    for name, every in layers.items():
        if not any(counted[layer] for layer in every):
            raise ValueError(_not_run(name))
    means = {layer: mean_over_ranks(value) for layer, value in sums.items()}
    return {
        name: (torch.stack([means[layer] for layer in every]).sum(0), sum(counted[layer] for layer in every))
        for name, every in layers.items()
    }


def _squared_inputs(layer: nn.Module, given: Given, y: Tensor) -> Tensor:
    if not isinstance(layer, CONVOLUTIONS):
        x = first_input(given)
        return x.float().square().reshape(-1, x.shape[-1]).sum(0, keepdim=True)
    # What an entry of a kernel meets, summed over positions, is the derivative of the sum of the outputs by it.
    meets = met(layer, given)
    device = meets.x.device
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        kernel = torch.zeros(_met(layer), device=device, dtype=torch.float32, requires_grad=True)
        outputs = convolve(meets._replace(x=meets.x.float().square()), kernel, layer.groups)
        return torch.autograd.grad(outputs.sum(), kernel)[0]


def _absolute_outputs(layer: nn.Module, given: Given, y: Tensor) -> Tensor:
    channels = -(_weight(layer).dim() - 1) if isinstance(layer, CONVOLUTIONS) else -1
    return y.float().abs().movedim(channels, -1).reshape(-1, _outputs(layer)).sum(0)
