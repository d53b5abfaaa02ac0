"""What is logged of the masks, and what the report of a run finds out and keeps."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from mask_nets import Net, Watch, fit

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged(accumulate: int, tmp_path: Path) -> None:
    net = Net()
    phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train=["head", "stem"])])
    prune = PruneMask(0.5, scope="stem.weight", start="5 steps", schedule="constant")
    logger = CSVLogger(str(tmp_path), name="", version="")
    steps = 8
    fit(
        net,
        phases,
        prune,
        max_steps=steps,
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    lines = Path(tmp_path, "metrics.csv").read_text().splitlines()
    rows = [r for r in csv.DictReader(lines) if r.get("mask/active")]
    by_step = {int(r["step"]): r for r in rows}
    assert set(by_step) == set(range(steps))
    for step, row in by_step.items():
        active = 26 if step < 3 else 26 + 108 if step <= 5 else 26 + 108 - 48
        total = sum(p.numel() for p in net.parameters())
        assert float(row["mask/active"]) == active, step
        assert float(row["mask/density"]) == pytest.approx(active / total)
        assert float(row["mask/phase"]) == (step >= 3)
        assert float(row["mask/sparsity"]) == (0.0 if step <= 5 else 0.5)


@pytest.mark.parametrize("what", ["whole", "whole after a phase", "part", "nothing"])
def test_the_report_finds_a_change_behind_our_back(what: str) -> None:
    class Tamper(Watch):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if what == "part":
                pl_module.head.weight.data[0, 0] += 1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if what == "whole" and trainer.global_step == 2:
                pl_module.stem.weight.data[3, 3] += 1
            if what == "whole after a phase" and trainer.global_step == 2:
                pl_module.stem.bias.data[:2] += 1

    net, report = Net(), RunReport()
    ours: Any = FreezeMask(score="random", density=1, scope="head.weight")
    if what == "whole after a phase":
        ours = PhaseUnfreeze([Phase("5 steps", train="head"), Phase()])
    if what == "part":
        ours = FreezeMask(score="magnitude", density=1, scope="head.weight")
    fit(net, ours, Tamper(), report)
    expected = {"whole": 1, "whole after a phase": 2, "part": 1, "nothing": 0}[what]
    assert report.results()["held_changed"] == expected


def test_the_report_knows_the_bytes_of_the_optimizers_state() -> None:
    net, report = Net(), RunReport()
    fit(net, FreezeMask("head"), report)
    tensors, entries = len(list(net.head.parameters())), sum(p.numel() for p in net.head.parameters())
    numbers = 2 * entries + tensors  # two moments, and a count for each tensor
    assert report.results()["optimizer_bytes"] == 4 * numbers


@pytest.mark.parametrize(
    ("ours", "most"),
    [
        (FreezeMask("head"), 26),
        (PhaseUnfreeze([Phase("3 steps", train="head"), Phase("5 steps", train="stem"), Phase(train="head")]), 108),
        (PruneMask(0.5, scope="stem.weight", schedule="constant"), 494 - 48),  # before the first step
        (PruneMask(0.5, scope="stem.weight", start="3 steps", schedule="constant"), 494),
    ],
)
def test_the_report_knows_how_many_entries_trained_at_most(ours: Any, most: int) -> None:
    net, report = Net(), RunReport()
    assert sum(p.numel() for p in net.parameters()) == 494
    fit(net, ours, report)
    assert report.results()["most_active"] == most


def test_the_report_raises_no_false_alarm() -> None:
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    net, report = Net(value=lambda epoch: scores[epoch]), RunReport("out")
    until = {"monitor": "val/score", "patience": 2}
    phases = PhaseUnfreeze(
        [
            Phase(until, score="random", density=0.5, refresh="3 steps", restore_best=True),
            Phase(train="stem"),
        ]
    )
    prune = PruneMask(0.5, scope="stem.weight", start="9 steps", end="11 steps", every="1 steps", rewind="1 steps")
    fit(net, phases, prune, report, val=True, max_epochs=6, limit_train_batches=2)
    facts = report.results()
    assert facts["held_changed"] == 0
    assert facts["held_checked"] > 300
    assert facts["sparsity"] == 0.5
    assert [entry["step"] for entry in facts["phases"]] == [0, 8]
    saved = MaskSet.load("out/masks.safetensors")
    assert saved.count() == facts["active"]
    assert torch.equal(saved["stem.weight"], prune.masks["stem.weight"])
