"""Batches to single examples: for criteria that look at the gradient of each example."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def examples(batch: Any) -> list[Any]:
    """Return the examples of a batch, each as a batch of one of the same kind.

    A batch is a tensor or array, or a mapping, sequence or dataclass of batches; tensors and arrays have the examples as
    dimension 0, and a list or tuple of as many strings one for each example. All else (numbers, None) is of all examples.

    Args:
        batch: What a loader gives.

    Raises:
        ValueError: If its tensors do not all have one number of examples.
    """
    sizes = sorted(_sizes(batch))
    if len(sizes) != 1 or not sizes[0]:
        found = "none" if not sizes else " and ".join(map(str, sizes))
        raise ValueError(
            f"A batch of type {type(batch).__name__} cannot be split into its examples: dimension 0 of its tensors would have "
            f"to be one number, and is {found}; take score=fisher, which looks at batches, or fisher_sampled."
        )
    return [_pick(batch, i, sizes[0]) for i in range(sizes[0])]


def _is_array(batch: Any) -> bool:
    """Whether it is a tensor or, for example, NumPy's array."""
    return isinstance(batch, Tensor) or (isinstance(shape := getattr(batch, "shape", None), tuple) and len(shape) > 0)


def _sizes(batch: Any) -> set[int]:
    """What dimension 0 of each tensor is; 0 stands for a tensor without one."""
    if _is_array(batch):
        return {batch.shape[0] if batch.shape else 0}
    return set().union(*map(_sizes, _parts(batch)))


def _parts(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return list(batch.values())
    if isinstance(batch, list | tuple):
        return list(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return [getattr(batch, f.name) for f in dataclasses.fields(batch)]
    return []


def _pick(batch: Any, i: int, n: int) -> Any:
    if _is_array(batch):
        return batch[i : i + 1]
    if isinstance(batch, Mapping):
        made: Any = copy.copy(batch)  # of its own kind, with attributes that a model may read
        for key, value in batch.items():
            made[key] = _pick(value, i, n)
        return made
    if isinstance(batch, list | tuple):
        named = hasattr(batch, "_fields")
        if not named and len(batch) == n and all(isinstance(part, str) for part in batch):
            return type(batch)([batch[i]])
        parts = [_pick(part, i, n) for part in batch]
        return type(batch)(*parts) if named else type(batch)(parts)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(
            batch, **{f.name: _pick(getattr(batch, f.name), i, n) for f in dataclasses.fields(batch) if f.init}
        )
    return batch
