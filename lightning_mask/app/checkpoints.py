"""The checkpoints of a run: the best weights, and the newest state to go on from."""

import os
import pickle
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mask.callbacks.saving import save_last, validation_follows
from lightning_mask.tasks.task import Task


class WholeFiles(TorchCheckpointIO):
    """Write a checkpoint under another name in its own folder, then rename it; read it without unpickling.

    Lightning writes into the machine's temporary folder first; where that is on another file system, it then copies, over
    the last good checkpoint, and a run that is ended meanwhile has none.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a file whole or not at all.

        Raises:
            OSError: If the system refuses, for example because the disk is full.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(".checkpoint.tmp")
        try:
            with temporary.open("wb") as opened:
                torch.save(checkpoint, opened)
                opened.flush()
                os.fsync(opened.fileno())  # else a machine that goes down may leave the new name with nothing in it
            os.replace(temporary, file)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            refused = _of_the_system(error)
            if refused is None:
                raise
            what = f"{refused.strerror}; what was there before is as it was"
            raise OSError(refused.errno, what, str(file)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of tensors and plain values.

        Raises:
            ValueError: If it is damaged or no checkpoint.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location)
        return read(path, map_location)


def _of_the_system(error: BaseException | None) -> OSError | None:
    """The error of the operating system that another one came of: torch's own does not say that the disk is full."""
    while error is not None and not (isinstance(error, OSError) and error.strerror):
        error = error.__cause__ or error.__context__
    return error


def check_checkpoint(path: str | Path, model: LightningModule, option: str = "ckpt_path") -> None:
    """Refuse a file that a run with this model cannot go on from.

    Args:
        path: A file, or a folder that a strategy wrote, which is not looked into.
        model: A module that changes checkpoints when it reads them, or makes its layers late, is not compared.
        option: The word that named it, for errors.

    Raises:
        ValueError: If it is damaged, no Lightning checkpoint, or of another model.
    """
    if Path(path).is_dir():
        return
    there, here = read(path, "cpu", mmap=True, option=option)["state_dict"], model.state_dict()
    late = is_overridden("configure_model", model) and not isinstance(model, Task)
    if not model.strict_loading or late or is_overridden("on_load_checkpoint", model):
        return
    differing = next((n for n in [*here, *there] if _shape(there.get(n)) != _shape(here.get(n))), None)
    if differing is not None:
        raise ValueError(
            f"{option}={path} is of another model: {differing} is {_shape(there.get(differing))} there and "
            f"{_shape(here.get(differing))} here. Give the model's options that it was made with."
        )


def load_weights(
    path: str | Path, model: LightningModule, option: str = "ckpt_path", strict: bool | None = None
) -> None:
    """Load the weights of a checkpoint, and nothing else of it.

    Args:
        path: A file that a run with such a model wrote.
        model: Loaded in place.
        option: The word that named the file, for errors.
        strict: Whether it must have every tensor of the model, and no other; None: as the model says (``strict_loading``).

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is a folder, damaged, no Lightning checkpoint, or of another model.
    """
    check_checkpoint(path, model, option)
    there = read(path, "cpu", mmap=True, option=option)["state_dict"]
    if not there.keys() & model.state_dict().keys():
        raise ValueError(f"{option}={path} is of another model: it has no tensor of this one.")
    try:
        model.load_state_dict(there, strict=model.strict_loading if strict is None else strict)
    except RuntimeError as error:
        raise ValueError(f"{option}={path} is of another model: {' '.join(str(error).split())}") from error


def read(path: str | Path, map_location: Any, mmap: bool | None = None, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the content of a checkpoint of Lightning's.

    Args:
        path: The file.
        map_location: Device of its tensors.
        mmap: Whether they are read only when they are used.
        option: The word that named it, for errors.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, holds objects, or is no checkpoint.
    """
    content = read_plain(path, map_location, mmap, option)
    if "state_dict" not in content:
        raise ValueError(f"{option}={path} is not a checkpoint of Lightning's: it has no state_dict.")
    return content


def read_plain(
    path: str | Path, map_location: Any, mmap: bool | None = None, option: str = "ckpt_path"
) -> dict[str, Any]:
    """The same of any file of tensors and plain values; one that is no mapping counts as empty."""
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        objects = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        what = (
            f"holds Python objects ({objects[1]}), which are not loaded" if objects else "is damaged, or no checkpoint"
        )
        raise ValueError(f"{option}={path} {what}: give another one.") from error
    return dict(content) if isinstance(content, Mapping) else {}


def _shape(value: Any) -> str:
    if value is None:
        return "missing"
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


class BestCheckpoint(ModelCheckpoint):
    """Keep the best weights, over all the folders that a run has gone through.

    Lightning's ``ModelCheckpoint`` forgets the best figure when a run goes on in another folder, and so may come to keep,
    and to test, weights that are worse than those it had. Takes the same arguments.
    """

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take over the best figure and its file, which stays where it is; start anew when the file is gone."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is None:
            return
        best = state["best_model_path"]
        if best and self.file_exists(best, trainer):
            state["dirpath"] = self.dirpath
            return
        if best:
            rank_zero_info(f"the best weights so far, {best}, are gone: the best from here on is kept")
        del checkpoint["callbacks"][self.state_key]


class LastCheckpoint(Checkpoint):
    """Keep ``last.ckpt``, and the one before as ``previous.ckpt``: written at every validation, every so many steps, at the end.

    Lightning's ``save_last`` copies the last checkpoint *that was kept*: while a metric does not improve, it stays behind.

    Args:
        dirpath: Folder of ``last.ckpt``.
        every_n_steps: Optimizer steps between two writes, beside those at validations; None: only at validations.

    Raises:
        ValueError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, dirpath: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"LastCheckpoint: every_n_steps={every_n_steps} must be at least 1, or null.")
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._saved = -1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save every ``every_n_steps``, and at the run's last step: later Lightning counts its epoch as a whole one.

        Not where a validation follows, which a run that goes on from here would leave out, and which saves at its end.
        """
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        due = due or step == trainer.max_steps or trainer.should_stop
        if due and step != self._saved and not validation_follows(trainer):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, but for the one before training and those without training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what the last steps made of the model, where nothing did."""
        if trainer.global_step != self._saved:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._saved = trainer.global_step
            save_last(trainer, self.path)
