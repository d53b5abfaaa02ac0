"""The ways of holding one tensor, by density."""

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_mask.core.holders import Holder, _Bits, _FewActive, _FewHeld, _Where

DENSITIES = (0.001, 0.005, 0.01, 0.03, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99)


def holders(rounds: int) -> list[dict[str, Any]]:
    """Time one masking of all gradients and one restore of all weights of a MiniLM, by density and way."""
    shapes = [(30522, 384)] + [(384, 384)] * 24 + [(1536, 384)] * 12
    tensors, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    rows = []
    for density in DENSITIES:
        masks = [torch.rand(shape) < density for shape in shapes]
        kinds: dict[str, Callable[[Tensor, Tensor], Holder]] = {
            "fill, where": _Where,
            "few active": _FewActive,
            "few held": _FewHeld,
            "bits, where": functools.partial(_Bits, mixed=False),
            "bits": functools.partial(_Bits, mixed=True),
        }
        ways = {name: [kind(t, m) for t, m in zip(tensors, masks, strict=True)] for name, kind in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                begin = time.perf_counter()
                for held, gradient in zip(ways[name], gradients, strict=True):
                    held.mask_gradient(gradient)
                for held, tensor in zip(ways[name], tensors, strict=True):
                    held.restore(tensor)
                times[name].append(time.perf_counter() - begin)
        rows.append({"density": density, **{f"{n} (ms)": statistics.median(t) * 1e3 for n, t in times.items()}})
    return rows
