import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

REPO = Path(__file__).resolve().parents[2]
CONF = REPO / "conf"
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("hydra", "local", "__pycache__")
}
TINY = ["experiment=smoke", "callbacks.progress.refresh_rate=0", "trainer.max_steps=4", "trainer.val_check_interval=2"]


@pytest.fixture(autouse=True)
def _no_command_line_is_left() -> Iterator[None]:
    """Take back what a command line that ran in this process set for the process: Hydra's config, and its logging."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    root.handlers[:] = handlers  # Hydra's write to this test's output, which is closed then
    root.setLevel(level)
    for logger in (logging.getLogger(), *logging.Logger.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Compose the root config with overrides; the run's folder is the test's own."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_module("lightning_mask.conf", version_base="1.3"):
            return compose("train", overrides=[f"paths.output_dir={tmp_path / 'run'}", *overrides])

    return make


def command(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; standard error goes where standard output goes."""
    env = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "HYDRA_FULL_ERROR", "PYTHON_FOR_VENV")}
    return subprocess.run(
        [*words],
        cwd=cwd,
        env={**env, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def train_command(*overrides: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run scripts/train.py in a process of its own."""
    return command(sys.executable, str(REPO / "scripts/train.py"), *overrides, cwd=cwd, **environment)
