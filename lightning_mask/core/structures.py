"""Structures: which entries of a tensor are ranked together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Structure:
    """How entries form units.

    Attributes:
        units: Shape of a tensor to the number of its units; all units of one tensor have the same size.
        reduce: Score tensor of the parameter's shape to one float32 score a unit, the mean over its entries.
        expand: Boolean unit mask and the parameter's shape to a mask of that shape.
    """

    units: Callable[[tuple[int, ...]], int]
    reduce: Callable[[Tensor], Tensor]
    expand: Callable[[Tensor, tuple[int, ...]], Tensor]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its first two dimensions exchanged."""
    return (shape[1], shape[0], *shape[2:]) if len(shape) > 1 else shape


def _expand_rows(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    return mask.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous() if shape else mask.view(())


STRUCTURES: dict[str, Structure] = {
    "entry": Structure(
        units=_numel,
        reduce=lambda score: score.reshape(-1),
        expand=lambda mask, shape: mask.view(shape),
    ),
    # An output unit: dimension 0 of a Linear, Embedding or convolution weight; each entry of a vector.
    "row": Structure(
        units=_rows,
        reduce=lambda score: score.float().reshape(_rows(tuple(score.shape)), -1).mean(1),
        expand=_expand_rows,
    ),
    # An input unit: dimension 1 of such a weight; each entry of a vector.
    "column": Structure(
        units=lambda shape: _rows(_turned(shape)),
        reduce=lambda score: STRUCTURES["row"].reduce(score.movedim(1, 0) if score.dim() > 1 else score),
        expand=lambda mask, shape: (
            _expand_rows(mask, _turned(shape)).movedim(0, 1).contiguous()
            if len(shape) > 1
            else _expand_rows(mask, shape)
        ),
    ),
    "tensor": Structure(
        units=lambda shape: 1,
        reduce=lambda score: score.float().mean().reshape(1),
        expand=lambda mask, shape: mask.view([1] * len(shape)).expand(shape).contiguous(),
    ),
}


def get(name: str) -> Structure:
    """Return the structure of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in STRUCTURES:
        raise ValueError(f"structure={name!r} is unknown; there are {', '.join(sorted(STRUCTURES))}.")
    return STRUCTURES[name]
