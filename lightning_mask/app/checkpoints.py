"""The checkpoints of a run: the best weights, and the newest state to go on from."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info


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
    """Keep ``last.ckpt``: written at every validation, every so many steps, and when training ends.

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
        """Save every ``every_n_steps``, and at the run's last step: later Lightning counts its epoch as a whole one."""
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if step != self._saved and (due or step == trainer.max_steps or trainer.should_stop):
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
            trainer.save_checkpoint(self.path, weights_only=False)
