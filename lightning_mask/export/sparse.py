"""Sparse files: of a tensor with enough zeros its other entries, in order, and a bit for each entry; of others all.

The header has a hash of all that the file holds.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_mask.core.files import PathLike, whole_file
from lightning_mask.export.files import distinct, unlike

_FORMAT = "lightning-mask sparse 1"
_VALUES, _BITS, _WHOLE = "values:", "bits:", "whole:"


def save_sparse(state: Mapping[str, Tensor], path: PathLike, metadata: Mapping[str, str] | None = None) -> list[str]:
    """Write a state dict to ``path`` as safetensors, tensors with enough zeros compressed, and check it by loading.

    Of a compressed tensor of n entries, k of them not +0.0, the file has the k values and n bits, packed. It is compressed
    where that takes fewer bytes than the tensor does.

    Args:
        state: Name to tensor of any shape and dtype; tied ones are written once.
        path: The file.
        metadata: Further words for the file's header.

    Returns:
        The names of the tensors that are compressed.

    Raises:
        ValueError: If there is none; nothing is written then.
        OSError: If the folder cannot be written to.
        RuntimeError: If what was written does not load equal.
    """
    from safetensors.torch import save_file

    tensors, aliases = distinct(state)
    content: dict[str, Tensor] = {}
    compressed = []
    for name, tensor in tensors.items():
        alive = _alive(tensor)
        bits = (tensor.numel() + 7) // 8
        if int(alive.count_nonzero()) * tensor.element_size() + bits < tensor.numel() * tensor.element_size():
            compressed.append(name)
            content[_VALUES + name] = tensor[alive]
            content[_BITS + name] = torch.from_numpy(np.packbits(alive.reshape(-1).numpy()))
        else:
            content[_WHOLE + name] = tensor
    if not compressed:
        raise ValueError(
            "No tensor has enough zeros for its bits to pay: a sparse file would be no smaller than a dense one (format=dense)."
        )
    header = {
        "format": _FORMAT,
        "shapes": json.dumps({name: list(tensors[name].shape) for name in compressed}),
        "aliases": json.dumps(aliases),
        **(metadata or {}),
    }
    with whole_file(path) as temporary:
        save_file(content, temporary, metadata=header | {"hash": _hash(content, header)})
        wrong = unlike(state, load_sparse(temporary))
        if wrong is not None:
            raise RuntimeError(f"{path}: {wrong} did not load equal to what was written.")
    return compressed


def load_sparse(path: PathLike) -> dict[str, Tensor]:
    """Read a file that :func:`save_sparse` wrote: name to dense tensor, equal to what was saved; tied names share one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or no such file.
    """
    content, header = read_sparse(path)
    try:
        shapes, aliases = json.loads(header["shapes"]), json.loads(header["aliases"])
        tensors = {n.removeprefix(_WHOLE): t for n, t in content.items() if n.startswith(_WHOLE)}
        for name, shape in shapes.items():
            tensors[name] = _spread(content[_VALUES + name], content[_BITS + name], math.prod(shape)).view(shape)
        return tensors | {alias: tensors[name] for alias, name in aliases.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"The sparse file {str(path)!r} is damaged ({error!r}); write it again.") from None


def read_sparse(path: PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what is stored in a sparse file, and its header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no sparse file {str(path)!r}.")
    content: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, Any] = file.metadata() or {}
            if header.get("format") == _FORMAT:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The sparse file {str(path)!r} is damaged ({error}); write it again.") from None
    if header.get("format") != _FORMAT:
        raise ValueError(f"{str(path)!r} is not a sparse file of this package; write one with save_sparse.")
    if header.get("hash") != _hash(content, header):
        raise ValueError(
            f"The sparse file {str(path)!r} is damaged: its content does not match its hash; write it again."
        )
    return content, header


def _hash(content: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """SHA-256 of all that a sparse file holds: its header, without the hash itself, and its tensors."""
    made = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "hash"}, sort_keys=True).encode())
    for name, tensor in sorted(content.items()):
        made.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        made.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def _alive(tensor: Tensor) -> Tensor:
    """Where an entry is not +0.0, bit for bit."""
    nonzero = tensor != 0
    return nonzero | torch.signbit(tensor) if tensor.is_floating_point() else nonzero


def _spread(values: Tensor, bits: Tensor, total: int) -> Tensor:
    """The ``total`` entries of which ``values`` are those that have a bit."""
    if bits.dtype != torch.uint8 or bits.shape != ((total + 7) // 8,):
        raise ValueError(f"{tuple(bits.shape)} {bits.dtype} are not the bits of {total:,} entries")
    alive = torch.from_numpy(np.unpackbits(bits.numpy(), count=total).astype(bool))
    if values.shape != (int(alive.count_nonzero()),):
        raise ValueError(f"{tuple(values.shape)} values do not go with {int(alive.count_nonzero()):,} bits")
    dense = torch.zeros(total, dtype=values.dtype)
    dense[alive] = values
    return dense
