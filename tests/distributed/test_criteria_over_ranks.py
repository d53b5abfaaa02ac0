"""G5: a criterion that looks at data means the same over ranks as over all their batches in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import clean_environment
from torch import Tensor

from lightning_mask.core.criteria import CRITERIA

SCRIPT = Path(__file__).with_name("criteria_cases.py")
Found = dict[str, dict[str, Tensor]]
OF_DATA = sorted(
    {*CRITERIA} - {"random", "magnitude", "magnitude_lowest", "spectral", "snr", "change"} - {"last_layers"}
)
OF_DATA.remove("first_layers")
FACTOR = {"gradient": 0.5, "wanda": 0.5**0.5}
"""A sum over a rank's batches, averaged over two ranks, is half of that over all; wanda takes the root of one."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found]:
    folder = tmp_path_factory.mktemp("criteria")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(folder / f"{name}.pt", weights_only=True) for name in ("one", "rank0", "rank1"))
    return one, first, second


@pytest.mark.slow
@pytest.mark.parametrize("score", OF_DATA)
def test_two_ranks_score_as_one_process_with_all_their_batches(found: tuple[Found, Found, Found], score: str) -> None:
    one, first, second = (scores[score] for scores in found)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        if score != "fisher_sampled":  # each rank draws labels of its own
            torch.testing.assert_close(first[name], value * FACTOR.get(score, 1.0), rtol=2e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_the_cases_are_all_the_criteria_that_look_at_data(found: tuple[Found, Found, Found]) -> None:
    assert [sorted(scores) for scores in found] == [OF_DATA] * 3
