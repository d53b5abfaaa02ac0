"""Schedules: sparsity as a function of progress; ramps: when it is raised; and moments: points in training."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_mask.core.allocation import share

SCHEDULES: dict[str, Callable[[float, float], float]] = {
    # Sparsity at progress t in [0, 1] of a ramp that ends at s in [0, 1).
    "constant": lambda t, s: s,
    "linear": lambda t, s: s * t,
    # Zhu and Gupta, "To prune, or not to prune" (2017), equation (1) with initial sparsity 0.
    "cubic": lambda t, s: s * (1.0 - (1.0 - t) ** 3),
    # Half a cosine: slow at both ends.
    "cosine": lambda t, s: s * (1.0 - math.cos(math.pi * t)) / 2.0,
    # The same share of what is alive at every update: Frankle and Carbin, "The Lottery Ticket Hypothesis" (2019), section 1,
    # where after round i of n the density is (1 - s)^(i / n).
    "geometric": lambda t, s: 1.0 - (1.0 - s) ** t,
}


def schedule(name: str) -> Callable[[float, float], float]:
    """Return the schedule of that name: progress in [0, 1] and the final sparsity to the sparsity.

    Raises:
        ValueError: If there is none.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r} is unknown; there are {', '.join(sorted(SCHEDULES))}.")
    return SCHEDULES[name]


@dataclass(frozen=True)
class Ramp:
    """When sparsity is raised, and how far.

    Attributes:
        start: Optimizer step of the first update.
        end: Of the last one, at which the final sparsity is reached.
        every: Steps between updates.
        schedule: Name of how the sparsity grows.
    """

    start: int
    end: int
    every: int
    schedule: str

    def last_update(self, step: int) -> tuple[int, float] | None:
        """Return the step of the update that is in force at ``step`` and its progress in [0, 1]; None before ``start``."""
        if step < self.start:
            return None
        updated = self.end if step >= self.end else step - (step - self.start) % self.every
        return updated, (updated - self.start) / (self.end - self.start) if self.end > self.start else 1.0

    @property
    def updates(self) -> int:
        """Number of updates from ``start`` to ``end``."""
        return 1 + -(-(self.end - self.start) // self.every)

    def sparsity(self, final: float, progress: float) -> float:
        """Return the sparsity at ``progress`` of a ramp to ``final``."""
        return schedule(self.schedule)(progress, final)


@dataclass(frozen=True)
class Run:
    """What a moment is measured against.

    Attributes:
        total_steps: Optimizer steps of the whole run; ``inf`` when it has no end.
        steps_per_epoch: Optimizer steps of an epoch; ``inf`` when unknown.
        debug: Whether it is cut short on purpose (``fast_dev_run``), so that moments beyond its end are no mistake.
        optimizers: How many optimizers step, by hand if several; each one's steps count, and how many a batch has is
            up to the user, so that there is no telling the steps of an epoch or of the run.
    """

    total_steps: float
    steps_per_epoch: float
    debug: bool = False
    optimizers: int = 1


@dataclass(frozen=True)
class Moment:
    """A point in training, counted from its start in optimizer steps: ``"500 steps"``, ``"2 epochs"``, ``"30%"``."""

    value: float
    unit: str

    def __str__(self) -> str:
        number = str(int(self.value)) if self.value == int(self.value) else str(self.value)
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"

    @classmethod
    def parse(cls, text: Any, argument: str) -> "Moment":
        """Read a moment.

        Raises:
            ValueError: If ``text`` is not one.
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|steps?|epochs?)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"{argument}={text!r} must be a moment such as '500 steps', '2 epochs' or '30%'.")
        value, unit = float(match[1]), match[2].rstrip("s") + ("s" if match[2] != "%" else "")
        if unit == "%" and value > 100:
            raise ValueError(f"{argument}={text!r} lies beyond the end of the run; give at most '100%'.")
        if unit == "steps" and value != int(value):
            raise ValueError(f"{argument}={text!r} must be a whole number of steps.")
        return cls(value, unit)

    def steps(self, run: Run, argument: str) -> int:
        """Return the moment as a number of optimizer steps since the start of training.

        Raises:
            ValueError: If the run has no end (percent) or no known epoch length (epochs), or several optimizers.
        """
        if self.unit == "steps" or self.value == 0:
            return int(self.value)
        if run.optimizers > 1:
            raise ValueError(
                f"{argument}={str(self)!r} cannot be counted in a run of {run.optimizers} optimizers, each of whose steps "
                "counts one; give a number of steps."
            )
        length = run.total_steps if self.unit == "%" else run.steps_per_epoch
        if not math.isfinite(length):
            need = "max_steps or max_epochs" if self.unit == "%" else "a training loader with a length"
            raise ValueError(
                f"{argument}={str(self)!r} needs a run with an end: set {need}, or give a number of steps."
            )
        return share(self.value / 100, int(length)) if self.unit == "%" else share(self.value, int(length))


@dataclass(frozen=True)
class Plateau:
    """The moment when a logged metric stops improving.

    Attributes:
        monitor: Name of the metric.
        patience: Checks without improvement that end the phase.
        mode: ``"min"`` or ``"max"``: what an improvement is.
        min_delta: An improvement must be larger than this.
    """

    monitor: str
    patience: int = 2
    mode: str = "min"
    min_delta: float = 0.0

    @classmethod
    def parse(cls, given: Mapping[str, Any], argument: str) -> "Plateau":
        """Read a plateau from a mapping.

        Raises:
            ValueError: If a key is unknown or missing, or a value out of range.
        """
        known = {"monitor", "patience", "mode", "min_delta"}
        odd = sorted(set(given) - known)
        if odd or "monitor" not in given:
            what = f"has the unknown key {odd[0]!r}" if odd else "lacks the key 'monitor'"
            raise ValueError(f"{argument}={dict(given)!r} {what}; a plateau has {', '.join(sorted(known))}.")
        plateau = cls(**given)
        if plateau.mode not in ("min", "max"):
            raise ValueError(f"{argument}: mode={plateau.mode!r} must be 'min' or 'max'.")
        number = isinstance(plateau.min_delta, float | int) and plateau.min_delta >= 0  # nan is not
        if not isinstance(plateau.patience, int) or plateau.patience < 1 or not number:
            raise ValueError(
                f"{argument}: patience must be a whole number from 1 and min_delta at least 0, got {given!r}."
            )
        return plateau

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best`` by more than ``min_delta``; nan never is."""
        if math.isnan(value):
            return False
        if best is None:
            return True
        return value < best - self.min_delta if self.mode == "min" else value > best + self.min_delta


def parse_until(until: Any, argument: str) -> Moment | Plateau | None:
    """Read what ends a phase: a moment, a plateau, or nothing."""
    if until is None:
        return None
    return Plateau.parse(until, argument) if isinstance(until, Mapping) else Moment.parse(until, argument)
