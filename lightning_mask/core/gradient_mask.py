"""Masks of gradients alone, drawn anew for each step: a regulariser, which holds nothing."""

from collections.abc import Collection

import numpy as np
import torch
from torch.optim import Optimizer

from lightning_mask.core.criteria import named_seed
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.sharding import first_entry

_AT_ONCE = 1 << 20
_LEVELS = 1 << 16


def mask_gradients(engine: MaskEngine, optimizer: Optimizer, names: Collection[str], density: float, seed: int) -> None:
    """Write 0 over the gradient of each active entry with probability ``1 - density``, and divide the others by ``density``.

    So the gradient's mean stays what it is: ``E[g * m / p] = g`` for ``m ~ Bernoulli(p)``. Call it once a step, after
    ``engine.after_backward()``; the optimizer then goes on as ever, its moments and weight decay too. The draw depends on
    the seed, the tensor's name and the entry's place among those that train, and not on how they are held.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-F, 2021), the task-free variant, with
    the scale of its code.

    Args:
        engine: Knows what the optimizer takes as the gradient of each tensor.
        optimizer: One of the engine's; the gradients of its tensors are masked.
        names: Names of the parameters to mask.
        density: In (0, 1], the probability of each gradient to stay; drawn to within 2^-17.
        seed: Another one for each step.

    Raises:
        ValueError: If such a tensor has a sparse gradient.
    """
    for name, gradient, active in engine.gradients(optimizer):
        if name not in names:
            continue
        if gradient.is_sparse:
            raise ValueError(
                f"GradientMask: {name} has a sparse gradient; make its layer with sparse=False, or leave it out of scope."
            )
        n = gradient.numel() if active is None else len(active)
        first = first_entry(engine.model.get_parameter(name))
        drop = torch.from_numpy(~bernoulli(n, density, named_seed(seed, f"{name} from {first}"))).to(gradient.device)
        if active is not None:
            drop = (
                torch.zeros(gradient.shape, dtype=torch.bool, device=drop.device)
                .view(-1)
                .index_fill_(0, active.to(drop.device)[drop], True)
            )
        gradient.masked_fill_(drop.view(gradient.shape), 0).div_(density)


def bernoulli(n: int, p: float, seed: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Return ``n`` independent booleans, each True with probability ``p`` rounded to a multiple of 2^-16, not below one.

    Four come from 64 random bits of PCG-64, whose sequence NumPy keeps from version to version: 0.6 ns each.

    Example:
        >>> bernoulli(8, 0.5, seed=0).tolist()
        [False, False, False, False, False, False, False, True]
    """
    drawn = np.empty(n, dtype=np.bool_)
    source = np.random.PCG64(seed)
    below = np.uint32(max(round(p * _LEVELS), 1))
    for begin in range(0, n, _AT_ONCE):
        out = drawn[begin : begin + _AT_ONCE]
        bits = np.asarray(source.random_raw(-(-len(out) // 4))).astype("<u8", copy=False).view("<u2")[: len(out)]
        np.less(bits, below, out=out) if below < _LEVELS else out.fill(True)
    return drawn
