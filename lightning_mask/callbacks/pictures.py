"""LogPictures: what the masks and the confusion matrix look like, for whichever loggers take pictures."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_mask.callbacks.heat_map import draw_confusion, draw_heat_map
from lightning_mask.callbacks.packages import AnyCallback, twins
from lightning_mask.callbacks.report import numel, rows_of, session_of
from lightning_mask.core.files import whole_file


class LogPictures(AnyCallback):
    """Log a heat map of the masks for each phase, and the confusion matrix of a test.

    ``mask/heat_map`` shows the density of each layer: when training starts, when a phase begins, and, where masks have
    changed since, when training ends. ``test/confusion_matrix`` shows the ``confusion_matrix`` (rows of counts, rows are true
    classes) that a module keeps after a test, with its ``class_names``; a module without one has no such picture. See
    :func:`log_image` for where they go. Rank zero draws. Matplotlib is needed; without it, one line says so.
    """

    def __init__(self) -> None:
        self._phase: int | None = None
        self._changed = self._told = False

    def on_masks_changed(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        """Show the masks of a phase that begins."""
        session = session_of(trainer)
        phase = session.phases.phase if session is not None and session.phases is not None else None
        self._changed = True
        if reason == "start" or phase != self._phase:
            self._phase = phase
            self._show_masks(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the masks that pruning, or drawing anew, has come to."""
        if self._changed:
            self._show_masks(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the confusion matrix of a classifier."""
        counts: Sequence[Sequence[int]] | None = getattr(pl_module, "confusion_matrix", None)
        if not counts:
            return
        names = [str(name) for name in getattr(pl_module, "class_names", range(len(counts)))]
        self._show(trainer, "test/confusion_matrix", lambda: draw_confusion(counts, names, "confusion matrix"))

    def _show_masks(self, trainer: Trainer, module: LightningModule) -> None:
        self._changed = False
        session = session_of(trainer)
        phase = f", {session.phases.label(session.phases.phase)}" if session is not None and session.phases else ""
        title = f"entries that train, step {trainer.global_step}{phase}"

        def draw() -> Any:
            return draw_heat_map([(r.name, r.active, numel(r)) for r in rows_of(trainer, module)], title)

        self._show(trainer, "mask/heat_map", draw)

    def _show(self, trainer: Trainer, tag: str, draw: Callable[[], Any]) -> None:
        loggers = [logger for logger in trainer.loggers if takes_images(logger)]
        if not loggers or not trainer.is_global_zero:
            return
        if find_spec("matplotlib") is None:
            if not self._told:
                rank_zero_info('No pictures are logged: they need Matplotlib, pip install "lightning-mask[compare]".')
            self._told = True
            return
        image = draw()
        for logger in loggers:
            log_image(logger, tag, image, trainer.global_step)


def takes_images(logger: Logger) -> bool:
    """Whether :func:`log_image` knows what to do with a logger."""
    return hasattr(logger, "log_image") or isinstance(logger, twins(CSVLogger, MLFlowLogger, TensorBoardLogger))


def log_image(logger: Logger, tag: str, image: Any, step: int) -> None:
    """Give a picture to a logger, on rank zero.

    TensorBoard, MLflow, and whatever has a ``log_image`` as Weights & Biases' logger does, keep it under its tag; of a CSV
    logger it becomes a file below its folder, ``pictures/<tag>-<step>.png``.

    Args:
        logger: One that :func:`takes_images`.
        tag: Name of the picture, e.g. ``"mask/heat_map"``.
        image: uint8 [height, width, 3].
        step: Optimizer step.
    """
    if hasattr(logger, "log_image"):
        logger.log_image(tag, [image], step=step)
    elif isinstance(logger, twins(TensorBoardLogger)):
        logger.experiment.add_image(tag, image, step, dataformats="HWC")
    elif isinstance(logger, twins(MLFlowLogger)):
        logger.experiment.log_image(logger.run_id, image, key=tag, step=step)
    elif isinstance(logger, twins(CSVLogger)):
        from PIL import Image

        with whole_file(Path(logger.log_dir) / "pictures" / f"{tag.replace('/', '-')}-{step:06d}.png") as temporary:
            Image.fromarray(image).save(temporary, format="PNG")
