"""A random mask without scores: the active entries are drawn directly, which gives the same distribution for less."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_mask.core import allocation
from lightning_mask.core.allocation import Budget
from lightning_mask.core.criteria import named_seed

_AT_ONCE = 1 << 20


def draw_entries(
    shapes: Mapping[str, tuple[int, ...]], budget: Budget, allocation_name: str, seed: int
) -> dict[str, Tensor]:
    """Return masks of uniformly random entries, as many of each group of tensors as the allocation says.

    To keep the best of uniform noise is to keep a uniformly random subset of that size; it is drawn here without the noise.

    Args:
        shapes: Tensor name to shape; the masks follow their order.
        budget: How many entries are active.
        allocation_name: How they are shared among the tensors.
        seed: Masks of different seeds are independent; those of one seed are the same on every machine.

    Raises:
        ValueError: If there is no such allocation, or the budget is above the number of entries.

    Example:
        >>> masks = draw_entries({"a": (2, 3), "b": (4,)}, Budget(0.5), "uniform", seed=0)
        >>> {name: (tuple(mask.shape), int(mask.sum())) for name, mask in masks.items()}
        {'a': ((2, 3), 3), 'b': ((4,), 2)}
    """
    masks: dict[str, Tensor] = {}
    for names, keep in allocation.get(allocation_name)(shapes, budget):
        sizes = [math.prod(shapes[name]) for name in names]
        drawn = torch.from_numpy(random_subset(sum(sizes), keep, named_seed(seed, "\n".join(names))))
        masks |= {name: part.view(shapes[name]) for name, part in zip(names, drawn.split(sizes), strict=True)}
    return {name: masks[name] for name in shapes}


def random_subset(n: int, k: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return ``n`` booleans of which ``k`` are True, each choice of ``k`` places being as likely as any other.

    The first ``k`` different values of a sequence of independent uniform places are such a choice. Each round draws as
    many as are missing, so there is never one too many; of the smaller part, True or False, so that the rounds together
    draw at most about 1.4 k. (A place is 64 random bits modulo ``n``, which prefers none by more than ``n / 2^64``.)

    Args:
        n: Number of places.
        k: Number of True ones, from 0 to ``n``.
        seed: Whole number from 0. The bits are of PCG-64, whose sequence NumPy keeps from version to version.

    Example:
        >>> random_subset(8, 3, seed=0).tolist()
        [True, True, False, False, False, False, False, True]
    """
    few = min(k, n - k)
    chosen = np.zeros(n, dtype=np.bool_)
    source = np.random.PCG64(seed)
    missing = few
    while missing:
        for begin in range(0, missing, _AT_ONCE):
            bits = np.asarray(source.random_raw(min(_AT_ONCE, missing - begin)))
            chosen[(bits % np.uint64(n)).view(np.int64)] = True
        missing = few - int(np.count_nonzero(chosen))
    return chosen if few == k else np.logical_not(chosen, out=chosen)
