"""G6: a run killed after a checkpoint and resumed in a fresh process ends as one that was never stopped, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forks import clean_environment
from resume_cases import CASES, TWO

SCRIPT = Path(__file__).with_name("resume_cases.py")
RUNS = [(1, name, step) for name, case in CASES.items() for step in case.kills]
RUNS += [(2, name, step) for name in TWO for step in CASES[name].kills]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """One script for one rank, one for two, at the same time; each makes a fresh process for every run."""
    folders = {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}
    environment = clean_environment()
    scripts = {
        ranks: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(ranks)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for ranks, folder in folders.items()
    }
    found = {}
    try:
        for ranks, script in scripts.items():
            output, _ = script.communicate()
            file = folders[ranks] / "results.json"
            assert file.exists(), output[-3000:]
            found[ranks] = json.loads(file.read_text())
    finally:
        for script in scripts.values():
            script.kill()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "name", "step"), RUNS)
def test_a_killed_run_resumes_as_if_it_had_never_stopped(
    results: dict[int, Any], ranks: int, name: str, step: int
) -> None:
    case = results[ranks][name]
    assert "whole" not in case, case
    assert case[str(step)] == []


@pytest.mark.slow
def test_when_a_rank_dies_the_other_ends_with_an_error_and_the_run_resumes(results: dict[int, Any]) -> None:
    seen = results[2]["a rank dies"]
    other, killed = seen["codes"]
    assert killed == -9
    assert other not in (0, -9), "neither went on nor had to be killed"
    assert seen["last"] == "7"
    assert seen["again"] == [0, 0]
    assert seen["odd"] == []


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 10])
def test_a_checkpoint_of_two_ranks_resumes_on_one_with_the_same_masks_and_phases(
    results: dict[int, Any], step: int
) -> None:
    assert results[2]["two ranks to one"][str(step)] == []
