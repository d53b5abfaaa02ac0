"""Strategies that start their processes from within ``fit``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_nets import Net, changed, moved, names, weights
from ours import assert_equal, cells
from torch import Tensor

from lightning_mask import MaskSet

GROUP = "Processes started by `fit`"
SCRIPT = Path(__file__).with_name("launch_cases.py")
LEFT_BEHIND = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script left; one process for all cases."""
    folder = tmp_path_factory.mktemp("launched")
    env = {key: value for key, value in os.environ.items() if key not in LEFT_BEHIND} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def check(ours: str, folder: Path) -> dict[str, Tensor]:
    """The weights that came back to the process that called ``fit`` are exact by the masks that were written."""
    masks, net = MaskSet.load(folder / ours / "masks.safetensors"), Net()
    before = weights(net)
    net.load_state_dict(torch.load(folder / ours / "weights.pt", weights_only=True))
    after = weights(net)
    where = moved(before, after)
    if ours == "PruneMask":
        assert sum(int((~mask).sum()) for mask in masks.values()) == 144
        assert not any(bool(after[name].view(torch.int32)[~mask].any()) for name, mask in masks.items())
        assert changed(before, after) == names(net, "")
    else:
        assert not any(bool((where[name] & ~mask).any()) for name, mask in masks.items())
        assert changed(before, after) >= names(net, "head") | {"stem.weight"}
    return after


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine processes that import Lightning one after another
@cells(GROUP, '`strategy="ddp_notebook"`', "the weights that come back are exact")
def test_forked(ours: str, folder: Path) -> None:
    check(ours, folder / "ddp_notebook")


@pytest.mark.slow
@pytest.mark.timeout(900)  # nine processes that import Lightning one after another
@cells(GROUP, '`strategy="ddp_spawn"`', "the weights that come back are exact, and equal those of `ddp_notebook`")
def test_spawned(ours: str, folder: Path) -> None:
    assert_equal(check(ours, folder / "ddp_spawn"), check(ours, folder / "ddp_notebook"))
