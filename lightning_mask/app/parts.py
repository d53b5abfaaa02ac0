"""The parts of a run, made from its config: model, callbacks and trainer."""

from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor, ProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig

from lightning_mask.app.checkpoints import WholeFiles, load_weights

# Which data our tasks read, and what to choose where a model was given other data.
_READS = {
    "TextClassifier": "TextData",
    "ImageClassifier": "ImageData",
    "EfficientNetClassifier": "ImageData",
    "HFImageClassifier": "ImageData",
    "TimmClassifier": "ImageData",
    "CausalLM": "LanguageData",
}
_FITTING = {
    "TextData": "model=minilm or model=hf",
    "ImageData": "model=resnet, model=efficientnet_lite0, model=hf_image or model=timm",
    "LanguageData": "model=smollm2",
}


def make_model(cfg: DictConfig, data: LightningDataModule) -> LightningModule:
    """Make the model, as training starts from it; what it leaves open about the classes comes from the data."""
    of_model, of_data = (str(block.get("_target_", "")).rpartition(".")[2] for block in (cfg.model, cfg.data))
    if of_data in _FITTING and _READS.get(of_model, of_data) != of_data:
        raise ValueError(f"{of_model} does not go with {of_data}: choose {_FITTING[of_data]}, or other data.")
    open_ones = {}
    for name in ("num_classes", "class_names"):
        if name in cfg.model and cfg.model[name] is None:
            if not hasattr(data, name):
                raise ValueError(f"model.{name} is null and {type(data).__name__} has no {name}: give model.{name}=...")
            open_ones[name] = getattr(data, name)
    if "class_names" in open_ones and cfg.model.get("num_classes") not in (None, len(open_ones["class_names"])):
        raise ValueError(
            f"model.num_classes={cfg.model.num_classes}, but the data has {len(open_ones['class_names'])} classes "
            f"({', '.join(open_ones['class_names'])}): leave model.num_classes=null."
        )
    if _fused_cannot(cfg) and cfg.model.get("optimizer") == cfg.optimizer:
        rank_zero_info("optimizer.fused=true is left out: a fused step cannot clip the gradient under mixed precision.")
        open_ones["optimizer"] = instantiate(cfg.optimizer, fused=None)
    made = instantiate(cfg.model, _partial_=True)(**open_ones)
    assert isinstance(made, LightningModule)
    length, longest = cfg.data.get("max_length"), getattr(made, "max_length", None)
    if length is not None and longest is not None and length > longest:
        raise ValueError(f"data.max_length={length}, but model.model={cfg.model.get('model')} has {longest} positions.")
    if cfg.get("initial_checkpoint") is not None:
        load_weights(cfg.initial_checkpoint, made, "initial_checkpoint")
    return made


def _fused_cannot(cfg: DictConfig) -> bool:
    """Whether the fused optimizer would be refused: it unscales gradients itself, after they should have been clipped."""
    mixed = str(cfg.trainer.get("precision")) in ("16-mixed", "bf16-mixed", "16", "bf16")
    return mixed and bool(cfg.trainer.get("gradient_clip_val")) and cfg.get("optimizer", {}).get("fused") is True


def make_callbacks(cfg: DictConfig) -> list[Callback]:
    """Make the mask, then the other callbacks."""
    blocks: list[tuple[str, Any]] = [("mask", cfg.get("mask"))] if cfg.train else []
    blocks += [(f"callbacks.{name}", block) for name, block in (cfg.get("callbacks") or {}).items()]
    made = []
    for name, block in blocks:
        if block is None or (isinstance(block, DictConfig) and "_target_" in block and block._target_ is None):
            continue
        if not isinstance(block, DictConfig) or "_target_" not in block:
            raise ValueError(
                f"{name} says no _target_, so that it would do nothing: name a callback, or set it to null."
            )
        callback = instantiate(block)
        if not isinstance(callback, Callback):
            raise ValueError(f"{name}._target_={block._target_} does not make a Lightning callback.")
        made.append(callback)
    return made


def make_trainer(cfg: DictConfig, callbacks: list[Callback]) -> Trainer:
    """Make the trainer and its loggers; without a logger or a progress bar, the callbacks that need one are left out."""
    _keep_metrics(Path(cfg.paths.output_dir) / "metrics.csv")
    loggers: list[Logger] = [instantiate(block) for block in (cfg.get("logger") or {}).values() if block is not None]
    if not loggers:
        callbacks = [c for c in callbacks if not isinstance(c, LearningRateMonitor)]
    unset = {
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
    }
    chosen: dict[str, Any] = {name: value for name, value in unset.items() if cfg.trainer.get(name) is None}
    interval, steps = cfg.trainer.get("val_check_interval"), cfg.trainer.get("max_steps", -1)
    if isinstance(interval, int) and steps > 0 and cfg.trainer.get("check_val_every_n_epoch") is None:
        # A run that is shorter than the interval is validated at its end.
        chosen["val_check_interval"] = min(interval, steps * cfg.trainer.get("accumulate_grad_batches", 1))
    if cfg.trainer.get("barebones"):
        chosen, callbacks, loggers = {}, [c for c in callbacks if not isinstance(c, Checkpoint | ProgressBar)], []
    made = instantiate(cfg.trainer, _partial_=True)(callbacks=callbacks, logger=loggers or False, **chosen)
    assert isinstance(made, Trainer)
    if type(made.strategy.checkpoint_io) is TorchCheckpointIO:
        made.strategy.checkpoint_io = WholeFiles()
    return made


@rank_zero_only
def _keep_metrics(file: Path) -> None:
    """Move the figures of an earlier run in the same folder aside: the CSV logger would delete them."""
    if file.exists():
        number = 1
        while file.with_suffix(f".{number}.csv").exists():
            number += 1
        file.rename(file.with_suffix(f".{number}.csv"))
