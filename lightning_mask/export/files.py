"""Files and folders that appear whole or not at all, and the tensors of a model that belong into them."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

PathLike = str | os.PathLike[str]


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what was written there is renamed to ``path`` when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that takes its place when the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state dict, each once, and for the other names of a tied one the name that is kept.

    Tensors are on the CPU and contiguous.
    """
    kept: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in kept:
            aliases[name] = kept[key]
            continue
        kept[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def state_bytes(model: nn.Module) -> int:
    """Return how many bytes the tensors of a model's state dict take, each once."""
    return sum(t.numel() * t.element_size() for t in distinct(model.state_dict())[0].values())


def entries(model: nn.Module) -> int:
    """Return how many entries the parameters of a model have, each once."""
    return sum(p.numel() for p in model.parameters())
