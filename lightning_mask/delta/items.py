"""What a delta has of one tensor, and how that is written into one and taken out of it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mask.core.choosing import draw_random
from lightning_mask.delta.stream import Spec, bits

FORMS = {"n": "none", "e": "entries", "d": "drawn", "r": "rows", "w": "whole", "a": "added"}
DIGEST = 16
LONG = 2**31
"""A tensor of so many entries has indices of 64 bits."""


@dataclass(frozen=True)
class Item:
    """What a delta has of one tensor."""

    name: str
    form: str
    """A letter of ``FORMS``."""
    spec: Spec
    count: int
    """Active rows where the form is ``r``, else active entries."""

    @property
    def active(self) -> int:
        """Number of active entries."""
        return self.count * math.prod(self.spec.shape[1:]) if self.form == "r" else self.count

    @property
    def stored(self) -> int:
        """Number of values."""
        return self.spec.numel if self.form in "wa" else self.active

    @property
    def numbers(self) -> int:
        """Number of indices."""
        return self.count if self.form in "er" else 0

    @property
    def indices(self) -> str:
        """Name of the tensor in the file that has the indices."""
        return "indices" if self.spec.numel < LONG else "indices.long"


class Part(NamedTuple):
    """The content of an item: what is to be written where."""

    indices: Tensor | None
    """Flat indices or row numbers; None: everywhere."""
    values: Tensor
    """Flat."""
    originals: Tensor | None
    """The base's values at the same places; None where they were not kept."""


def drawable(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe gives its mask from its seed alone."""
    return recipe.get("score") == "random" and "scope_names" in recipe


def draw(recipe: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return the masks of a drawable recipe, by name; it takes a byte for each entry in its scope."""
    inner = next((r for r in (recipe, *recipe.get("recipes", [])) if drawable(r)), None)
    if inner is None or not set(inner["scope_names"]) <= shapes.keys():
        return {}
    return draw_random(inner, {name: shapes[name] for name in inner["scope_names"]})


def put(tensor: Tensor, item: Item, indices: Tensor | None, values: Tensor) -> Tensor:
    """Return a copy of a tensor with values written where an item is active, bit for bit."""
    if indices is None:
        return values.view(item.spec.shape)
    made = tensor.detach().clone(memory_format=torch.contiguous_format)
    flat, new = bits(made), bits(values)
    if item.form == "r":
        flat.view(item.spec.shape[0], -1)[indices.long()] = new.view(len(indices), -1)
    else:
        flat[indices.long()] = new
    return made


def take(tensor: Tensor, item: Item, indices: Tensor | None) -> Tensor:
    """Return the values of a tensor where an item is active, flat, bit for bit."""
    flat = bits(tensor)
    if indices is not None and item.form == "r":
        flat = flat.view(item.spec.shape[0], -1)[indices.long()].view(-1)
    elif indices is not None:
        flat = flat[indices.long()]
    return flat.view(tensor.dtype)
