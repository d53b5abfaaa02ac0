"""What all ranks of a run must have in common, compared once at the start."""

import hashlib
import socket
from functools import cache
from pathlib import Path

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

import lightning_mask
from lightning_mask.app.newest import name_and_step
from lightning_mask.core.distributed import gather

_START = "the checkpoint to go on from"


class SameRun(Callback):
    """Refuse to run when ranks composed different configs, run different code, or found different checkpoints to go on from.

    Differing configs come of a sweeper that runs once per rank, or of settings of one machine; differing code of a host that
    has another version installed; differing checkpoints of hosts that do not share the run's folder. Masks are compared by
    the mask callbacks whenever they change.

    Args:
        cfg: The composed config of this rank.

    Raises:
        ValueError: On every rank, before the model is touched, naming ranks, their hosts and what differs.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self._facts = {**digests(cfg), **versions()}
        self.hosts = [socket.gethostname()]
        """Name of each rank's machine; of this one alone until :meth:`setup`."""
        self.start: str | None = None
        """Checkpoint that training goes on from, set before it begins."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare with the other ranks."""
        start = {_START: name_and_step(self.start)} if stage == "fit" else {}
        ranks = gather((socket.gethostname(), self._facts | start))
        self.hosts = [host for host, _ in ranks]
        facts = [each for _, each in ranks]
        odd = [rank for rank, other in enumerate(facts) if other != facts[0]]
        if not odd:
            return
        names = dict.fromkeys(name for rank in odd for name in {*facts[0], *facts[rank]})
        differing = sorted(n for n in names if any(facts[rank].get(n) != facts[0].get(n) for rank in odd))
        if set(differing) & set(versions()):
            way_out = "Install the same on all machines."
        elif differing == [_START]:
            way_out = "Keep the run's folder where all machines see it, with paths.log_dir=... or hydra.run.dir=..."
        else:
            way_out = (
                "A sweep was started once per rank, or a machine has settings of its own: give the sweeper a seed, or start it "
                "without torchrun or srun."
            )
        raise ValueError(
            f"{_named(odd, self.hosts)} differ from rank 0 on {self.hosts[0]} in {', '.join(differing)}. {way_out}"
        )


def digests(cfg: DictConfig) -> dict[str, str]:
    """Return a hash of each block of a composed config, but for the paths, which may differ among machines."""
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {
        str(name): hashlib.sha256(repr(block).encode()).hexdigest()[:16]
        for name, block in content.items()
        if name != "paths"
    }


@cache
def versions() -> dict[str, str]:
    """Return what code this process runs: of this package, which may be a changed checkout, its version and its files' hash."""
    return {
        "the code of lightning_mask": f"{lightning_mask.__version__} {_source()}",
        "the version of torch": torch.__version__,
        "the version of lightning": lightning.__version__,
    }


def _source() -> str:
    folder, content = Path(lightning_mask.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        content.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return content.hexdigest()[:16]


def _named(ranks: list[int], hosts: list[str], most: int = 8) -> str:
    """Return ranks with their hosts, the first few of many.

    Example:
        >>> _named([1, 3], ["a", "a", "b", "b"])
        'Ranks 1 on a, 3 on b'
    """
    named = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks[:most])
    return f"Ranks {named}" + (f" and {len(ranks) - most} more" if len(ranks) > most else "")
