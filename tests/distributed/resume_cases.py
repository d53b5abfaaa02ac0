"""Script: every case is trained without a stop, then killed by SIGKILL after a checkpoint and resumed, each in a fresh process.

``python resume_cases.py FOLDER RANKS`` writes ``results.json``: case -> step of the checkpoint -> list of differences.
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
from lightning.pytorch.callbacks import ModelCheckpoint
from little import Data, Little, differences, everything, save, trainer

from lightning_mask import FreezeMask, GradientMask, Phase, PhaseUnfreeze, PruneMask


@dataclass
class Case:
    """What is trained, and the steps after whose checkpoint the run is killed."""

    callbacks: Callable[[], list[Any]]
    kills: list[int]
    net: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    every: str = "step"
    parts: tuple[str, ...] = ("model", "optimizer", "schedulers", "masks", "history", "steps")


def phases() -> list[Any]:
    return [
        PhaseUnfreeze(
            [
                Phase("4 steps", train="head", warmup="3 steps"),
                Phase("8 steps", train=["head", "blocks.1"], lr_scale={"head": 0.5}, warmup="3 steps"),
                Phase("11 steps", train=["stem"]),
                Phase(lr_scale=0.5),
            ]
        )
    ]


def all_together() -> list[Any]:
    return [
        FreezeMask(["head", "blocks.1"], score="fisher", density=0.3, scope=["stem", "blocks.0"], batches=2),
        PruneMask(0.6, scope="blocks.1.lin.weight", start="2 steps", end="11 steps", every="2 steps"),
        PhaseUnfreeze(
            [
                Phase("5 steps"),
                Phase("9 steps", train=["head", "blocks.1"], score="gradient", density=30, batches=3, warmup="2 steps"),
                Phase(train="blocks", lr_scale={"blocks.0": 0.5}),
            ]
        ),
    ]


def lottery() -> list[Any]:
    ticket = Phase(train="head", score="change", density=40, restart=True, lr_scale=0.5, warmup="3 steps")
    return [PruneMask(0.3, scope="blocks.*.lin.weight", end="10 steps"), PhaseUnfreeze([Phase("8 steps"), ticket])]


SCORES = [3.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0]


def score(epoch: int, rank: int) -> float:
    return SCORES[epoch] + rank


def plateau() -> list[Any]:
    until = {"monitor": "val/score", "patience": 2}
    return [PhaseUnfreeze([Phase(until, train=["head", "stem"], restore_best=True), Phase(train="blocks")])]


CASES: dict[str, Case] = {
    "phases and warm-up": Case(phases, [3, 4, 5, 10], {"dropout": 0.1, "scheduled": True}),
    "pruning ramp": Case(
        lambda: [PruneMask(0.8, scope="blocks.*.lin.weight", start="1 steps", end="12 steps", every="3 steps")],
        [4, 5, 9],
    ),
    "all together, batch norm and dropout": Case(all_together, [3, 5, 6, 9], {"norm": "batch", "dropout": 0.2}),
    "accumulation": Case(all_together, [3, 5, 7], {"dropout": 0.1}, {"accumulate_grad_batches": 2, "max_steps": 13}),
    "random masks drawn anew": Case(
        lambda: [
            FreezeMask(score="random", density=0.3, refresh="3 steps", seed=4),
            PruneMask(0.2, score="random", scope="stem.weight", start="2 steps", end="4 steps", every="1 steps"),
        ],
        [3, 7],
        {"dropout": 0.1},
    ),
    "a phase drawn anew": Case(
        lambda: [
            PhaseUnfreeze(
                [Phase("5 steps", train="head"), Phase(score="random", density=50, refresh="2 steps", seed=9)]
            )
        ],
        [4, 6],
    ),
    "plateau and going back": Case(
        plateau, [6, 10, 14, 18], {"score": score, "norm": "batch", "dropout": 0.1}, {"max_steps": 24}
    ),
    "plateau, checkpoints after validation": Case(
        plateau,
        [8, 12, 16],
        {"score": score, "norm": "batch", "dropout": 0.1},
        {"max_steps": -1, "max_epochs": 6},
        every="epoch",
    ),
    "set, rig and rewind": Case(
        lambda: [
            PruneMask(0.5, scope="stem.weight", regrow="random", start="1 steps", end="12 steps", every="2 steps"),
            PruneMask(
                0.6, scope="blocks.0.lin.weight", regrow="gradient", start="1 steps", end="12 steps", every="2 steps"
            ),
            PruneMask(
                0.7, scope="blocks.1.lin.weight", rewind="2 steps", start="2 steps", end="11 steps", every="3 steps"
            ),
        ],
        [2, 5, 8],
    ),
    "straight through, movement and a lottery ticket": Case(
        lambda: [
            PruneMask(0.5, scope="stem.weight", regrow="ste", start="1 steps", end="9 steps", every="2 steps"),
            PruneMask(
                0.6, score="movement", scope="blocks.0.lin.weight", start="2 steps", end="11 steps", every="3 steps"
            ),
            PruneMask(
                {"blocks.1": 0.7},
                schedule="geometric",
                rewind="1 steps",
                start="3 steps",
                end="12 steps",
                every="4 steps",
            ),
        ],
        [2, 4, 7, 10],
        {"dropout": 0.1, "scheduled": True},
    ),
    "lottery": Case(lottery, [4, 7, 8, 9, 12], {"norm": "batch", "dropout": 0.1}),
    "gradient mask": Case(lambda: [GradientMask(0.5, scope=["*", "!head"]), *phases()], [3, 6], {"dropout": 0.1}),
    "plain loader, between epochs": Case(all_together, [4, 8], {"dropout": 0.2}, data={"plain": True}),
    "plain loader, in mid-epoch": Case(
        lambda: [*phases(), PruneMask(0.5, scope="stem.weight", score="random", start="10 steps", schedule="constant")],
        [3, 11],
        data={"plain": True},
        parts=("masks", "history", "steps"),
    ),
}
TWO = [
    "phases and warm-up",
    "all together, batch norm and dropout",
    "accumulation",
    "plateau, checkpoints after validation",
    "lottery",
    "straight through, movement and a lottery ticket",
]


class Kill(Callback):
    """Kill this very process when the checkpoint of that step is there; no clean-up of any kind."""

    def __init__(self, folder: Path, step: int) -> None:
        self.file = folder / f"{step}.ckpt"

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.file.exists():
            trainer.strategy.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


class Die(Callback):
    """Rank 1 is killed in the middle of a step, between backward and the optimizer; rank 0 knows nothing of it."""

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def saving(case: Case, folder: Path) -> ModelCheckpoint:
    """A checkpoint after every optimizer step, or where Lightning saves by itself: when a validation ends."""
    often: dict[str, Any] = {"every_n_train_steps": 1} if case.every == "step" else {"every_n_epochs": 1}
    return ModelCheckpoint(folder, "{step}", save_top_k=-1, auto_insert_metric_name=False, **often)


def train(case: Case, ranks: int, folder: Path, out: str, seed: int, extra: list[Any], ckpt: str | None = None) -> None:
    seed_everything(seed)
    module, callbacks = Little(**case.net), case.callbacks()
    run = trainer(*callbacks, *extra, ranks=ranks, **{"max_steps": 16, **case.arguments})
    run.fit(module, datamodule=Data(**case.data), ckpt_path=ckpt)
    save(folder / f"{out}.{run.global_rank}.pt", everything(run, module, callbacks))


def compare(case: Case, ranks: int, folder: Path, resumed: str) -> list[str]:
    odd: list[str] = []
    for rank in range(ranks):
        one = torch.load(folder / f"whole.{rank}.pt", weights_only=False)
        other = torch.load(folder / f"{resumed}.{rank}.pt", weights_only=False)
        odd += [d for part in case.parts for d in differences(one[part], other[part], f"{rank}/{part}")]
    return odd


def dies(root: Path) -> dict[str, Any]:
    """Needs what the case of that name left: its uninterrupted run."""
    name = "all together, batch norm and dropout"
    case, folder = CASES[name], root / name.replace(" ", "_")
    codes = run_ranks(2, train, case, 2, folder, "died", 1, [saving(case, folder / "died"), Die()])
    last = max((folder / "died").glob("*.ckpt"), key=lambda file: int(file.stem))
    again = run_ranks(2, train, case, 2, folder, "alive", 99, [saving(case, folder / "unused")], str(last))
    return {"codes": codes, "last": last.stem, "again": again, "odd": compare(case, 2, folder, "alive")}


def main(root: Path, ranks: int) -> None:
    results: dict[str, Any] = {}
    for name in CASES if ranks == 1 else TWO:
        case, folder = CASES[name], root / name.replace(" ", "_")
        folder.mkdir()
        found: dict[str, Any] = {}
        codes = run_ranks(ranks, train, case, ranks, folder, "whole", 1, [saving(case, folder / "unused")])
        if any(codes):
            results[name] = {"whole": [f"exit codes {codes}"]}
            continue
        for step in case.kills:
            killed = folder / f"killed{step}"
            codes = run_ranks(
                ranks, train, case, ranks, folder, "killed", 1, [saving(case, killed), Kill(killed, step)]
            )
            if codes != [-signal.SIGKILL] * ranks or not (killed / f"{step}.ckpt").exists():
                found[str(step)] = [f"the run to be killed ended with {codes}"]
                continue
            ckpt = str(killed / f"{step}.ckpt")
            codes = run_ranks(
                ranks, train, case, ranks, folder, f"resumed{step}", 99, [saving(case, folder / "unused")], ckpt
            )
            if any(codes):
                found[str(step)] = [f"the resumed run ended with {codes}"]
                continue
            found[str(step)] = compare(case, ranks, folder, f"resumed{step}")
        results[name] = found
    if ranks == 2:
        results["two ranks to one"] = fewer(root)
        results["a rank dies"] = dies(root)
    note(root / "results.json", results)


def fewer(root: Path) -> dict[str, Any]:
    """A checkpoint of two ranks, resumed on one: the same masks, phases and held entries."""
    name = "phases and warm-up"
    case, folder = CASES[name], root / name.replace(" ", "_")
    found: dict[str, Any] = {}
    for step in (3, 10):
        codes = run_ranks(
            1, train, case, 1, folder, f"one{step}", 5, [], str(folder / f"killed{step}" / f"{step}.ckpt")
        )
        if any(codes):
            found[str(step)] = [f"exit codes {codes}"]
            continue
        whole = torch.load(folder / "whole.0.pt", weights_only=False)
        one = torch.load(folder / f"one{step}.0.pt", weights_only=False)
        odd = [d for part in ("masks", "history", "steps") for d in differences(whole[part], one[part], part)]
        found[str(step)] = odd
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
