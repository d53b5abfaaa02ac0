"""Checkpoints of any form as tensors by name, read one at a time."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.files import PathLike
from lightning_mask.delta.stream import CODES, DTYPES, Spec, raw

Source = PathLike | Mapping[str, Tensor] | nn.Module

_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""What a folder's weights are called; of several, ``from_pretrained`` loads the first."""


class Weights(ABC):
    """The tensors of a checkpoint: each once, and the other names of tied ones."""

    where: str
    """What to call it in a message."""
    specs: dict[str, Spec]
    aliases: dict[str, str]
    """Further name of a tied tensor to the name in ``specs``."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU; it is not to be written to."""


class InMemory(Weights):
    """A state dict, also that of a torch file.

    Args:
        state: Name to tensor; what is no tensor is left out.
        where: What to call it in a message.
    """

    def __init__(self, state: Mapping[str, Any], where: str) -> None:
        self.where, self.state = where, state
        self.specs, self.aliases = {}, {}
        kept: dict[Any, str] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                continue
            if tensor.dtype not in CODES or tensor.layout != torch.strided:
                raise ValueError(f"{where}: {name} is {tensor.dtype}, {tensor.layout}, which safetensors cannot hold.")
            key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            first = kept.setdefault(key, name)
            if first != name and tensor.numel():
                self.aliases[name] = first
            else:
                self.specs[name] = Spec(CODES[tensor.dtype], tuple(tensor.shape))
        if not self.specs:
            raise ValueError(f"{where} holds no tensors by name: expected a state dict, or one under 'state_dict'.")

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU."""
        tensor: Tensor = self.state[name]
        return tensor.detach().cpu()


class TorchFile(InMemory):
    """A ``.ckpt``, ``.pt`` or ``.bin`` file; its tensors stay on disk until they are read."""

    def __init__(self, path: Path) -> None:
        self.path, self.content = path, _load(path)
        inner = self.content.get("state_dict")
        super().__init__(inner if isinstance(inner, Mapping) else self.content, str(path))


class TensorsFile(Weights):
    """A ``.safetensors`` file, open.

    Args:
        path: The file.
        stack: What closes it.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.where, self.path = str(path), path
        try:
            self._file = stack.enter_context(safe_open(path, framework="pt"))
            slices = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.specs = {n: Spec(s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged, or no safetensors file ({error}): give another one.") from None
        unknown = next((name for name, spec in self.specs.items() if spec.code not in DTYPES), None)
        if unknown is not None:
            raise ValueError(
                f"{path}: {unknown} is {self.specs[unknown].code}, which a delta cannot hold: convert it to another dtype."
            )
        self.metadata: dict[str, str] = self._file.metadata() or {}
        self.aliases = {a: n for a, n in self.metadata.items() if n in self.specs and a not in self.specs}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def part(self, name: str, begin: int, end: int) -> Tensor:
        """Return entries of a tensor of one dimension."""
        tensor: Tensor = self._file.get_slice(name)[begin:end]
        return tensor


class Folder(Weights):
    """A folder as ``save_pretrained`` writes it: one file of weights, or several and an index.

    Args:
        path: The folder.
        stack: What closes its files.
    """

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.where, self.path = str(path), path
        found = next((name for name in _NAMES if (path / name).is_file()), None)
        self.index = found if found is not None and found.endswith(".json") else None
        if self.index is not None:
            try:
                self.index_content = json.loads((path / self.index).read_text())
                names = sorted(set(self.index_content["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise ValueError(f"{path / self.index} is damaged: it has no weight_map.") from None
        elif found is not None:
            names = [found]
        else:
            raise ValueError(
                f"The folder {path} has no weights: expected {_NAMES[0]}, {_NAMES[2]}, or an index of shards."
            )
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(f"{path / str(self.index)} is damaged: it names files outside of the folder.")
        self.parts = {name: _open_file(path / name, stack) for name in names}
        self._owner = {name: part for part in self.parts.values() for name in part.specs}
        self.specs = {name: part.specs[name] for name, part in self._owner.items()}
        self.aliases = {a: n for part in self.parts.values() for a, n in part.aliases.items()}

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._owner[name].read(name)


@contextmanager
def open_weights(source: Source) -> Iterator[Weights]:
    """Yield the tensors of a checkpoint, which are read one at a time.

    Args:
        source: The path of a file or a folder, a state dict, or a module.

    Raises:
        FileNotFoundError: If the path leads nowhere.
        ValueError: If it is damaged, or holds no tensors by name.
    """
    with ExitStack() as stack:
        if isinstance(source, nn.Module):
            yield InMemory(source.state_dict(), type(source).__name__)
        elif isinstance(source, Mapping):
            yield InMemory(source, "The state dict")
        elif Path(source).is_dir():
            yield Folder(Path(source), stack)
        else:
            yield _open_file(Path(source), stack)


def _open_file(path: Path, stack: ExitStack) -> TensorsFile | TorchFile:
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(path)!r}: give a file, or a folder with weights.")
    if path.suffix != ".safetensors":
        return TorchFile(path)
    file = TensorsFile(path, stack)
    if not file.specs:
        raise ValueError(f"{path} holds no tensors: give another checkpoint.")
    return file


def _load(path: Path) -> dict[str, Any]:
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file in torch's format of before 1.6 cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path} is damaged, holds Python objects, which are not loaded, or is no checkpoint ({reason:.120}): give "
            "another one."
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}, expected tensors by name.")
    return content


def content_hash(source: Source) -> str:
    """Return a checkpoint's hash, over names, dtypes, shapes and bytes of its tensors: the ``base`` of deltas made from it.

    The form of the checkpoint makes no difference, nor does the order of the tensors, nor the words that all names begin with
    (``net.`` of a LightningModule); what differs in names does. Tied tensors count once, by the first name that the
    checkpoint has for them.

    Args:
        source: The path of a file or a folder, a state dict, or a module.

    Raises:
        FileNotFoundError: If the path leads nowhere.
        ValueError: If it is damaged, or holds no tensors by name.
    """
    with open_weights(source) as weights:
        return hash_of({name: digest(weights.read(name)) for name in weights.specs})


def hash_of(digests: Mapping[str, bytes]) -> str:
    """Return the hash of a checkpoint from the digests of its tensors: SHA-256 over names and digests, in order of names."""
    made, start = hashlib.sha256(), len(common_start(digests))
    for name, one in sorted(digests.items()):
        made.update(name[start:].encode() + b"|" + one)
    return made.hexdigest()


def common_start(names: Collection[str]) -> str:
    """Return the longest run of whole words that all names begin with."""
    if len(names) < 2:
        return ""
    first, last = min(names), max(names)
    at = max((at for at in starts(first) if last.startswith(first[:at])), default=0)
    return first[:at]


def starts(name: str) -> Iterator[int]:
    """Yield where a name begins, and where it goes on after a dot."""
    yield 0
    yield from (at + 1 for at, letter in enumerate(name) if letter == ".")


def digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor: its dtype, its shape and its bytes."""
    made = hashlib.sha256(f"{CODES[tensor.dtype]}|{list(tensor.shape)}|".encode())
    made.update(raw(tensor))
    return made.digest()
