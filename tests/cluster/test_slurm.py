"""A real SLURM of this machine: sbatch, srun and submitit start the ranks, and a job that a signal stopped goes on."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from lightning_mask import MaskSet
from tests.app.conftest import REPO, TINY, command

SCRIPTS = REPO / "scripts/slurm"
WORDS = [*TINY, "logger=none", "test=false"]


def reason_to_skip() -> str:
    """Why there can be no SLURM here; empty where there can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root can start a SLURM"
    if not (shutil.which("slurmctld") or shutil.which("apt-get")):
        return "SLURM is not installed, and there is no apt-get to install it with"
    return ""


pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip()),
]


class Cluster:
    """Commands on the cluster, run in a folder."""

    def __init__(self, folder: str) -> None:
        self.conf = f"{folder}/slurm.conf"

    def __call__(self, *words: str, cwd: Path, **variables: str) -> str:
        done = command(
            *words, cwd=cwd, SLURM_CONF=self.conf, PYTHON=sys.executable, OMP_NUM_THREADS="1", **variables
        )  # fmt: skip
        said = "".join(file.read_text() for file in sorted(cwd.rglob("*.out")))
        assert done.returncode == 0, done.stdout + said
        return done.stdout

    def state(self, job: str, cwd: Path) -> dict[str, str]:
        said = self("scontrol", "show", "job", job, cwd=cwd)
        return dict(re.findall(r"(\w+)=(\S*)", said))

    def wait(self, job: str, until: Callable[[dict[str, str]], Any], cwd: Path, seconds: float = 400) -> dict[str, str]:
        end = time.monotonic() + seconds
        while not until(state := self.state(job, cwd)):
            said = "".join(file.read_text() for file in cwd.glob("*.out"))
            assert time.monotonic() < end, f"{state}\n{said}"
            assert state["JobState"] not in ("FAILED", "CANCELLED", "TIMEOUT"), said
            time.sleep(0.2)
        return state

    def start_again(self, job: str, cwd: Path) -> None:
        """Start a job that was requeued within seconds; SLURM itself would keep it back for two minutes.

        Within the second in which the first try ended, a node takes the second one for it and refuses to start it ("Job
        credential revoked"), and the job fails.
        """
        self.wait(job, lambda state: state["Restarts"] == "1" and state["JobState"] != "COMPLETING", cwd)
        (cwd / "hold").unlink()
        self("scontrol", "update", f"JobId={job}", "StartTime=now+2", cwd=cwd)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="slurm-")  # a short name: a socket's must be
    script = str(SCRIPTS / "local_cluster.sh")
    up = subprocess.run(["bash", script, "up", folder], capture_output=True, text=True, check=False)
    assert up.returncode == 0, up.stdout + up.stderr
    daemons = [int(file.read_text()) for file in Path(folder, "run").glob("*.pid")]
    yield Cluster(folder)
    subprocess.run(["bash", script, "down", folder], check=True)
    assert len(daemons) == 4
    assert not any(map(runs, daemons))
    shutil.rmtree(folder)


# Holds training at its sixth step until a signal came, or the file "hold" is gone; without that file, not at all.
HOLDS = dedent(
    """
    import os
    import time
    from pathlib import Path
    from lightning.pytorch import Callback
    from lightning_mask.callbacks.signals import told


    class Holds(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5 and Path("hold").exists():
                Path(f"there-{os.environ['SLURM_JOB_ID']}-{trainer.global_rank}").touch()
                while Path("hold").exists() and not told():
                    time.sleep(0.05)
    """
)
HELD = "+callbacks.holds._target_=holds.Holds"


@pytest.fixture
def code(tmp_path: Path) -> dict[str, str]:
    """Variables with which a job finds the callback that holds it."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/holds.py").write_text(HOLDS)
    return {"PYTHONPATH": str(tmp_path / "code")}


def held_jobs(folder: Path, ranks: int) -> list[str]:
    """Wait until so many ranks are held; return their jobs."""
    end = time.monotonic() + 400
    while len(there := list(folder.glob("there-*"))) < ranks:
        assert time.monotonic() < end, [file.read_text() for file in folder.rglob("*.out")]
        time.sleep(0.2)
    return sorted({file.name.split("-")[1] for file in there}, key=int)


def test_a_job_that_was_stopped_or_displaced_goes_on_and_ends_as_one_that_was_not(
    cluster: Cluster, tmp_path: Path, code: dict[str, str]
) -> None:
    words = [str(SCRIPTS / "train.sbatch"), *TINY, "mask=mask_then_lift", "trainer.max_steps=10", "test=false"]
    words += [HELD, "optimizer=adamw"]
    plain, stopped, displaced = folders = [tmp_path / name for name in ("plain", "stopped", "displaced")]
    for folder in folders:
        folder.mkdir()
    cluster("sbatch", "--wait", *words, cwd=plain, **code)
    for folder in (stopped, displaced):
        (folder / "hold").touch()
        cluster("sbatch", *words, cwd=folder, **code)
        (job,) = held_jobs(folder, 2)
        if folder == stopped:
            cluster("scancel", "--signal=USR1", job, cwd=folder)
        else:  # by a job that takes the whole machine
            everything = ["--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--exclusive", "--wrap=true"]
            cluster("sbatch", *everything, cwd=folder)
        cluster.start_again(job, folder)
        cluster.wait(job, lambda state: state["JobState"] == "COMPLETED", folder)

    ends = []
    for folder in folders:
        (run,) = (folder / "logs/smoke/runs").iterdir()
        summary = json.loads((run / "summary.json").read_text())
        assert summary["world_size"] == 2
        assert summary["hosts"] == {socket.gethostname(): 2}
        assert summary["mask"]["steps"] == 10
        assert [phase["step"] for phase in summary["mask"]["phases"]] == [0, 5]
        assert summary["mask"]["held_changed"] == 0
        assert not (run / "errors").exists()
        last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
        masks = MaskSet.load(run / "masks.safetensors").hash()
        ends.append({"weights": last["state_dict"], "moments": last["optimizer_states"], "masks": masks})
    for folder, end in zip((stopped, displaced), ends[1:], strict=True):
        assert_equal(ends[0], end, folder.name)
        said = next(folder.glob("lightning_mask-*.out")).read_text()
        assert said.count("stopped by SIGUSR1 at step 6") == 1
        assert said.count("going on from") == 1


def assert_equal(left: Any, right: Any, where: str = "") -> None:
    """Compare nested values, tensors bit by bit."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_equal(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{where}.{index}")
    else:
        assert left == right, where


def test_srun_starts_a_rank_on_each_of_two_nodes_that_share_a_model(cluster: Cluster, tmp_path: Path) -> None:
    where = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, str(REPO / "scripts/train.py")]
    said = cluster(*where, *WORDS, "trainer=fsdp_cpu", "devices=1", "num_nodes=2", cwd=tmp_path)
    assert said.count("What trains and what is held") == said.count("The run") == 1
    (run,) = (tmp_path / "logs/smoke/runs").iterdir()
    assert re.fullmatch(r"job-\d+-[0-9a-f]{4}", run.name)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["mask"]["held_changed"] == 0


def test_a_sweep_runs_as_jobs_of_two_tasks_each_and_one_that_is_stopped_goes_on(
    cluster: Cluster, tmp_path: Path, code: dict[str, str]
) -> None:
    words = ["--multirun", *WORDS, "launcher=slurm", "trainer=ddp_cpu", "hydra.sweep.dir=sweep", "seed=0,1", HELD]
    words += ["hydra.launcher.partition=urgent", "trainer.max_steps=8"]
    (tmp_path / "hold").touch()
    with ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(cluster, sys.executable, str(REPO / "scripts/train.py"), *words, cwd=tmp_path, **code)
        _, one = held_jobs(tmp_path, 4)  # the other's number is that of the whole array
        cluster("scancel", "--signal=USR2", one, cwd=tmp_path)  # as SLURM does before the time is up
        cluster.start_again(one, tmp_path)
        sweep.result()
    said = "".join(file.read_text() for file in (tmp_path / "sweep/.submitit").rglob("*_log.out"))
    assert said.count("stopped by SIGUSR2 at step 6") == 1
    assert said.count("going on from") == 1
    for seed in (0, 1):
        summary = json.loads((tmp_path / f"sweep/{seed}/summary.json").read_text())
        assert summary["world_size"] == 2
        assert summary["seed"] == seed
        assert summary["mask"]["steps"] == 8
        assert summary["ckpt_path"] == "auto"
        assert summary["mask"]["held_changed"] == 0
    (script,) = (tmp_path / "sweep/.submitit").rglob("*_submission.sh")
    asked = script.read_text()
    for line in ("--array=0-1%2", "--ntasks-per-node=2", "--nodes=1", "--partition=urgent", "--requeue", "--time=1440"):
        assert f"#SBATCH {line}\n" in asked
    assert "gpus" not in asked
