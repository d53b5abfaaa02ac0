"""Masks of gradients alone, drawn anew for each step: a regulariser, which holds nothing."""

from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mask.core.criteria import named_seed
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.sharding import first_entry

_AT_ONCE = 1 << 15
"""So many entries of a tensor in a CPU's memory are drawn and masked before the next, while they are in its cache."""

_LEVELS = 1 << 16
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_gradients(engine: MaskEngine, optimizer: Optimizer, names: Collection[str], density: float, seed: int) -> None:
    """Write 0 over the gradient of each active entry with probability ``1 - density``, and divide the others by ``density``.

    So the gradient's mean stays what it is: ``E[g * m / p] = g`` for ``m ~ Bernoulli(p)``. Call it once a step, after
    ``engine.after_backward()``; the optimizer then goes on as ever, its moments and weight decay too. The draw depends on
    the seed, the tensor's name and the entry's place among those that train, and not on how they are held; of a sharded
    tensor each rank draws for its part.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-F, 2021), the task-free variant, with the
    scale of its code.

    Args:
        engine: Knows what the optimizer takes as the gradient of each tensor.
        optimizer: One of the engine's; the gradients of its tensors are masked.
        names: Names of the parameters to mask.
        density: In (0, 1], the probability of each gradient to stay; to within 2^-17, and 2^-16 at least.
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
        flat = gradient.reshape(-1)
        values = flat if active is None else flat.index_select(0, active)
        _mask(values, density, named_seed(seed, f"{name} from {first_entry(engine.model.get_parameter(name))}"))
        if active is not None:
            flat.index_copy_(0, active, values)
        if not gradient.is_contiguous():
            gradient.copy_(flat.view(gradient.shape))


def _mask(values: Tensor, density: float, seed: int) -> None:
    """Mask a vector in place; on its bits, as ``0 * inf`` is nan, and ``where`` guesses its branches wrong."""
    integer = _INTEGER[values.element_size()]
    at_once = _AT_ONCE if values.device.type == "cpu" else max(len(values), 1)
    for part, drawn in zip(values.split(at_once), _draws(len(values), density, seed, at_once), strict=False):
        bits = torch.from_numpy(drawn).to(values.device).to(integer).neg_()  # True is -1, all bits set
        part.view(integer).bitwise_and_(bits)
        part.div_(density)


def _draws(n: int, p: float, seed: int, at_once: int) -> Iterator[np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """Yield ``n`` independent booleans, ``at_once`` (a multiple of 4) at a time, True with probability ``p``.

    Four come from 64 random bits of PCG-64, whose sequence NumPy keeps from version to version.
    """
    source, below = np.random.PCG64(seed), max(round(p * _LEVELS), 1) - 1
    for begin in range(0, n, at_once):
        count = min(at_once, n - begin)
        bits = np.asarray(source.random_raw(-(-count // 4))).astype("<u8", copy=False).view("<u2")[:count]
        yield bits <= np.uint16(below)
