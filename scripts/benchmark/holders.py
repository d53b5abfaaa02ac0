"""The ways of holding one tensor: by density, and by size where whole rows are active."""

import functools
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmark.model import BATCH, TOKENS
from lightning_mask.core import engine
from lightning_mask.core.holders import Holder, _Bits, _FewActive, _FewHeld, _Where

WIDTHS = (16, 32, 48, 64, 96, 128, 192, 384)
SHARE = 8
"""One in so many rows is active."""

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


def lines(rounds: int) -> list[dict[str, Any]]:
    """Time a training step of one square Linear of which some rows are active, as rows and entry by entry, in us.

    ``LINES_FROM`` of the compact engine is the size from which the first way is taken.
    """
    rows = []
    for width in WIDTHS:
        steps = {"as rows": _step_of_a_linear(width, 0), "entry by entry": _step_of_a_linear(width, width**2 + 1)}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(10 * rounds):
            for name in random.sample(list(steps), len(steps)):
                begin = time.perf_counter()
                for _ in range(5):
                    steps[name]()
                times[name].append((time.perf_counter() - begin) / 5)
        medians = {f"{name} (us)": statistics.median(each) * 1e6 for name, each in times.items()}
        rows.append({"shape": f"{width} x {width}", "entries": width**2, **medians})
    return rows


def _step_of_a_linear(width: int, lines_from: int) -> Callable[[], None]:
    """A training step on as many tokens as a batch of the benchmark has; whole lines are taken from that size on."""
    model = nn.Linear(width, width, bias=False)
    mask = (torch.arange(width) % SHARE == 0)[:, None].expand(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    usual, engine.LINES_FROM = engine.LINES_FROM, lines_from
    try:
        held = engine.MaskEngine(model, optimizer, {"weight": mask}, engine="compact", early=True)
    finally:
        engine.LINES_FROM = usual
    x = torch.randn(BATCH * TOKENS, width, requires_grad=True)

    def step() -> None:
        model(x).sum().backward()
        held.after_backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
