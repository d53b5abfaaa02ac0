"""Which channels and heads of a network reach no output, and the cutting of its layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core import structures
from lightning_mask.core.channels import (
    BatchNorm,
    Channels,
    Conv,
    Forward,
    coupling,
    depthwise,
    evaluating,
    flat,
    inputs,
    outputs,
)


@dataclass
class Cuts:
    """What is to be cut.

    Attributes:
        outs: Layer to the positions, int64, of its outputs that go.
        ins: Layer to the positions of its inputs that go.
        numbers: Module to attributes with their new values (``num_heads`` and the like).
        shifts: Layer to what is added to its bias: what the inputs that go contributed, which was constant.
    """

    outs: dict[str, Tensor] = field(default_factory=dict)
    ins: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, dict[str, int]] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, side: dict[str, Tensor], layer: str, at: Tensor) -> None:
        """Add positions to ``outs`` or ``ins``."""
        if len(at):
            side[layer] = torch.cat([side[layer], at]).unique() if layer in side else at.unique()


def evaluate(model: nn.Module, forward: Forward) -> list[Tensor]:
    """Return the output tensors of a model in eval mode, without gradients."""
    with evaluating(model), torch.no_grad():
        return [out.detach().clone() for out in flat(forward(model))]


# Channels.


def cut_channels(model: nn.Module, forward: Forward, cuts: Cuts) -> None:
    """Add to ``cuts`` the channels that are read by nobody, or are constants; ``forward`` runs the model on real inputs."""
    found = coupling(model, forward).channels
    shared = _shared(model)
    found = [c for c in found if not any(layer in shared for layer in (*c.makers, *c.readers))]
    seen = _seen(model, {layer for channels in found for layer in channels.readers}, forward)
    for channels in found:
        gone = _unread(model, channels, seen)
        for part in (*channels.makers.values(), *channels.readers.values()):
            if bool(gone[part.unit].all()):
                gone[part.unit[:1]] = False  # no layer can do with none
        for layer, part in channels.makers.items():
            cuts.add(cuts.outs, layer, part.of(gone))
        for layer, part in channels.readers.items():
            at = part.of(gone)
            cuts.add(cuts.ins, layer, at)
            weight, _ = inputs(model.get_submodule(layer))
            if len(at) and layer in seen and weight.dim() == 2:
                columns, constant = weight.detach()[:, at].double(), seen[layer][0][at].double()
                came = torch.where(_zeros(columns, 1), 0.0, constant)  # where columns are zero, nothing went on
                if bool(came.any()):
                    cuts.shifts[layer] = cuts.shifts.get(layer, 0.0) + columns @ came


def _shared(model: nn.Module) -> set[str]:
    """Modules that own a parameter that another one owns, too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _seen(model: nn.Module, layers: set[str], forward: Forward) -> dict[str, tuple[Tensor, Tensor]]:
    """The least and the largest value of each input of ``layers`` in one run: tensors [inputs]."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if not arguments:
                return
            x = arguments[0].detach()
            dim = x.dim() - 1 if isinstance(module, nn.Linear) else x.dim() - len(module.kernel_size) - 1  # type: ignore[arg-type]
            rows = x.movedim(dim, 0).flatten(1) if x.dim() > 1 else x[:, None]
            low, high = rows.amin(1), rows.amax(1)
            if layer in seen:
                low, high = torch.minimum(low, seen[layer][0]), torch.maximum(high, seen[layer][1])
            seen[layer] = low, high

        return look

    handles = [model.get_submodule(layer).register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        evaluate(model, forward)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _unread(model: nn.Module, channels: Channels, seen: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Which units are read by nobody, or are constants that can be done without: bool [units].

    A unit whose rows are all zero does not depend on the network's input: what was seen of it once holds always.
    """
    dead = torch.ones(channels.units, dtype=torch.bool)
    plain = True
    for layer, part in channels.makers.items():
        module = model.get_submodule(layer)
        if depthwise(module):
            plain = False
        elif not isinstance(module, BatchNorm):
            weight, dim = outputs(module)[0]
            dead[part.unit[~_zeros(weight, dim)[part.at].cpu()]] = False
    gone = torch.ones(channels.units, dtype=torch.bool)
    for layer, part in channels.readers.items():
        module = model.get_submodule(layer)
        weight, dim = inputs(module)
        silent = _zeros(weight, dim)[part.at].cpu()
        constant = torch.zeros_like(silent)
        if layer in seen:
            low, high = (each[part.at].cpu() for each in seen[layer])
            takes = plain and isinstance(module, nn.Linear) and module.bias is not None
            constant = (low == high) & (low.isfinite() if takes else low == 0)
        gone[part.unit[~(silent | (dead[part.unit] & constant))]] = False
    return gone


def _zeros(weight: Tensor, dim: int) -> Tensor:
    """Where along ``dim`` all entries are zero: bool."""
    return (weight.detach() == 0).movedim(dim, 0).flatten(1).all(1)


# Heads.


def cut_heads(model: nn.Module, cuts: Cuts) -> None:
    """Add to ``cuts`` the attention heads that reach no output."""
    groups = structures.heads(model)
    shared = _shared(model)
    for number, group in enumerate(groups):
        layers = {name.rpartition(".")[0]: tiles for name, tiles in group.items() if name.endswith(".weight")}
        if not all(isinstance(model.get_submodule(layer), nn.Linear) and layer not in shared for layer in layers):
            continue
        makers = [layer for layer, tiles in layers.items() if tiles.dims == (0,) and len(tiles.view) == 3]
        readers = [layer for layer, tiles in layers.items() if tiles.dims == (1,) and len(tiles.view) == 3]
        if len(readers) != 1 or len(makers) not in (1, 3) or len(makers) + 1 != len(layers):
            continue  # the three projections are one tensor
        count, width = layers[readers[0]].view[1:]
        if len(makers) == 1:  # queries that share keys and values, which are the next group
            makers += [name.rpartition(".")[0] for name in groups[number + 1] if name.endswith(".weight")]
        _cut_attention(model, cuts, makers, readers[0], count, width)


def _cut_attention(model: nn.Module, cuts: Cuts, makers: list[str], reader: str, count: int, width: int) -> None:
    """Cut the heads of one layer that has ``count`` query heads, each ``width`` wide."""
    value, out = model.get_submodule(makers[2]), model.get_submodule(reader)
    assert isinstance(value, nn.Linear)
    assert isinstance(out, nn.Linear)
    pairs = value.out_features // width  # key and value heads, which queries may share
    each = count // pairs
    nothing = _zeros(value.weight, 0)
    if value.bias is not None:
        nothing = nothing & (value.bias.detach() == 0)
    silent = _zeros(out.weight, 1).view(pairs, each, width).all(2) | nothing.view(pairs, 1, width).all(2)
    gone = silent.all(1)
    if bool(gone.all()):
        gone[0] = False
    spare = min(int(silent[~gone].sum(1).min()), each - 1)
    queries = (silent & (silent.cumsum(1) <= spare)) | gone[:, None]
    left = int((~queries).sum())
    if left == count:
        return
    places = torch.arange(count * width).view(count, width)
    rows = places[queries.reshape(-1).cpu()].reshape(-1)
    shared_rows = torch.arange(pairs * width).view(pairs, width)[gone.cpu()].reshape(-1)
    cuts.add(cuts.outs, makers[0], rows)
    cuts.add(cuts.ins, reader, rows)
    for layer in makers[1:]:
        cuts.add(cuts.outs, layer, shared_rows)
    kept = pairs - int(gone.sum())
    for path in _around(makers[0], reader):
        _renumber(model.get_submodule(path), cuts.numbers.setdefault(path, {}), (count, left), (pairs, kept), width)


def _around(query: str, reader: str) -> list[str]:
    """The modules that own the numbers of an attention layer: the one around its query projection, and around all."""
    inner, outer = query.split(".")[:-1], reader.split(".")[:-1]
    together = []
    for a, b in zip(inner, outer, strict=False):
        if a != b:
            break
        together.append(a)
    return list(dict.fromkeys([".".join(inner), ".".join(together)]))


def _renumber(
    module: nn.Module, numbers: dict[str, int], heads: tuple[int, int], pairs: tuple[int, int], width: int
) -> None:
    values = {
        **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads"), heads),
        **dict.fromkeys(("all_head_size", "inner_dim"), tuple(n * width for n in heads)),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), pairs),
        "num_key_value_groups": tuple(h // p for h, p in zip(heads, pairs, strict=True)),
    }
    for name, (old, new) in values.items():
        if old != new and getattr(module, name, None) == old:
            numbers[name] = new


# Cutting.


def apply(model: nn.Module, cuts: Cuts) -> None:
    """Cut the layers of ``model``, in place; call it without gradients."""
    for layer, shift in cuts.shifts.items():
        bias = model.get_submodule(layer).bias
        assert isinstance(bias, Tensor)
        bias.copy_(bias.double() + shift)
    for layer, at in cuts.ins.items():
        module = model.get_submodule(layer)
        weight, dim = inputs(module)
        _keep(module, "weight", weight, dim, at)
    for layer, at in cuts.outs.items():
        module = model.get_submodule(layer)
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor):
                dim = next((d for t, d in outputs(module) if t is tensor), 0)
                _keep(module, name, tensor, dim, at)
    for layer in {**cuts.ins, **cuts.outs}:
        _resize(model.get_submodule(layer), len(cuts.ins.get(layer, ())), len(cuts.outs.get(layer, ())))
    for path, numbers in cuts.numbers.items():
        for name, value in numbers.items():
            setattr(model.get_submodule(path), name, value)


def _keep(module: nn.Module, name: str, tensor: Tensor, dim: int, gone: Tensor) -> None:
    stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
    stays[gone] = False
    put(module, name, tensor.index_select(dim, stays.nonzero().view(-1).to(tensor.device)))


def put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a module a parameter, or a buffer, of another shape."""
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=old.requires_grad))
    else:
        setattr(module, name, tensor.detach().clone())


def _resize(module: nn.Module, ins: int, outs: int) -> None:
    if isinstance(module, nn.Linear):
        module.in_features -= ins
        module.out_features -= outs
    elif isinstance(module, BatchNorm):
        module.num_features -= outs
    elif isinstance(module, Conv):
        deep = depthwise(module)
        module.out_channels -= outs
        module.in_channels -= outs if deep else ins
        module.groups -= outs if deep else 0
