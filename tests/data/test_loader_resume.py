"""A run that stops and resumes sees exactly the batches that an uninterrupted one sees, and ends with equal weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from loader_cases import check

SCRIPT = Path(__file__).with_name("loader_cases.py")


def run(root: Path, devices: int, cases: list[dict]) -> list[str]:
    command = [sys.executable, str(SCRIPT), str(root), str(devices), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [finding for rank in range(devices) for finding in json.loads((root / f"findings{rank}.json").read_text())]


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"peek": True, "by_length": True},
        {"mid_step": True},
        {"sanity": 2, "trainer": {"accumulate_grad_batches": 2, "val_check_interval": 4}},
        {"trainer": {"limit_train_batches": 7, "limit_val_batches": 0}},
        {"trainer": {"reload_dataloaders_every_n_epochs": 1}},
    ],
    ids=["plain", "a criterion reads meanwhile", "saved in mid-step", "accumulation", "limited epoch", "reloaded"],
)
def test_every_checkpoint_resumes_exactly(tmp_path: Path, case: dict) -> None:
    assert check(tmp_path, 1, case) == []


def test_with_worker_processes(tmp_path: Path) -> None:
    assert check(tmp_path, 1, {"workers": 1, "epochs": 2, "batch_size": 15}) == []


def test_two_processes_and_another_number_of_them(tmp_path: Path) -> None:
    cases = [{"trainer": {"accumulate_grad_batches": 2}, "peek": True, "by_length": True}]
    assert run(tmp_path / "two", 2, cases) == []
    # Saved on the last batch of an epoch and resumed with longer ones, Lightning takes the next epoch for begun.
    resume = [
        {"resume": str(path), "whole_last_epoch": path.name != "epoch=1-step=6.ckpt"}
        for path in sorted((tmp_path / "two/0").glob("*epoch=1*.ckpt"))
    ]
    assert len(resume) == 4
    assert run(tmp_path / "one", 1, resume) == []

    assert check(tmp_path / "alone", 1, {"epochs": 2}) == []
    resume = [
        {"resume": str(tmp_path / f"alone/epoch=1-step={step}.ckpt"), "whole_last_epoch": True} for step in (12, 20)
    ]
    assert run(tmp_path / "more", 2, resume) == []
