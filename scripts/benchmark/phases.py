"""Steps of a run that unfreezes, and the time of a change of mask."""

import copy
import statistics
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from benchmark.model import BATCH, DENSITY, Classifier, Tokens
from benchmark.turns import WARM, Clock, Way, interleave, trainer_of
from benchmark.ways import LAST, phase_ways
from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask

OURS = "PhaseUnfreeze (ours)"
APART = 6
"""Steps between two changes of mask."""


def phases(base: Classifier, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time both phases of a run: the last layer and the head, then everything."""
    clocks = interleave(phase_ways((rounds + WARM) * steps), base, rounds, steps, phases=2)
    return phase_rows(clocks)


def phase_rows(clocks: dict[str, Clock]) -> list[dict[str, Any]]:
    return [
        {
            "way": name,
            "last layer + head ms": statistics.median(clock.turns_ms(0, 2)),
            "everything ms": statistics.median(clock.turns_ms(1, 2)),
            "optimizer MB": clock.state_bytes / 1e6,
            "gradient MB": clock.gradient_bytes / 1e6,
        }
        for name, clock in clocks.items()
    ]


def change_ways(changes: int) -> dict[str, Way]:
    """Runs of which the mask changes every ``APART`` steps."""
    alternating = [{"train": LAST}, {"train": "*"}]
    phases = [Phase(until=f"{(i + 1) * APART} steps", **alternating[i % 2]) for i in range(changes)]  # type: ignore[arg-type]
    last = Phase(**alternating[changes % 2])  # type: ignore[arg-type]
    every = f"{APART} steps"
    return {
        "FreezeMask draws a random mask anew": Way(
            lambda _: [FreezeMask(train="head", score="random", density=DENSITY, refresh=every)]
        ),
        "PruneMask goes a step up its ramp": Way(
            lambda _: [PruneMask(0.9, schedule="linear", start="0 steps", end=f"{changes * APART} steps", every=every)]
        ),
        "PhaseUnfreeze goes to its next phase": Way(lambda _: [PhaseUnfreeze([*phases, last])]),
    }


class StepTimes(Callback):
    """The seconds of every step, from the beginning of its batch to the beginning of the next one."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.stamps.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


def mask_changes(base: Classifier, changes: int) -> list[dict[str, Any]]:
    """What a change of mask costs: the time of the steps around it beyond that of the steps before and after."""
    rows = []
    for name, way in change_ways(changes).items():
        times = StepTimes()
        module = way.ready(copy.deepcopy(base))
        trainer = trainer_of([*way.callbacks(module), times], max_steps=(changes + 1) * APART)
        trainer.fit(module, DataLoader(Tokens(), batch_size=BATCH))
        costs = [change_cost(times.seconds, i * APART) for i in range(1, changes + 1)]
        rows.append(
            {
                "change": name,
                "ms": statistics.median(ms for ms, _ in costs),
                "steps": statistics.median(ms / step for ms, step in costs),
            }
        )
    return rows


def change_cost(seconds: list[float], step: int) -> tuple[float, float]:
    """Milliseconds of a change at ``step``, and of a step of the slower kind beside it.

    A new phase or a redrawn mask is put in force just before the step, which is still in the time of the step before; a
    pruning update is in the step. Both are counted, and the steps' own time is taken off.
    """
    before = statistics.median(seconds[step - APART + 2 : step - 1])
    after = statistics.median(seconds[step + 2 : step + APART - 1])
    cost = seconds[step - 1] - before + seconds[step] - after
    return cost * 1e3, max(before, after) * 1e3
