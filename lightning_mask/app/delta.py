"""The delta of a run: what training changed, beside its masks, as ``delta.safetensors``."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from omegaconf import DictConfig

from lightning_mask.callbacks import FreezeMask, PhaseUnfreeze
from lightning_mask.callbacks.base import MaskCallback
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.sharding import is_sharded
from lightning_mask.delta import content_hash, inspect, save_delta

FILE = "delta.safetensors"


class RunDelta:
    """Writes ``delta.safetensors`` into a run's folder: from the weights that the config makes to those that are tested.

    The base is not kept while training goes on: it is made anew from the config and the seed afterwards, and compared by its
    hash. So the delta of a run that went on from a checkpoint has the same base as that of a run in one go.

    Args:
        cfg: The composed root config. Its ``delta`` is ``"auto"`` (write one where masks hold more than half of the
            network), true or false.
        model: The model before training.
        callbacks: Those of the run.
        trainer: The run's trainer; rank 0 writes.

    Raises:
        ValueError: If ``delta`` is something else.
    """

    def __init__(
        self, cfg: DictConfig, model: LightningModule, callbacks: Sequence[Callback], trainer: Trainer
    ) -> None:
        wanted = cfg.get("delta", "auto")
        if wanted not in ("auto", True, False):
            raise ValueError(f"delta={wanted!r} must be auto, true or false.")
        masks = [callback for callback in callbacks if isinstance(callback, MaskCallback)]
        freezing = bool(masks) and all(isinstance(mask, FreezeMask | PhaseUnfreeze) for mask in masks)
        self._cfg, self._always = cfg, wanted is True
        throughout = cfg.ckpt_path is None and all(isinstance(m, FreezeMask) and m.refresh is None for m in masks)
        self._masks = masks if throughout else []
        self._due = cfg.train and (wanted is True or (wanted == "auto" and freezing))
        self._due = self._due and trainer.is_global_zero and not cfg.trainer.get("fast_dev_run")
        self._base = content_hash(model) if self._due else ""

    def write(
        self,
        build: Callable[[], LightningModule],
        tuned: str | LightningModule,
        facts: Mapping[str, Any],
        metrics: Mapping[str, float],
    ) -> None:
        """Write the file, or say why there is none.

        Args:
            build: Makes the model as the run did.
            tuned: The tested weights: a checkpoint, or the model.
            facts: What :class:`~lightning_mask.callbacks.RunReport` found; may be empty.
            metrics: Figures of the run; those of the test, where there are any, go into the file.
        """
        if not self._due or (not self._always and facts.get("density", 0.0) > 0.5):
            return
        path = Path(self._cfg.paths.output_dir) / FILE
        tested = {name: value for name, value in metrics.items() if name.startswith("test/")}
        try:
            with isolate_rng():
                seed_everything(self._cfg.seed, workers=True, verbose=False)
                base = build()
            if content_hash(base) != self._base:
                raise ValueError("the model is not the same when it is made twice with one seed and the same files")
            save_delta(path, base, tuned, self._mask_set(), recipe=self._recipe(), metrics=tested or metrics)
        except (ValueError, FileNotFoundError) as error:  # initial_checkpoint may be gone or another by now
            rank_zero_info(f"no {FILE}: {error}")
            return
        made = inspect(path)
        rank_zero_info(f"{FILE}: {made['active']:,} entries in {made['bytes'] / 1e6:.2f} MB")

    def _mask_set(self) -> MaskSet | None:
        """The masks that were in force all the time, or None: whatever differs is to be taken then."""
        masks = [mask.masks for mask in self._masks]
        if not masks or any(is_sharded(each) for mask in masks for each in mask.values()):
            return None
        return reduce(MaskSet.__and__, masks)

    def _recipe(self) -> dict[str, Any]:
        recipes = [mask.masks.recipe for mask in self._masks]
        return recipes[0] if len(recipes) == 1 else {"recipes": recipes} if recipes else {}
