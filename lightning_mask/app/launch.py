"""From a command line to jobs, of one process or several: what Lightning's DDP launcher needs under Hydra, and the folder
that all ranks share."""

import argparse
import functools
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch import Trainer
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from lightning_mask.app import errors
from lightning_mask.app.ranks import is_first
from lightning_mask.core.files import whole_file

RUN = "LIGHTNING_MASK_RUN"
_LAUNCHER_SETS = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Not for a child: it runs the one job that it is given, whatever the sweep was.
_OF_THE_SWEEP = (
    "hydra.sweep",
    "hydra.mode",
    "hydra.run.",
    "hydra.job.",
    "hydra.output_subdir",
    "hydra/sweeper",
    "hydra/launcher",
    "hydra.launcher",
)


def config_path() -> str:
    """Return where Hydra finds the configs: the folder of the checkout that this file lies in, else the package of a wheel.

    Another checkout may be the one that is installed, and its configs need not go with this code.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "conf/train.yaml").is_file() and (checkout / "pyproject.toml").is_file():
        return str(checkout / "conf")
    return "pkg://lightning_mask.conf"


def run(job: Callable[[DictConfig], Any], config_name: str, words: Sequence[str] | None = None) -> None:
    """Run a Hydra application; bad input ends it as :mod:`lightning_mask.app.errors` says.

    While Hydra reads its words, they are all of this process's command line, ``sys.argv``; in a job it is whole again, with
    the subcommand that they followed, so that the ranks that Lightning starts with it are of the same program.

    Args:
        job: What is done with a composed config.
        config_name: Name of the root config.
        words: Hydra's words; None: the whole command line.
    """
    command = sys.argv

    @functools.wraps(job)
    def with_whole_command(cfg: DictConfig) -> Any:
        sys.argv = command
        with errors.task():
            return job(cfg)

    if words is not None:
        sys.argv = [command[0], *words]
    try:
        errors.run(
            hydra.main(version_base="1.3", config_path=config_path(), config_name=config_name)(with_whole_command)
        )
    finally:
        sys.argv = command


def subcommand(argv: Sequence[str]) -> list[str]:
    """Return the words between the program and Hydra's, none of which is a name alone.

    Example:
        >>> subcommand(["lightning-mask", "train", "mask=head"]), subcommand(["train.py", "-m", "mask=head"])
        (['train'], [])
    """
    return list(takewhile(str.isidentifier, argv[1:]))


@contextmanager
def one_job() -> Iterator[None]:
    """Run one job so that the processes Lightning starts for it run the same one, and leave nothing behind for the next.

    Lightning starts the other ranks with this process's command line. In a sweep that is the command of the whole sweep:
    each rank would draw hyper-parameters of its own. Here the command line is, while the job runs, the job's own. Afterwards
    the process group is closed and the variables that the launcher set are taken back, else the next job of a sweep would
    believe that its ranks are there already.
    """
    argv, environment = sys.argv, {name: os.environ.get(name) for name in (*_LAUNCHER_SETS, "OMP_NUM_THREADS")}
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        config: Any = HydraConfig.get()
        with read_write(config), open_dict(config):
            config.run.dir = config.runtime.output_dir
        sys.argv = job_command(argv, config.job.config_name, config.overrides.task, config.overrides.hydra)
    try:
        yield
    finally:
        sys.argv = argv
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def all_ranks_end(trainer: Trainer) -> Iterator[None]:
    """End the processes that Lightning started for a run when the run fails here: they would wait for this one for ever.

    Unless the input is to blame, which all of them say alike, they have five seconds to tell what went wrong with them.
    """
    try:
        yield
    except BaseException as error:
        started: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
        ranks = [process for process in started if isinstance(process, subprocess.Popen)]
        started.clear()  # else Lightning, which watches them, would end this process, too
        until = time.monotonic() + (0 if errors.is_about_input(error) else 5)
        for process in ranks:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0, until - time.monotonic()))
            process.kill()
            process.wait()
        raise


def job_command(argv: Sequence[str], config_name: str, task: Sequence[str], hydra: Sequence[str]) -> list[str]:
    """Return the command line of one job of a sweep.

    Args:
        argv: Command line of the sweep.
        config_name: Name of the root config.
        task: The job's overrides.
        hydra: The sweep's overrides of Hydra itself; those about the sweep are left out.

    Example:
        >>> job_command(["app", "train", "-m", "seed=1,2", "hydra.verbose=true"], "train", ["seed=1"], ["hydra.verbose=true"])
        ['app', 'train', '--config-name=train', 'seed=1', 'hydra.verbose=true', 'hydra.mode=RUN']
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    given, _ = parser.parse_known_args(list(argv[1:]))
    places = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items() if value is not None]
    kept = [override for override in hydra if not override.lstrip("+~").startswith(_OF_THE_SWEEP)]
    return [argv[0], *subcommand(argv), f"--config-name={config_name}", *places, *task, *kept, "hydra.mode=RUN"]


def keep_config(cfg: DictConfig) -> None:
    """Write the composed config of a Hydra job into ``.hydra`` of its folder, on the first rank.

    Hydra itself would do it before the folder is known to be free, over what the job that is at work there has written.

    Args:
        cfg: The config; ``paths.output_dir`` is the folder.
    """
    if not HydraConfig.initialized() or not is_first():
        return
    words = OmegaConf.create(list(HydraConfig.get().overrides.task))
    for name, content in (("config", cfg), ("hydra", HydraConfig.instance().cfg), ("overrides", words)):
        with whole_file(Path(cfg.paths.output_dir) / f".hydra/{name}.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(content), encoding="utf-8")


def agree_on_run() -> None:
    """Give all ranks of torchrun, and all tries of a requeued SLURM job, one folder: each would stamp its own time otherwise.

    Several commands in one SLURM job get one each. Sets ``LIGHTNING_MASK_RUN`` unless it is set.
    """
    if RUN in os.environ:
        return
    if "SLURM_JOB_ID" in os.environ and "SLURM_PROCID" in os.environ:
        words = hashlib.sha256("\0".join(sys.argv[1:]).encode()).hexdigest()[:4]
        os.environ[RUN] = f"job-{os.environ['SLURM_JOB_ID']}-{words}"
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(minutes=1))
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        os.environ[RUN] = store.compare_set("lightning_mask/run", "", stamp).decode()
