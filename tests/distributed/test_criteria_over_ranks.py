"""G5: a criterion means the same over ranks as over all their batches in one process, with sharded parameters too."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import clean_environment
from torch import Tensor

from lightning_mask.core.criteria import CRITERIA

SCRIPT = Path(__file__).with_name("criteria_cases.py")
SCORES = sorted({*CRITERIA} - {"head_activation"})  # the network has no heads; it sums as activation does
REFUSED = {
    "synflow": "synflow runs the network with other weights, which sharded",
    "grasp": "grasp needs gradients of gradients, which sharded parameters do not",
    "fisher_per_example": "fisher_per_example needs gradients of single examples, and those of sharded parameters",
}
Found = dict[str, dict[str, dict[str, Tensor]]]
SUMMED = {"gradient": 0.5, "wanda": 0.5**0.5}
"""A sum over a rank's batches, averaged over two ranks, is half of that over all; wanda takes the root of one."""
JOINED = {"wanda": 0.5**0.5}
"""A batch of a sharded run is that of all ranks together; the inputs are summed by each rank all the same."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("criteria")
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {file.stem: torch.load(file, weights_only=True) for file in folder.glob("*.pt")}


def assert_ranks_agree(found: Found, score: str, ranks: str, alone: str, factor: dict[str, float]) -> None:
    for name, value in found[alone][score].items():
        first, second = (found[f"{ranks}{rank}"][score][name] for rank in (0, 1))
        assert torch.equal(first, second), name
        if score != "fisher_sampled":  # each rank draws labels of its own
            torch.testing.assert_close(first, value * factor.get(score, 1.0), rtol=5e-5, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("score", SCORES)
def test_two_ranks_score_as_one_process_with_all_their_batches(found: Found, score: str) -> None:
    assert_ranks_agree(found, score, "rank", "one", SUMMED)


@pytest.mark.slow
@pytest.mark.parametrize("score", sorted({*SCORES} - {*REFUSED}))
def test_sharded_parameters_are_scored_as_whole_ones(found: Found, score: str) -> None:
    assert_ranks_agree(found, score, "sharded", "joined", JOINED)


@pytest.mark.slow
def test_what_sharded_parameters_cannot_give_is_said(found: Found) -> None:
    for score, said in REFUSED.items():
        assert said in str(found["sharded0"][score])
