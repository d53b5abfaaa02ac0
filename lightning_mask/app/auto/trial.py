"""One trial: a short run of a setting in one process, judged by examples that it does not train on."""

import copy
import inspect
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.utils import get_object
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, open_dict
from torch import Tensor

from lightning_mask.app.auto.budget import exceeds
from lightning_mask.app.auto.halving import Amount, Outcome, Setting
from lightning_mask.app.auto.settings import Auto
from lightning_mask.app.summary import write_json
from lightning_mask.callbacks import Preemption, RunReport

_LOSSES = "losses.json"
_OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
)
_NOT_FOR_TRIALS = (Checkpoint, EarlyStopping, LearningRateMonitor, ProgressBar, RunReport)


class HeldOut(Callback):
    """Write what ``validation_step`` returned of each example into a file: ``losses``, [batch], and ``weights``, if any.

    Args:
        path: The file, JSON.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._found: dict[str, list[float]] = {"losses": [], "weights": []}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        self._found = {"losses": [], "weights": []}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's losses."""
        if isinstance(outputs, Mapping) and isinstance(outputs.get("losses"), Tensor):
            losses = outputs["losses"].detach().double().flatten()
            weights = outputs.get("weights")
            self._found["losses"] += losses.tolist()
            self._found["weights"] += [1.0] * len(losses) if weights is None else weights.double().flatten().tolist()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        write_json(self.path, dict(self._found))


def hold_out(cfg: DictConfig, auto: Auto, data: LightningDataModule) -> Amount | None:
    """Return how much to hold out of the training set; None: the data module cannot."""
    target = get_object(cfg.data._target_)
    if "hold_out" not in inspect.signature(target).parameters:
        rank_zero_info(
            f"mask=auto: {cfg.data._target_} takes no hold_out, so that the trials are judged by its validation set, and the "
            "run's validation figures are of data that a choice has seen"
        )
        return None
    size = getattr(data, "sizes", {}).get("train")
    if isinstance(auto.held_out, int) and size is not None:
        return min(auto.held_out, max(1, size // 5))
    return auto.held_out


def run_length(cfg: DictConfig, data: LightningDataModule) -> int | None:
    """Return the optimizer steps of the run by its steps or its epochs, whichever are fewer; None: neither tells.

    Args:
        cfg: The run's.
        data: Its data module, which may say how many examples it trains on (``sizes["train"]``).
    """
    given, found = cfg.trainer, []
    steps, epochs, examples = given.get("max_steps"), given.get("max_epochs"), getattr(data, "sizes", {}).get("train")
    if isinstance(steps, int) and steps > 0:
        found.append(steps)
    batch, devices = cfg.data.get("batch_size"), given.get("devices", 1)
    devices = len(devices) if isinstance(devices, ListConfig) else devices
    if isinstance(epochs, int) and epochs > 0 and examples and batch and isinstance(devices, int) and devices > 0:
        batches = math.ceil(examples / (batch * devices * given.get("num_nodes", 1)))
        limit = given.get("limit_train_batches")
        if limit is not None:
            batches = min(batches, limit if isinstance(limit, int) else int(batches * limit))
        found.append(epochs * math.ceil(batches / (given.get("accumulate_grad_batches") or 1)))
    return min(found, default=None)


def trial_config(
    cfg: DictConfig, auto: Auto, setting: Setting, steps: int, held_out: Amount | None, folder: Path
) -> DictConfig:
    """Return the run's config for a short run of one setting in one process.

    Args:
        cfg: The run's.
        auto: The means.
        setting: Strategy, density and learning rate.
        steps: Optimizer steps.
        held_out: What :func:`hold_out` returned.
        folder: Of the trial.
    """
    made = copy.deepcopy(cfg)
    devices, every = cfg.trainer.get("devices"), cfg.trainer.get("accumulate_grad_batches") or 1
    with open_dict(made):
        made.mask = setting.mask
        if setting.lr is not None:
            made.lr = setting.lr
        made.seed, made.train, made.test, made.ckpt_path, made.logger = auto.seed, True, False, None, {}
        made.paths.output_dir = str(folder)
        if held_out is not None:
            made.data.hold_out = held_out
        made.callbacks = {n: b for n, b in (cfg.get("callbacks") or {}).items() if _goes_on(b)} | {
            "report": {"_target_": "lightning_mask.callbacks.RunReport", "dirpath": None, "check_held": False},
            **{n: {**b, "dirpath": None} for n, b in (cfg.get("callbacks") or {}).items() if _stops(b)},
            "held_out": {"_target_": "lightning_mask.app.auto.HeldOut", "path": str(folder / _LOSSES)},
        }
        made.trainer.update(
            {
                "max_steps": steps,
                "max_epochs": -1,
                "min_steps": None,
                "min_epochs": None,
                "max_time": None,
                "val_check_interval": steps * every,
                "check_val_every_n_epoch": None,
                "limit_val_batches": cfg.trainer.get("limit_val_batches") or None,
                "num_sanity_val_steps": 0,
                "devices": list(devices[:1]) if isinstance(devices, ListConfig) else 1,
                "num_nodes": 1,
                "strategy": "auto",
                "plugins": None,
                "profiler": None,
                "sync_batchnorm": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": None,
                "model_registry": None,
            }
        )
    return made


def _goes_on(block: Any) -> bool:
    """Whether a callback is part of how the user trains, and not of how a person follows a run."""
    made = _made_by(block)
    return made is not None and not (isinstance(made, type) and issubclass(made, _NOT_FOR_TRIALS))


def _stops(block: Any) -> bool:
    """Whether a callback stops a run when a signal asks for it."""
    return _made_by(block) is Preemption


def _made_by(block: Any) -> Any:
    target = block.get("_target_") if isinstance(block, DictConfig) else None
    return get_object(target) if target is not None else None


def outcome_of(auto: Auto, setting: Setting, steps: int, result: dict[str, Any], folder: Path) -> Outcome:
    """Return what became of a setting.

    Args:
        auto: By what it is judged.
        setting: What was tried.
        steps: Optimizer steps.
        result: What :func:`lightning_mask.app.trials.run_quietly` returned.
        folder: Of the trial.
    """
    score, error, facts = result["metrics"].get(auto.monitor), result["error"], result["mask"]
    diverged = False
    if error is None and auto.monitor not in result["metrics"]:
        error = f"{auto.monitor} was not logged; there are {', '.join(sorted(result['metrics']))}"
    elif error is None and (score is None or not math.isfinite(score)):
        score, error, diverged = None, f"{auto.monitor} is not finite", True
    if (beyond := exceeds(auto.budget, facts)) is not None:
        score, error = None, beyond
    return Outcome(
        setting=setting,
        steps=steps,
        score=score,
        error=error,
        seconds=result["wall_seconds"],
        entries=facts.get("active"),
        optimizer_bytes=facts.get("optimizer_bytes"),
        seconds_per_step=facts.get("seconds_per_step", 0.0),
        losses=_losses(folder / _LOSSES) if error is None else None,
        folder=f"{folder.parent.name}/{folder.name}",
        diverged=diverged,
    )


def _losses(file: Path) -> tuple[Tensor, Tensor] | None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not content.get("losses") or None in content["losses"]:
        return None
    return torch.tensor(content["losses"], dtype=torch.float64), torch.tensor(content["weights"], dtype=torch.float64)


@contextmanager
def alone() -> Iterator[None]:
    """Hide the launcher of several processes: a trial runs in this one alone."""
    before = {name: os.environ.pop(name) for name in _OF_A_LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
