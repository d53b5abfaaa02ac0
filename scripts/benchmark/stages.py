"""Where the time of a training step goes, stage by stage."""

import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import Strategy

from benchmark.model import Classifier
from benchmark.turns import WARM, Way, interleave
from benchmark.ways import BY_HAND, FUSED, ByHand, step_ways, train_only
from lightning_mask.callbacks.session import Session
from lightning_mask.core import rows
from lightning_mask.core.compact import Compact
from lightning_mask.core.engine import MaskEngine

LOWEST = "encoder.embeddings.LayerNorm.bias"
FLOOR = "floor: no gradient of a weight, no optimizer"
"""Everything is held but the lowest tensor above the embeddings, so that backward goes all the way down and makes the
gradients of inputs alone. No mask over the linears can be cheaper, however few of their entries train."""

STAGES: list[tuple[str, type, str]] = [
    ("forward", Classifier, "training_step"),
    ("backward", Strategy, "backward"),
    ("mask", Compact, "gather"),
    ("mask", MaskEngine, "after_backward"),
    ("mask", MaskEngine, "_before_step"),
    ("mask", ByHand, "on_after_backward"),
    ("mask", rows._Hide, "__call__"),
    ("mask", rows.RowGradients, "__call__"),
    ("optimizer", Precision, "optimizer_step"),
    ("restore", MaskEngine, "_after_step"),
    ("restore", ByHand, "restore"),
    ("callbacks", Session, "before_batch"),
    ("callbacks", Session, "after_backward"),
    ("callbacks", Session, "before_step"),
    ("zero_grad", torch.optim.Optimizer, "zero_grad"),
    ("rest", Closure, "__call__"),
]
"""Name of the stage, and a method whose own time is part of it: that of the others which it calls is theirs."""

COLUMNS = list(dict.fromkeys(stage for stage, _, _ in STAGES))


class Stages(Callback):
    """Adds up the seconds of each stage of each step of one run.

    Args:
        length: Steps of one turn; the first one of each turn is not counted, nor are the first turns.
    """

    of_thread: ClassVar[dict[int, "Stages"]] = {}
    """The run that goes on in a thread."""

    def __init__(self, length: int) -> None:
        self.length, self.step = length, -1
        self.steps: list[dict[str, float]] = []
        self.spent = dict.fromkeys(COLUMNS, 0.0)
        self.inner: list[float] = []
        self.began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.of_thread[threading.get_ident()] = self

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.end_step()
        self.spent, self.step, self.began = dict.fromkeys(COLUMNS, 0.0), self.step + 1, time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end_step()

    def end_step(self) -> None:
        """Keep what the step took, if it counts."""
        if self.step >= WARM * self.length and self.step % self.length:
            total, self.spent["rest"] = time.perf_counter() - self.began, 0.0
            self.spent["rest"] = total - sum(self.spent.values())
            self.steps.append(self.spent)

    def call(self, stage: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function and count its own time for the stage."""
        self.inner.append(0.0)
        begin = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds = time.perf_counter() - begin
            self.spent[stage] += seconds - self.inner.pop()
            if self.inner:
                self.inner[-1] += seconds


@contextmanager
def watched() -> Iterator[None]:
    """Let the methods of all stages report to the run of their thread."""
    originals = [(owner, name, owner.__dict__[name]) for _, owner, name in STAGES]
    for stage, owner, name in STAGES:
        setattr(owner, name, _reporting(stage, owner.__dict__[name]))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _reporting(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def report(*arguments: Any, **named: Any) -> Any:
        run = Stages.of_thread.get(threading.get_ident())
        return run.call(stage, function, *arguments, **named) if run else function(*arguments, **named)

    return report


def profiled_ways() -> dict[str, Way]:
    """The ways that a goal compares, and the floor."""
    names = [
        FUSED,
        "ours",
        next(iter(BY_HAND)),
        list(BY_HAND)[-1],
        "linears trained whole, by hand",
        "linears, 1 % of the rows: ours",
        "last layer + head by hand",
        "last layer + head: ours",
    ]
    ways = step_ways()
    return {**{name: ways[name] for name in names}, FLOOR: Way(prepare=train_only(LOWEST))}


def profile(base: Classifier, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time the stages of a step in every way, in milliseconds; each is the median over all counted steps."""
    runs = {name: Stages(steps) for name in profiled_ways()}
    with watched():
        interleave(_with(profiled_ways(), runs), base, rounds, steps)
    return [{"way": name, **_medians(run.steps)} for name, run in runs.items()]


def _with(ways: Mapping[str, Way], runs: Mapping[str, Stages]) -> dict[str, Way]:
    """The same ways with one more callback each."""

    def more(way: Way, run: Stages) -> Way:
        return replace(way, callbacks=lambda module: [*way.callbacks(module), run])

    return {name: more(way, runs[name]) for name, way in ways.items()}


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    stages = {column: statistics.median(step[column] for step in steps) * 1e3 for column in COLUMNS}
    return {**stages, "step ms": statistics.median(sum(step.values()) for step in steps) * 1e3}
