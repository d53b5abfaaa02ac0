"""Smaller modules: a network without what reaches no output, as a module of the same classes, and as a folder."""

import copy
import json
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.channels import Forward
from lightning_mask.core.files import PathLike, whole_file, whole_folder
from lightning_mask.export.cuts import Cuts, apply, cut_channels, cut_heads, evaluate, put
from lightning_mask.export.files import distinct, unlike

_FORMAT = "lightning-mask physical 1"
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far outputs may be apart, over the largest of them, by dtype."""


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
    cut_channels(small, run, cuts)
    if heads:
        cut_heads(small, cuts)
    if not cuts.outs:
        raise ValueError(
            "Nothing to remove: no channel and no attention head is zero as a whole in this model (those of layers that share "
            "a weight stay). Prune whole units (structure='channel', 'head' or 'row'), or export single zeros as a sparse file."
        )
    with torch.no_grad():
        apply(small, cuts)
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
            put(modules[path], key, tensor.to(old))
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
