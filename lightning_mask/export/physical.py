"""Smaller modules: channels and attention heads that reach no output are cut out of their layers."""

import copy
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
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
from lightning_mask.core.files import PathLike, whole_file, whole_folder
from lightning_mask.export.files import distinct, unlike

_FORMAT = "lightning-mask physical 1"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far outputs may be apart, over the largest of them, by dtype."""


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


def shrink(
    model: nn.Module,
    forward: Forward | Tensor | tuple[Any, ...] | Mapping[str, Any],
    masks: Mapping[str, Tensor] | None = None,
    *,
    heads: bool = True,
) -> nn.Module:
    """Return a copy of ``model`` without the channels and attention heads that reach no output, of the same classes.

    A channel (:func:`lightning_mask.core.channels.coupling`) goes where each layer that reads it either has no entry but zeros
    for it, or is given a constant by it: the rows that make it are zero. A constant that is not zero is added to the bias of
    the Linear layer that reads it; a convolution, whose padding would show, has to be given zero. A head goes where its
    columns of the output projection, or its rows and bias of the value projection, are zero; where several query heads share
    a key and value head, as many go from each as all can spare, and those that can spare all go whole. At least one channel
    and one head stay everywhere. Only heads whose query, key, value and output projections are Linear layers of their own go:
    fused ones, and those of ``torch.nn.MultiheadAttention``, stay.

    Args:
        model: The module; it is not changed.
        forward: Real inputs (a tensor, a tuple of arguments, or a mapping of keyword arguments), or a function that is called
            with a module, runs it on such, and returns its outputs.
        masks: Entries of parameters that are zeros whatever the weights say (False), by the parameter's name.
        heads: Whether attention heads may go; where the model's code does not run with fewer, say False.

    Returns:
        The smaller module, checked: on these inputs, in eval mode, its outputs are within :data:`TOLERANCES` of the masked
        model's. Its parameters are new ones.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If there is nothing to remove, or masks are of another model.
        RuntimeError: If the smaller module does not run, or its outputs differ.
    """
    run = as_forward(forward)
    small = copy.deepcopy(model)
    _zero(small, masks or {})
    before = evaluate(small, run)
    cuts = Cuts()
    _cut_channels(small, run, cuts)
    if heads:
        _cut_heads(small, cuts)
    if not cuts.outs:
        raise ValueError(
            "Nothing to remove: no channel and no attention head is zero as a whole in this model (those of layers that share "
            "a weight stay). Prune whole units (structure='channel', 'head' or 'row'), or export single zeros as a sparse file."
        )
    with torch.no_grad():
        _apply(small, cuts)
    try:
        after = evaluate(small, run)
    except Exception as error:
        without = ", or leave the heads alone with heads=False" if cuts.numbers else ""
        raise RuntimeError(
            f"The smaller module does not run ({' '.join(str(error).split())}): the model's code reads a width from elsewhere "
            f"than its layers. Leave the layers that it is about unpruned{without}."
        ) from error
    difference = apart(before, after)
    if difference is not None:
        raise RuntimeError(
            f"The smaller module's outputs differ from the masked model's: {difference}. A part of the model mixes channels in a "
            "way that the dependency graph does not see; export the zeros as a sparse file instead."
        )
    return small


def as_forward(inputs: Forward | Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Forward:
    """Return a function that runs a module on ``inputs``; a function is returned as it is."""
    if isinstance(inputs, Tensor):
        return lambda module: module(inputs)
    if isinstance(inputs, Mapping):
        return lambda module: module(**inputs)
    if isinstance(inputs, tuple):
        return lambda module: module(*inputs)
    return inputs


def evaluate(model: nn.Module, forward: Forward) -> list[Tensor]:
    """Return the output tensors of a model in eval mode, without gradients."""
    with evaluating(model), torch.no_grad():
        return [out.detach().clone() for out in flat(forward(model))]


def apart(expected: list[Tensor], found: list[Tensor]) -> str | None:
    """Say how two lists of outputs differ by more than :data:`TOLERANCES`; None where they do not."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return f"shapes {[tuple(t.shape) for t in expected]} and {[tuple(t.shape) for t in found]}"
    for number, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"output {number}, of whole numbers, is not equal"
            continue
        scale, allowed = float(a.abs().max()) if a.numel() else 0.0, TOLERANCES.get(a.dtype, 1e-4)
        if not torch.allclose(a, b.to(a), rtol=0.0, atol=allowed * max(scale, 1e-6), equal_nan=True):
            worst = float((a - b.to(a)).abs().max())
            return (
                f"output {number} by {worst:.3g}, where the largest is {scale:.3g} and {allowed * scale:.3g} is allowed"
            )
    return None


def save_physical(small: nn.Module, model: nn.Module, folder: PathLike) -> None:
    """Write a smaller module to ``folder``, and check it by loading: ``model.safetensors`` and ``model.json``.

    The JSON file says the shapes, and which numbers of which modules differ from those of ``model``.

    Args:
        small: What :func:`shrink` returned.
        model: What it was given.
        folder: Appears whole or not at all; an old one is replaced.

    Raises:
        ValueError: If the folder is there and holds something else.
        OSError: If the folder cannot be written to.
        RuntimeError: If what was written does not load equal.
    """
    check_replaceable(folder)
    with whole_folder(folder) as temporary:
        write_physical(small, model, temporary)


def check_replaceable(folder: PathLike) -> None:
    """Refuse to replace what is neither an empty folder nor one of :func:`save_physical`.

    Raises:
        ValueError: Naming it.
    """
    folder = Path(folder)
    ours = folder / "model.json"
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or _FORMAT in _text(ours))):
        raise ValueError(f"{str(folder)!r} is there and holds something else: give another folder.")


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def write_physical(small: nn.Module, model: nn.Module, folder: Path) -> None:
    """Write the files of :func:`save_physical` into a folder that there is."""
    from safetensors.torch import save_file

    tensors, aliases = distinct(small.state_dict())
    plan = {
        "format": _FORMAT,
        "model": type(small).__qualname__,
        "numbers": _differences(model, small),
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "aliases": aliases,
    }
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata=aliases)
    with whole_file(folder / "model.json") as temporary:
        temporary.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
    wrong = unlike(small.state_dict(), load_physical(folder, copy.deepcopy(model)).state_dict())
    if wrong is not None:
        raise RuntimeError(f"{folder}: {wrong} did not load equal to what was written.")


def load_physical(folder: PathLike, model: nn.Module) -> nn.Module:
    """Make ``model``, which has its full size, the smaller module that was saved, in place; return it.

    Args:
        folder: Of :func:`save_physical`.
        model: A module of the architecture that was shrunk; its weights do not matter.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or of another architecture; the model is not changed then.
    """
    numbers, tensors, aliases = _read(Path(folder))
    here, modules = model.state_dict(), dict(model.named_modules())
    odd = sorted(set(here) ^ (tensors.keys() | aliases))
    odd += [f"{m}.{k}" for m, own in numbers.items() for k in own if type(getattr(modules.get(m), k, None)) is not int]
    odd += [n for n, t in tensors.items() if n in here and not _fits(t.shape, here[n].shape)]
    if odd:
        raise ValueError(f"{str(folder)!r} is of another architecture than this {type(model).__name__}: {odd[0]}.")
    for name, own in numbers.items():
        for key, value in own.items():
            setattr(modules[name], key, value)
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        old = here[name]
        if old.shape == tensor.shape:
            with torch.no_grad():
                old.copy_(tensor)  # in place, so that what is tied stays so
        else:
            _put(modules[path], key, tensor.to(old))
    return model


def _read(folder: Path) -> tuple[dict[str, dict[str, int]], dict[str, Tensor], set[str]]:
    """The numbers of modules and the tensors in a folder of :func:`save_physical`, and the other names of tied tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in ("model.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {name} in {str(folder)!r}: it is no folder of a smaller module.")
    try:
        plan = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "model.safetensors")
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"{str(folder)!r} is damaged ({error}); export again.") from None
    if not isinstance(plan, dict) or plan.get("format") != _FORMAT:
        raise ValueError(f"{str(folder)!r} is no smaller module of this package: its model.json has another format.")
    try:
        numbers = {
            module: {key: operator.index(n) for key, n in own.items()} for module, own in plan["numbers"].items()
        }
        aliases, shapes = set(plan["aliases"].keys()), plan["shapes"]
    except (KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{str(folder / 'model.json')!r} is damaged ({error!r}); export again.") from None
    if shapes != {name: list(tensor.shape) for name, tensor in tensors.items()}:
        raise ValueError(f"{str(folder)!r} is damaged (its tensors have other shapes than it says); export again.")
    return numbers, tensors, aliases


def _fits(small: torch.Size, large: torch.Size) -> bool:
    return len(small) == len(large) and all(s <= n for s, n in zip(small, large, strict=True))


def _zero(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(f"masks are of another model: this one has no parameter {name!r} of {tuple(mask.shape)}.")
        with torch.no_grad():
            parameters[name].masked_fill_(~mask.to(parameters[name].device), 0.0)


# Channels.


def _cut_channels(model: nn.Module, forward: Forward, cuts: Cuts) -> None:
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


def _cut_heads(model: nn.Module, cuts: Cuts) -> None:
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


def _apply(model: nn.Module, cuts: Cuts) -> None:
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
    _put(module, name, tensor.index_select(dim, stays.nonzero().view(-1).to(tensor.device)))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
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


def _differences(model: nn.Module, small: nn.Module) -> dict[str, dict[str, Any]]:
    """The numbers of modules that differ, by module and attribute."""
    there = dict(small.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            new = getattr(there[name], key, None)
            if type(value) is int and type(new) is int and value != new:
                found.setdefault(name, {})[key] = new
    return found
