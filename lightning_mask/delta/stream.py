"""The safetensors layout, written piece by piece: a header that says where each tensor lies, then the bytes in any order."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_mask.core.files import PathLike

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors by the names they have in a header."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
_AS_INT = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Spec(NamedTuple):
    """What a header says of a tensor, but for its place."""

    code: str
    """The dtype as safetensors names it: ``"F32"``."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype as torch names it."""
        return DTYPES[self.code]

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes."""
        return self.numel * self.dtype.itemsize


def bits(tensor: Tensor) -> Tensor:
    """Return a tensor's entries as whole numbers of the same width, flat, without a copy where it is contiguous.

    Numbers are equal exactly where bits are: -0.0 is not 0.0, and each nan is itself.
    """
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(_AS_INT[flat.element_size()])


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU."""
    array: np.ndarray[tuple[int], np.dtype[np.uint8]] = bits(tensor).view(torch.uint8).numpy()
    return array.data


class Writer:
    """A safetensors file in the making; see :func:`writing`."""

    def __init__(self, file: BinaryIO, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        self._file, self._specs = file, specs
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, int] = {}
        at = 0
        for name in sorted(specs, key=lambda n: (-specs[n].dtype.itemsize, n)):  # so that each lies aligned
            spec = specs[name]
            header[name] = {"dtype": spec.code, "shape": list(spec.shape), "data_offsets": [at, at + spec.size]}
            self._places[name] = at
            at += spec.size
        self._header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        self._header += b" " * (-len(self._header) % 8)
        file.write(len(self._header).to_bytes(8, "little") + self._header)
        file.truncate(8 + len(self._header) + at)

    def write(self, name: str, tensor: Tensor, at: int = 0) -> None:
        """Write entries of a tensor, from its entry number ``at`` on."""
        spec = self._specs[name]
        if tensor.dtype != spec.dtype or at + tensor.numel() > spec.numel:
            raise RuntimeError(f"{name}: {tensor.numel()} entries {tensor.dtype} at {at} do not fit into {spec}.")
        self._file.seek(8 + len(self._header) + self._places[name] + at * spec.dtype.itemsize)
        self._file.write(raw(tensor.cpu()))


@contextmanager
def writing(path: PathLike, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> Iterator[Writer]:
    """Yield a writer of a safetensors file with these tensors; what is not written is zeros.

    Args:
        path: The file, which is overwritten.
        specs: Tensor name to dtype and shape.
        metadata: Words for the header.
    """
    with open(path, "wb") as file:
        yield Writer(file, specs, metadata)


def patch_header(path: PathLike, old: str, new: str) -> None:
    """Write other words of the same length into the header of a file, where ``old`` first stands."""
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        file.seek(8 + header.index(old.encode()))
        file.write(new.encode())
