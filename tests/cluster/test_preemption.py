"""Pre-emption: stopped by signals at awkward moments, a run ends as one that was never stopped, bit for bit (G6)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forks import clean_environment

HERE = Path(__file__).parent
SCRIPT = HERE / "preemption_cases.py"
CASES = (
    "phases",
    "criteria, a ramp, batch norm and dropout",
    "an accumulation window",
    "validation",
    "epochs of one step",
    "a checkpoint being written",
)


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
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        found[ranks] = json.loads((folder / "results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", CASES)
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
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_before_the_first_step_there_is_nothing_to_save(results: dict[int, Any], ranks: int) -> None:
    assert results[ranks]["phases"]["steps"][:2] == [0, 0]
