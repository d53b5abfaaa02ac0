"""What differs between two checkpoints."""

from dataclasses import dataclass
from math import nan

import torch

from lightning_mask.core.files import PathLike
from lightning_mask.delta.names import Names
from lightning_mask.delta.stream import bits
from lightning_mask.delta.weights import Weights, open_weights

_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Difference:
    """How one tensor differs: a row of :func:`diff`."""

    name: str
    """As the first checkpoint has it, or the second where that alone has it."""
    status: str
    """``"equal"``, ``"changed"``, ``"shape"``, ``"dtype"`` (these differ), ``"only in a"`` or ``"only in b"``."""
    shape: tuple[int, ...]
    dtype: str
    entries: int
    changed: int
    """Entries whose bits differ; all of them where shapes or dtypes do, or one side lacks the tensor."""
    largest: float
    """Largest absolute difference; nan where there is none to be had."""
    norm: float
    """Euclidean norm of the difference, likewise."""


def diff(a: PathLike, b: PathLike) -> list[Difference]:
    """Compare two checkpoints, tensor by tensor and bit for bit.

    Args:
        a: A checkpoint: ``.safetensors``, ``.ckpt`` or ``.pt``, or a folder as ``save_pretrained`` writes it.
        b: Another, in whatever form; its names may have a prefix that those of ``a`` lack, or the other way round.

    Returns:
        One row for each tensor of either, in the order of ``a``; also those that are equal. Tied tensors count once.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If a checkpoint is damaged or none, or they have no tensor's name in common.
    """
    with open_weights(a) as first, open_weights(b) as second:
        names = Names(first.specs, second, first.aliases)
        pairs = {name: names.find(name) for name in first.specs}
        found = {there for there in pairs.values() if there is not None}
        if not found:
            raise ValueError(
                f"{a} and {b} are of different models: no tensor's name is in both, such as {names.missing(next(iter(pairs)))}."
            )
        rows = [_compared(first, name, second, there) for name, there in pairs.items()]
        return rows + [_alone(second, name, "only in b") for name in second.specs if name not in found]


def _compared(first: Weights, name: str, second: Weights, there: str | None) -> Difference:
    if there is None:
        return _alone(first, name, "only in a")
    ours, theirs = first.specs[name], second.specs[there]
    if ours.shape != theirs.shape:
        return _alone(first, name, "shape")
    if ours.dtype != theirs.dtype:
        return _alone(first, name, "dtype")
    x, y = first.read(name).reshape(-1), second.read(there).reshape(-1)
    changed, largest, squares = 0, 0.0, 0.0
    for begin in range(0, x.numel(), _AT_ONCE):
        one, other = x[begin : begin + _AT_ONCE], y[begin : begin + _AT_ONCE]
        differ = bits(one) != bits(other)
        count = int(differ.count_nonzero())
        if count:
            wide = torch.complex128 if one.is_complex() else torch.float64
            apart = (other[differ].to(wide) - one[differ].to(wide)).abs()
            changed, largest = changed + count, max(largest, float(apart.max()))
            squares += float(apart.square().sum())
    if squares != squares:
        largest = nan
    return Difference(
        name,
        "changed" if changed else "equal",
        ours.shape,
        _dtype(first, name),
        ours.numel,
        changed,
        largest,
        squares**0.5,
    )


def _alone(weights: Weights, name: str, status: str) -> Difference:
    spec = weights.specs[name]
    return Difference(name, status, spec.shape, _dtype(weights, name), spec.numel, spec.numel, nan, nan)


def _dtype(weights: Weights, name: str) -> str:
    return str(weights.specs[name].dtype).removeprefix("torch.")
