"""One process among many: who started it, what it leaves behind when it fails."""

import os
import socket
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from lightning_mask.core.files import whole_file


def place() -> tuple[int, int]:
    """Return this process's rank and the number of ranks, as torchrun or srun said; (0, 1) where neither started it."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if _tasks() > 1 and "SLURM_STEP_ID" in os.environ:
        return int(os.environ["SLURM_PROCID"]), _tasks()
    return 0, 1


def is_first() -> bool:
    """Whether this is the first process of a job, also where Lightning starts the others; known before any process group."""
    return place()[0] == 0 and all(
        os.environ.get(name, "0") == "0" for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK")
    )


def check_started() -> None:
    """Refuse to train in the batch script of a SLURM job of several tasks: the other ranks would never come.

    Raises:
        ValueError: If srun did not start this process there.
    """
    if _tasks() > 1 and "SLURM_STEP_ID" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            f"This is a SLURM job of {_tasks()} tasks, and srun did not start this process: put srun before the command, use "
            "scripts/slurm/train.sbatch, or ask sbatch for one task."
        )


def _tasks() -> int:
    """Number of tasks of a SLURM job, as Lightning sees it: it takes no account of jobs of these names."""
    return 1 if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive") else int(os.environ.get("SLURM_NTASKS", 1))


def words_of_rank(words: Sequence[str]) -> list[str]:
    """Return Hydra's words with the one that this rank adds: of many ranks in one folder, each has a log of its own.

    It comes before the first override: Hydra takes no overrides on both sides of an option.
    """
    rank, _ = place()
    own = [f"hydra.job.name=rank-{rank}"] if rank else []
    first = next((i for i, word in enumerate(words) if "=" in word and not word.startswith("-")), len(words))
    return [*words[:first], *own, *words[first:]]


def keep_failure(error: BaseException, about_input: bool) -> None:
    """Write a failure's traceback to ``errors/rank-<n>.txt`` in the run's folder, and hand it to torchrun, which prints it.

    Args:
        error: What ended this rank.
        about_input: Whether the user is told in one line. Then torchrun has nothing to add, and of a single process nothing
            is written.
    """
    if not about_input:
        get_error_handler().record_exception(error)
    if not HydraConfig.initialized() or (about_input and place()[1] == 1):
        return
    rank = rank_zero_only.rank  # type: ignore[attr-defined]  # Lightning sets it
    now = datetime.now().isoformat(timespec="milliseconds")
    head = f"rank {rank} on {socket.gethostname()}, process {os.getpid()}, {now}\n\n"
    try:
        with whole_file(Path(HydraConfig.get().runtime.output_dir) / "errors" / f"rank-{rank}.txt") as file:
            file.write_text(head + "".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        pass  # the folder is what failed; the error itself is told all the same
