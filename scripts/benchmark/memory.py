"""Peak memory of a run, of a ranking, and the size of a mask file."""

import logging
import multiprocessing
import os
import resource
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from benchmark.model import BATCH, DENSITY, THREADS, Tokens, load, random_masks
from benchmark.turns import Way, trainer_of
from lightning_mask import MaskSet
from lightning_mask.core.criteria import Context
from lightning_mask.core.ranking import top_k
from lightning_mask.core.selection import Selection, select

STEPS = 4


def peaks_mb(make_ways: Callable[..., Mapping[str, Way]], *arguments: Any) -> dict[str, list[float]]:
    """Peak resident memory of a few steps in every way, in MB beyond the model, each in a process of its own.

    Two figures for each way: up to the last step, and with what is done when training has ended.

    A fresh process loads the model and forks once for every way, with one thread until then; a fork's peak begins at what
    is resident when it starts. ``make_ways`` is called there, so it must be a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_fork_for_each, args=(theirs, make_ways, arguments))
    process.start()
    theirs.close()
    try:
        peaks: dict[str, list[float]] = ours.recv()
    except EOFError:
        raise RuntimeError("The process that measures peak memory failed; its error stands above.") from None
    process.join()
    return peaks


def _fork_for_each(to: Connection, make_ways: Callable[..., Mapping[str, Way]], arguments: tuple[Any, ...]) -> None:
    quiet()
    torch.set_num_threads(1)
    base = load()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.data = parameter.data.clone()  # out of the file, which is mapped and not resident yet
    trainer_of([], max_steps=1).fit(_Nothing(), DataLoader(Tokens(), batch_size=1))  # imports what a fit imports

    def peaks(way: Way) -> list[float]:
        torch.set_num_threads(THREADS)
        readings = [peak_kib()]
        module = way.ready(base)
        reader = _AtTheEnd(lambda: readings.append(peak_kib()))
        trainer = trainer_of([*way.callbacks(module), reader], max_steps=STEPS)
        trainer.fit(module, DataLoader(Tokens(), batch_size=BATCH))
        readings.append(peak_kib())
        return [(reading - readings[0]) * 1024 / 1e6 for reading in readings[1:]]

    to.send({name: in_a_fork(peaks, way) for name, way in make_ways(*arguments).items()})


class _AtTheEnd(pl.Callback):
    """Calls a function when the last step is done, before anything is taken down."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.function()


class _Nothing(pl.LightningModule):
    """A module that trains one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.number * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def in_a_fork(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run ``function`` in a fork of this process and return what it returns."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(function(*arguments)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError("A run failed while its memory was measured; its error stands above.") from None
    finally:
        process.join()


def peak_kib() -> int:
    """The most memory that was ever resident in this process, in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def quiet() -> None:
    """Keep Lightning's greetings and warnings out of the tables."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def ranking_bytes(entries: int = 1 << 25) -> float:
    """Bytes for each entry that ranking takes beside the scores and the mask that it returns."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_rank_in_a_fork, args=(theirs, entries))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError:
        raise RuntimeError("The process that measures a ranking failed; its error stands above.") from None
    finally:
        process.join()


def _rank_in_a_fork(to: Connection, entries: int) -> None:
    torch.set_num_threads(1)
    scores = [torch.randn(entries // 8) for _ in range(8)]

    def rank() -> float:
        top_k([torch.randn(1000)], 10)  # what the first call loads and keeps
        before = peak_kib()
        masks = top_k(scores, entries // 100)
        return ((peak_kib() - before) * 1024 - mask_bytes(masks)) / entries

    to.send(in_a_fork(rank))


def mask_files() -> list[dict[str, Any]]:
    """Bytes of the file of a random mask of the model: drawn by hand, and by a recipe that can draw it again."""
    model = load()
    recipe = Selection(score="random", density=DENSITY, scope=["*"])
    rows = []
    for what, masks in (
        ("scattered entries at 1 %", random_masks(model, DENSITY)),
        ("the same from a seed", select(recipe, model, Context(model))),
    ):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "masks.safetensors"
            masks.save(path)
            size = path.stat().st_size
        limit = masks.numel() / 8 + 4096 * len(masks)
        rows.append({"mask": what, "entries": masks.numel(), "bytes": size, "over n/8 + 4 KiB a tensor": size / limit})
    return rows


def mask_bytes(masks: MaskSet | Iterable[torch.Tensor]) -> int:
    """Bytes that masks take in memory, shared storage counted once."""
    values = masks.values() if isinstance(masks, MaskSet) else masks
    return sum({m.untyped_storage().data_ptr(): m.untyped_storage().nbytes() for m in values}.values())
