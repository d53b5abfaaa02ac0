"""Writing a checkpoint again, in its own form, with some tensors changed, added or left out."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mask.core.files import PathLike, whole_file, whole_folder
from lightning_mask.delta.stream import Spec, raw, writing
from lightning_mask.delta.weights import Folder, TensorsFile, TorchFile, Weights

_FORMS = (
    *("model*.safetensors", "pytorch_model*", "tf_model*", "flax_model*", "rust_model*", "open_clip*model*"),
    *("consolidated*", "model.ckpt*", "model*.index.json", "*.gguf", "*.onnx*", "onnx", "openvino"),
)
"""What the weights of a model are called in a folder, in any form and for any library; those of its parts lie in folders."""


@dataclass(frozen=True)
class Change:
    """What is to become of a checkpoint.

    Attributes:
        value: Gives the tensor of a name in ``changed`` or ``added``.
        changed: Names of the tensors to write with other values; dtypes and shapes stay.
        added: Names, dtypes and shapes of further tensors.
        dropped: Names of the tensors to leave out.
    """

    value: Callable[[str], Tensor]
    changed: Collection[str]
    added: Mapping[str, Spec] = field(default_factory=dict)
    dropped: Collection[str] = ()


def check_target(weights: Weights, out: PathLike) -> None:
    """Refuse a target that would take something else's place.

    Raises:
        ValueError: If ``out`` is a folder that has other things in it, lies in the folder that is read, or is no folder where
            one is to be written.
    """
    out, folder = Path(out), isinstance(weights, Folder)
    if folder and Path(weights.where).resolve() in out.resolve().parents:
        raise ValueError(f"{out} lies in the folder {weights.where}, which is copied: give a name outside of it.")
    if folder and out.is_dir() and any(out.iterdir()) and out.resolve() != Path(weights.where).resolve():
        raise ValueError(f"The folder {out} is not empty: give the name of a new one.")
    if out.exists() and out.is_dir() != folder:
        raise ValueError(
            f"{out} is a {'file' if folder else 'folder'}, and {weights.where} is none: give another name."
        )


def write_like(weights: Weights, out: PathLike, change: Change) -> None:
    """Write a checkpoint to ``out`` in the form of ``weights``, whole or not at all.

    Of safetensors one tensor at a time is in memory; a torch file is written from tensors that lie in a file of their own.

    Args:
        weights: What to write again, opened from a path; its further content (a trainer's state, a tokenizer) is taken along,
            but for the same weights in further forms, which would be those of before.
        out: A file, or a folder where ``weights`` is one.
        change: What to write otherwise.
    """
    if isinstance(weights, Folder):
        with whole_folder(out) as temporary:
            _write_folder(weights, temporary, change)
    else:
        assert isinstance(weights, TensorsFile | TorchFile)
        with whole_file(out) as file:
            _write_file(weights, file, change)


def _write_folder(weights: Folder, out: Path, change: Change) -> None:
    def stale(folder: str, names: list[str]) -> list[str]:
        forms = (*weights.parts, *_FORMS) if Path(folder) == weights.path else ()
        return [name for name in names if any(fnmatch(name, form) for form in forms)]

    shutil.copytree(weights.path, out, dirs_exist_ok=True, ignore=stale)
    *_, last = weights.parts
    for name, part in weights.parts.items():
        _write_file(part, out / name, change if name == last else replace(change, added={}))
    if weights.index is not None:
        index = dict(weights.index_content)
        places = {n: f for n, f in index["weight_map"].items() if n not in change.dropped}
        places |= dict.fromkeys(change.added, last)
        sizes = {n: s.size for n, s in (weights.specs | dict(change.added)).items() if n not in change.dropped}
        index["weight_map"] = dict(sorted(places.items()))
        index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes.values())}
        (out / weights.index).write_text(json.dumps(index, indent=2) + "\n")


def _write_file(part: TensorsFile | TorchFile, out: Path, change: Change) -> None:
    if isinstance(part, TorchFile):
        _write_torch(part, out, change)
        return
    kept = {name: spec for name, spec in part.specs.items() if name not in change.dropped}
    with writing(out, {**kept, **change.added}, part.metadata) as file:
        for name in (*kept, *change.added):
            new = name in change.changed or name in change.added
            file.write(name, change.value(name) if new else part.read(name))


def _write_torch(part: TorchFile, out: Path, change: Change) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made: dict[str, Tensor] = {}
        for number, name in enumerate([n for n in part.specs if n in change.changed] + list(change.added)):
            made[name] = _on_disk(change.value(name), Path(scratch) / str(number))
        state: Any = copy.copy(part.state)  # with its _metadata, which says by what versions of modules it was made
        for name in part.state:
            first = part.aliases.get(name, name)
            if first in change.dropped:
                del state[name]
            elif first in made:
                state[name] = made[first]
        state.update({name: made[name] for name in change.added})
        torch.save(state if part.state is part.content else {**part.content, "state_dict": state}, out)


def _on_disk(tensor: Tensor, path: Path) -> Tensor:
    """Return an equal tensor whose storage is a file, which the system may put out of memory."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor
    path.write_bytes(raw(tensor))
    storage: Any = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, _strides(tensor.shape))


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides))[-len(shape) :] if shape else ()
