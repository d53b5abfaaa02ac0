"""The newest state of a run on disk: when a checkpoint can be taken from which the run goes on exactly, and how it is kept."""

import os
import shutil
from pathlib import Path
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer

_written: "WeakKeyDictionary[Trainer, set[Path]]" = WeakKeyDictionary()
"""What each Trainer has written, and so knows to be good."""


def save_last(trainer: Trainer, path: Path) -> None:
    """Write the state of training as a whole, a file or a strategy's folder; the one before stays as ``previous.ckpt``.

    What another run left there is kept only if this one has gone on from it: it may be damaged, or of another run.

    Args:
        trainer: In training; all ranks call this.
        path: Where to, on a local or shared file system.
    """
    new = path.with_name(f".new-{path.name}")
    if trainer.is_global_zero:
        _remove(new)
    trainer.save_checkpoint(new, weights_only=False)
    if trainer.is_global_zero:
        written = _written.setdefault(trainer, set())
        if path.exists() and (path in written or str(trainer.ckpt_path) == str(path)):
            _put(path, path.with_name("previous.ckpt"))
        elif trainer.ckpt_path is None and path not in written:
            _remove(path.with_name("previous.ckpt"))
        _put(new, path)
        written.add(path)
    trainer.strategy.barrier("the checkpoint has its name")


def is_settled(trainer: Trainer) -> bool:
    """Whether a run can go on exactly from a checkpoint that is taken now, behind a training batch or a validation.

    It cannot from the middle of an accumulation window, whose gradients are in no checkpoint; nor from the last batch of an
    epoch, as Lightning then leaves out the end of the epoch, or does it twice: better take one more step. Where an epoch has but
    one step, there is no other moment.
    """
    loop, ready = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if trainer.lightning_module.automatic_optimization and loop._should_accumulate():
        return False
    return not loop._num_ready_batches_reached() or ready <= trainer.accumulate_grad_batches


def validation_follows(trainer: Trainer) -> bool:
    """Whether, when a training batch ends, a validation comes before the next one."""
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def _put(source: Path, target: Path) -> None:
    """Rename; a folder that is there already is moved aside first, since a folder cannot be renamed over it."""
    old = target.with_name(f".old-{target.name}")
    if target.is_dir():
        _remove(old)
        os.replace(target, old)
    os.replace(source, target)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
