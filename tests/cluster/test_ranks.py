"""Two ranks of torchrun: what they leave behind, what is said of one that fails, and what they must have in common."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from lightning_mask.app.ranks import check_started, is_first, place, words_of_rank
from tests.app.conftest import REPO, TINY, command

TWO = [*TINY, "trainer=ddp_cpu", "logger=none", "test=false"]
FAILS = dedent(
    """
    import time
    from lightning.pytorch import Callback


    class Fails(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 1 and trainer.global_rank == 1:
                raise RuntimeError("out of luck")

        def on_exception(self, trainer, *_):
            if trainer.global_rank == 0:  # torchrun knows by whole seconds which of two failed first
                time.sleep(2)
    """
)


def torchrun(script: str, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash as two ranks; ``$RANK`` tells them apart, ``"$@"`` are the words."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    return command(
        *launcher, "bash", "-c", script, "train", *words, cwd=cwd, OMP_NUM_THREADS="1", **environment
    )  # fmt: skip


def train(repo: Path | str = REPO) -> str:
    return f'exec {sys.executable} {repo}/scripts/train.py "$@"'


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run on two ranks, and what it printed."""
    where = tmp_path_factory.mktemp("trained")
    done = torchrun(train(), *TWO, "devices=2", cwd=where)
    assert done.returncode == 0, done.stdout
    (run,) = (where / "logs/smoke/runs").iterdir()
    return run, done.stdout


@pytest.mark.slow
def test_the_first_rank_speaks_for_all_and_the_summary_says_where_they_ran(trained: tuple[Path, str]) -> None:
    run, printed = trained
    for once in ("What trains and what is held", "FreezeMask: ", "The run", "Starting with 2 processes"):
        assert printed.count(once) == 1, once
    assert "GLOBAL_RANK" not in printed
    assert {file.name for file in run.iterdir()} >= {".hydra", "checkpoints", "masks.safetensors", "summary.json"}
    assert not list(run.glob("rank-*"))
    assert not (run / "errors").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["hosts"] == {socket.gethostname(): 2}
    steps, batch = summary["mask"]["steps"], 64
    most = 2 * batch / summary["mask"]["seconds_per_step"]
    assert 2 * batch * steps / summary["seconds"]["fit"] < summary["examples_per_second"] < 1.5 * most


@pytest.mark.slow
def test_a_rank_that_fails_leaves_its_traceback_and_torchrun_names_it(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    bad = ["mask=head", "+callbacks.bad._target_=fails.Fails", "hydra.run.dir=run"]
    done = torchrun(train(), *TWO, *bad, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    text = (tmp_path / "run/errors/rank-1.txt").read_text()
    assert text.startswith(f"rank 1 on {socket.gethostname()}, process ")
    assert "fails.py" in text
    assert text.endswith("RuntimeError: out of luck\n")
    root_cause = done.stdout.partition("Root Cause")[2]
    assert "RuntimeError: out of luck" in root_cause
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.slow
def test_ranks_that_run_other_code_are_refused(tmp_path: Path) -> None:
    for name in ("lightning_mask", "conf", "scripts"):
        shutil.copytree(REPO / name, tmp_path / "other" / name)
    shutil.copy(REPO / "pyproject.toml", tmp_path / "other")
    with (tmp_path / "other/lightning_mask/core/norms.py").open("a") as file:
        file.write("# changed on one machine\n")
    done = torchrun(f"[ $RANK = 0 ] || {train(tmp_path / 'other')}; {train()}", *TWO, "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode != 0
    host = socket.gethostname()
    assert (
        f"error: Ranks 1 on {host} differ from rank 0 on {host} in the code of lightning_mask. Install" in done.stdout
    )
    left = [
        file.read_text() for file in (tmp_path / "run/errors").iterdir()
    ]  # torchrun may end one before it has written
    assert left
    assert all("differ from rank 0" in text for text in left)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_ranks_that_go_on_from_other_masks_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    checkpoint = torch.load(trained[0] / "checkpoints/last.ckpt", weights_only=True)
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        torch.save(checkpoint, tmp_path / rank / "one.ckpt")
        (state,) = (s for name, s in checkpoint["callbacks"].items() if name.startswith("FreezeMask"))
        flipped = next(item for item in state["masks"]["masks"].values() if isinstance(item["bits"], torch.Tensor))
        flipped["bits"][0] ^= 1
    words = [*TWO, "ckpt_path=one.ckpt", "trainer.max_steps=6", f"hydra.run.dir={tmp_path}/run"]
    done = torchrun(f"cd $RANK; {train()}", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "The masks of a checkpoint: rank 1 holds another mask than rank 0 in net." in done.stdout
    assert f"(on {socket.gethostname()} and {socket.gethostname()})" in done.stdout


@pytest.mark.slow
def test_ranks_that_found_other_checkpoints_are_refused(trained: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    shutil.copytree(trained[0] / "checkpoints", tmp_path / "0/run/checkpoints")
    words = [*TWO, "ckpt_path=auto", "trainer.max_steps=6", "hydra.run.dir=run"]
    done = torchrun(f"cd $RANK; {train()}", *words, cwd=tmp_path)
    assert done.returncode != 0
    assert "in the checkpoint to go on from. Keep the run's folder where all machines see it" in done.stdout
    assert not (tmp_path / "1/run/checkpoints").exists()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables, and those of launchers to nothing."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)

    def set_them(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_them


def test_a_job_of_several_tasks_without_srun_is_refused(environment: Callable[..., None]) -> None:
    check_started()
    environment(SLURM_JOB_ID="7", SLURM_JOB_NAME="train", SLURM_NTASKS="2", SLURM_PROCID="0")
    with pytest.raises(ValueError, match="put srun before the command"):
        check_started()
    environment(SLURM_STEP_ID="0")
    check_started()


def test_other_ranks_than_the_first_have_a_log_of_their_own(environment: Callable[..., None]) -> None:
    words = ["-m", "seed=0,1", "mask=head"]
    assert words_of_rank(words) == words
    environment(SLURM_JOB_NAME="train", SLURM_NTASKS="2", SLURM_STEP_ID="0", SLURM_PROCID="0")
    assert words_of_rank(words) == words
    environment(SLURM_PROCID="1")
    assert words_of_rank(words) == ["-m", "hydra.job.name=rank-1", *words[1:]]
    assert words_of_rank([]) == ["hydra.job.name=rank-1"]


def test_the_first_process_is_known_whoever_started_it(environment: Callable[..., None]) -> None:
    environment(NODE_RANK="0", GROUP_RANK="0")
    assert is_first()
    environment(LOCAL_RANK="1")  # by Lightning
    assert not is_first()
    environment(LOCAL_RANK="0", NODE_RANK="1")
    assert not is_first()
    environment(NODE_RANK="0", TORCHELASTIC_RUN_ID="7", RANK="2", WORLD_SIZE="4", GROUP_RANK="0")
    assert (place(), is_first()) == ((2, 4), False)
    environment(RANK="0")
    assert is_first()
