"""Script: runs are stopped by real signals, again and again, at chosen moments, and go on from their newest checkpoint.

``python preemption_cases.py FOLDER RANKS [CASE ...]`` writes ``results.json``: case -> {"codes", "steps", "odd", "left"}: the
exit codes of the ranks at each stop, the steps of the checkpoints, where the end differs from that of a run that was never
stopped, and temporary files that were left. Each run is a process of its own for each rank.
"""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from forks import note, run_ranks
from lightning.pytorch import Callback, seed_everything
from little import Data, Little, differences, everything, save, trainer
from resume_cases import all_together, phases, score

from lightning_mask import Phase, PhaseUnfreeze, PruneMask
from lightning_mask.app.checkpoints import LastCheckpoint
from lightning_mask.app.newest import newest_checkpoint
from lightning_mask.callbacks import Preemption


@dataclass
class Moment:
    """Where a signal falls: into a hook (or "forward", the module's training step), at its ``turn``-th call from ``step`` on."""

    hook: str
    step: int = 0
    turn: int = 1
    names: tuple[str, ...] = ("SIGUSR1",)
    rank: int = 0


@dataclass
class Case:
    """What is trained, and the moments at which it is stopped, one after another."""

    callbacks: Callable[[], list[Any]]
    moments: list[Moment]
    net: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    every_n_steps: int | None = None


def plateau() -> list[Any]:
    until = {"monitor": "val/score", "patience": 2}
    return [PhaseUnfreeze([Phase(until, train=["head", "stem"], restore_best=True), Phase(train="blocks")])]


CASES: dict[str, Case] = {
    "phases": Case(
        phases,
        [
            Moment("on_fit_start"),
            Moment("on_train_start"),
            Moment("on_train_batch_start", 0, rank=1),
            Moment("on_masks_changed", 3),
            Moment("on_after_backward", 5, names=("SIGUSR2", "SIGTERM")),
            Moment("on_before_optimizer_step", 9),
        ],
        {"dropout": 0.1, "scheduled": True},
    ),
    "criteria, a ramp, batch norm and dropout": Case(
        all_together,
        [
            Moment("forward"),  # the first criterion's calibration
            Moment("on_masks_changing", 2),
            Moment("forward", 5, turn=2, rank=1),  # that of the phase that begins here
            Moment("on_train_batch_end", 7),
            Moment("on_train_batch_end", 10, rank=1),
        ],
        {"norm": "batch", "dropout": 0.2},
    ),
    "an accumulation window": Case(
        all_together,
        [
            Moment("on_train_batch_start", 2, turn=2),
            Moment("on_train_batch_end", 5, rank=1),
            Moment("on_before_optimizer_step", 8),
        ],
        {"dropout": 0.1},
        {"accumulate_grad_batches": 2, "max_steps": 17},
    ),
    "validation": Case(
        plateau,
        [
            Moment("on_validation_batch_start", 2),
            Moment("on_train_batch_end", 5),
            Moment("on_validation_start", 8, rank=1),
            Moment("on_train_epoch_end", 12),
            Moment("on_train_batch_start", 17),
        ],
        {"score": score, "norm": "batch", "dropout": 0.1},
        {"max_steps": 24, "val_check_interval": 3, "check_val_every_n_epoch": None},
    ),
    "epochs of one step": Case(
        plateau,
        [
            Moment("on_validation_batch_start", 2),
            Moment("on_after_backward", 4),
            Moment("on_validation_start", 7, rank=1),
        ],
        {"score": score, "dropout": 0.1},
        {"max_steps": -1, "max_epochs": 7, "limit_train_batches": 1},
    ),
    "a checkpoint being written": Case(
        lambda: [PruneMask(0.8, scope="blocks.*.lin.weight", start="1 steps", end="12 steps", every="3 steps")],
        [
            Moment("on_save_checkpoint", 2),
            Moment("on_save_checkpoint", 6, turn=2, rank=1),
            Moment("on_train_batch_end", 11),  # the last step of an epoch
            Moment("on_train_batch_start", 13, names=("SIGUSR1", "SIGUSR1", "SIGTERM")),
        ],
        {"dropout": 0.1},
        every_n_steps=2,
    ),
}
TWO = (
    "criteria, a ramp, batch norm and dropout",
    "an accumulation window",
    "validation",
    "a checkpoint being written",
)


class Sends(Callback):
    """Send this process a signal at a moment, and another one while the checkpoint of the stop is being written."""

    def __init__(self, moment: Moment) -> None:
        self.moment, self.turns, self.sent = moment, 0, False

    def at(self, hook: str, trainer: Any) -> None:
        moment = self.moment
        if self.sent and hook == "on_save_checkpoint":
            os.kill(os.getpid(), signal.SIGUSR1)
        if hook != moment.hook or trainer.global_step < moment.step or self.sent:
            return
        self.turns += 1
        if self.turns == moment.turn and trainer.global_rank == moment.rank % trainer.world_size:
            self.sent = True
            for name in moment.names:
                os.kill(os.getpid(), signal.Signals[name])


def _hook(name: str) -> Callable[..., None]:
    return lambda self, trainer, *_: self.at(name, trainer)


for _name in (
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_masks_changing",
    "on_masks_changed",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_start",
    "on_train_epoch_end",
    "on_save_checkpoint",
):
    setattr(Sends, _name, _hook(_name))


class Told(Little):
    """Tells the callback of each training step, also of those that a criterion asks for."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for callback in self.trainer.callbacks:
            if isinstance(callback, Sends):
                callback.at("forward", self.trainer)
        return super().training_step(batch, batch_idx)


def train(case: Case, ranks: int, folder: Path, moment: Moment | None, seed: int) -> None:
    """One start of the run, as a cluster would make it: from the newest checkpoint of the folder, if any."""
    start = newest_checkpoint(folder)
    seed_everything(1 if start is None else seed)
    module, callbacks = Told(**case.net), case.callbacks()
    extra = [] if moment is None else [Sends(moment)]
    keeps = [LastCheckpoint(str(folder), case.every_n_steps), Preemption(str(folder))]
    run = trainer(*callbacks, *extra, *keeps, ranks=ranks, **{"max_steps": 16, **case.arguments})
    before = signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)
    try:
        run.fit(module, datamodule=Data(), ckpt_path=None if start is None else str(start))
    finally:
        assert (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)) == before
    save(folder / f"end.{run.global_rank}.pt", everything(run, module, callbacks))


def main(root: Path, ranks: int, only: list[str]) -> None:
    """Do all cases."""
    results: dict[str, Any] = {}
    for name in only or (CASES if ranks == 1 else TWO):
        case = CASES[name]
        whole, folder = root / f"{name}-whole", root / name
        whole.mkdir()
        folder.mkdir()
        codes, steps, odd = [], [], []
        if any(run_ranks(ranks, train, case, ranks, whole, None, 1)):
            odd.append("the run that was not to be stopped failed")
        for number, moment in enumerate(case.moments):
            codes.append(run_ranks(ranks, train, case, ranks, folder, moment, 1 + 10 * number))
            newest = newest_checkpoint(folder)
            steps.append(0 if newest is None else torch.load(newest, weights_only=True)["global_step"])
        codes.append(run_ranks(ranks, train, case, ranks, folder, None, 99))
        for rank in range(ranks):
            one, other = (torch.load(f / f"end.{rank}.pt", weights_only=False) for f in (whole, folder))
            odd += differences(one, other, str(rank))
        left = [file.name for file in folder.iterdir() if file.name.startswith(".")]
        results[name] = {"codes": codes, "steps": steps, "odd": odd, "left": left}
        note(root / "results.json", results)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
