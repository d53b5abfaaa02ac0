"""Pre-emption: stopped by signals at awkward moments, a run ends as one that was never stopped, bit for bit (G6)."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig

from lightning_mask.app.train import train
from lightning_mask.callbacks import Preemption
from lightning_mask.callbacks.signals import listening, request_requeue, told
from tests.app.conftest import TINY
from tests.distributed.forks import clean_environment

HERE = Path(__file__).parent
SCRIPT = HERE / "preemption_cases.py"
CASES = {
    "phases": [1],
    "criteria, a ramp, batch norm and dropout": [1, 2],
    "an accumulation window": [1, 2],
    "validation": [1, 2],
    "epochs of one step": [1],
    "a checkpoint being written": [1, 2],
}
RUNS = [(name, ranks) for name, numbers in CASES.items() for ranks in numbers]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """All cases on one rank and on two; each start of a run is a fresh process per rank."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(folder), str(ranks)],
            env=clean_environment() | {"PYTHONPATH": str(HERE.parent / "distributed")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        found[ranks] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), RUNS)
def test_a_run_that_signals_stop_again_and_again_ends_as_one_that_was_never_stopped(
    results: dict[int, Any], name: str, ranks: int
) -> None:
    seen = results[ranks][name]
    assert seen["odd"] == []
    assert seen["left"] == []
    *stops, end = seen["codes"]
    assert end == [0] * ranks
    # Lightning watches the processes that it starts and kills their first one when another fails: that one alone ends with 75.
    assert [75, 0][:ranks] in stops
    assert all(stop in ([75, 0][:ranks], [0] * ranks) for stop in stops)
    assert len(set(seen["steps"])) >= len(stops) - 1, "it was stopped at different steps"
    assert sorted(seen["steps"]) == seen["steps"]


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_save(results: dict[int, Any]) -> None:
    assert results[1]["phases"]["steps"][:2] == [0, 0]


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({"SLURM_JOB_ID": "12"}, "12"),
        ({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "3"}, "10_3"),
    ],
)
def test_slurm_is_asked_to_requeue_the_job_or_the_task_of_an_array(
    variables: dict[str, str], job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert request_requeue() == f"job {job} was requeued"
    assert (tmp_path / "asked").read_text() == f"requeue {job}\n"
    scontrol.write_text("#!/bin/sh\necho no such job >&2\nexit 1\n")
    assert request_requeue() == f"job {job} could not be requeued (no such job): start it again with ckpt_path=auto"


class SignalsItself(Callback):
    """Before training, or behind its second step."""

    def __init__(self, before: bool) -> None:
        self.before = before

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.before:
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)


def test_a_job_whose_tries_all_end_before_their_first_step_is_not_requeued_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol, asked = tmp_path / "scontrol", tmp_path / "asked"
    scontrol.write_text(f"#!/bin/sh\necho x >> {asked}\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_ID", "12")

    def requeues(before: bool) -> int:
        own = [SignalsItself(before), Preemption(str(tmp_path / "run"))]
        trainer = Trainer(
            max_steps=4, callbacks=own, logger=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", limit_val_batches=0, default_root_dir=tmp_path,
            plugins=[LightningEnvironment()],
        )  # fmt: skip
        with pytest.raises(SystemExit):
            trainer.fit(BoringModel())
        return asked.read_text().count("x")

    assert [requeues(before) for before in (True, True, True, True, False)] == [1, 2, 3, 4, 5], "one came to a step"
    assert [requeues(before=True) for _ in range(6)] == [6, 7, 8, 9, 9, 10], (
        "but for the fifth; a person may start it again"
    )


def test_signals_do_again_what_they_did_before() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with listening(["SIGUSR1", "SIGTERM"]):
        with listening(["SIGUSR1"]):
            os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert told() == ["SIGUSR1", "SIGTERM"]
    assert told() == []
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_is_no_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="SIGNOTHING"):
        Preemption(signals=["SIGNOTHING"])
    with pytest.raises(ValueError, match="SIGKILL"):
        Preemption(signals=["SIGKILL"])
    with pytest.raises(ValueError, match="SIGUSR2, which is not among"):
        Preemption(signals=["SIGUSR1"], requeue=["SIGUSR2"])


@pytest.mark.slow
def test_a_signal_between_the_trials_of_mask_auto_stops_the_choice_which_then_goes_on(
    config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    cut = [f"~mask.candidates.{name}" for name in ("none", "random", "bitfit", "gradient", "magnitude")]
    words = [
        *TINY,
        "mask=auto",
        *cut,
        "mask.steps=3",
        "mask.eta=2",
        "mask.minutes=60",
        "mask.rates=[1,10]",
        "test=false",
    ]
    words += ["mask.densities=[0.01]", "logger=none", "report=null", "ckpt_path=auto"]
    unfinished, ended = tmp_path / "run/auto_trials.json", threading.Event()

    def send() -> None:
        while not ended.wait(0.01):
            if unfinished.exists():
                os.kill(os.getpid(), signal.SIGUSR1)
                return

    sender, cfg = threading.Thread(target=send), config(*words)
    with listening(["SIGUSR1"]):
        sender.start()
        try:
            with pytest.raises(SystemExit) as stopped:
                train(cfg)
        finally:
            ended.set()
            sender.join()
    assert stopped.value.code == 75
    assert unfinished.exists()
    assert not (tmp_path / "run/auto.json").exists()
    train(config(*words))
    assert (tmp_path / "run/auto.json").exists()
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
