"""Prune without training: `lightning-mask prune model=smollm2 data=reviews_lm method=obs sparsity=0.5`, or `prune(cfg)`.

A model is pruned in one shot from some training batches, and evaluated before and after.
"""

import csv
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_mask.app import launch
from lightning_mask.app.chatter import quieten
from lightning_mask.app.checkpoints import load_weights
from lightning_mask.app.checks import check_complete, check_types
from lightning_mask.app.parts import make_model, make_trainer
from lightning_mask.app.summary import relative, summarise, write_json
from lightning_mask.callbacks.calibration import batch_loss
from lightning_mask.core.files import whole_file
from lightning_mask.core.maskset import MaskSet, full
from lightning_mask.core.one_shot import LayerReport, OneShot, Pruned
from lightning_mask.core.one_shot import prune as prune_model
from lightning_mask.core.selection import check_batches


def prune(cfg: DictConfig) -> dict[str, float]:
    """Prune a model as the config says; write what came of it into the run's folder and print it.

    The folder gets ``checkpoints/last.ckpt`` (the pruned model before its first step, for ``ckpt_path`` of scripts/train.py and
    in plain PyTorch), ``masks.safetensors`` (of all parameters: what was pruned is False), ``layers.csv`` and
    ``summary.json``.

    Args:
        cfg: The composed root config (``conf/prune.yaml``).

    Returns:
        The figures of validation and test after pruning, e.g. ``{"test/perplexity": 30.0}``.

    Raises:
        ValueError: If a value of the config is out of range, or parts do not go together.
        FileNotFoundError: If ``ckpt_path`` or a file of the data is missing.
    """
    started = time.time()
    quieten()
    recipe = _recipe(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model = make_model(cfg, data)
    if cfg.ckpt_path is not None:
        load_weights(cfg.ckpt_path, model)
    trainer = make_trainer(cfg, [])
    if trainer.world_size > 1:
        raise ValueError(
            f"Pruning without training runs in one process: trainer.devices={cfg.trainer.devices} is too many."
        )
    quotas = recipe.quotas(model)  # refuses what cannot be pruned so before minutes go into evaluation

    seconds: dict[str, float] = {}
    before = _evaluate(cfg, model, data, trainer, seconds, "before")
    since = time.time()
    model.to(trainer.strategy.root_device)  # an evaluation leaves it on the CPU
    batches = list(islice(_training_batches(model, data, trainer), cfg.batches))
    rank_zero_info(f"pruning {len(quotas)} weights from {len(batches)} batches")
    with trainer.precision_plugin.forward_context():
        pruned = prune_model(recipe, model, partial(batch_loss, trainer, model), batches)
    seconds["prune"] = time.time() - since
    after = _evaluate(cfg, model, data, trainer, seconds, "after")
    seconds["all"] = time.time() - started

    folder = Path(cfg.paths.output_dir)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt", weights_only=False)
    masks = {name: full(True, parameter) for name, parameter in model.named_parameters()} | dict(pruned.masks)
    MaskSet(masks, {"recipes": [pruned.masks.recipe]}).save(folder / "masks.safetensors")
    write_layers(pruned.layers, folder / "layers.csv")
    facts = {
        "active": MaskSet(masks).count(),
        "total": MaskSet(masks).numel(),
        "sparsity": 1 - pruned.masks.density(),
        "pruned": pruned.masks.numel() - pruned.masks.count(),
        "scope": pruned.masks.numel(),
        **pruned.masks.recipe,
        "batches": len(batches),
    }
    summary = summarise(cfg, metrics=after, mask=facts, seconds=seconds, tested="pruned", hosts=[socket.gethostname()])
    write_json(folder / "summary.json", {**summary, "before": before})
    _print(pruned, before, after, seconds, folder)
    return after


def write_layers(layers: Sequence[LayerReport], path: Path) -> None:
    """Write the reports as a CSV file, whole or not at all: a line for each layer, the columns are their fields."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in fields(LayerReport))
        writer.writerows(astuple(layer) for layer in layers)


def _recipe(cfg: DictConfig) -> OneShot:
    """The recipe, and the checks of what stands beside it."""
    check_complete(cfg)
    check_types(cfg)
    check_batches(cfg.batches)
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool):
        raise ValueError(f"seed={cfg.seed!r} must be a whole number: which batches the model is shown comes from it.")
    if not cfg.val and not cfg.test:
        raise ValueError("val=false and test=false would not show what pruning costs: leave one of them.")
    names = ("method", "sparsity", "allocation", "scope", "allow_whole_layers", "damping", "block_size")
    return OneShot(**OmegaConf.to_container(OmegaConf.masked_copy(cfg, names)))  # type: ignore[arg-type]


def _evaluate(
    cfg: DictConfig,
    model: LightningModule,
    data: LightningDataModule,
    trainer: Trainer,
    seconds: dict[str, float],
    when: str,
) -> dict[str, float]:
    """The model's own figures of validation and test."""
    since = time.time()
    figures: dict[str, float] = {}
    for asked, evaluate in ((cfg.val, trainer.validate), (cfg.test, trainer.test)):
        if asked:
            evaluate(model, datamodule=data, verbose=False)
            figures |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    seconds[when] = time.time() - since
    return figures


def _training_batches(model: LightningModule, data: LightningDataModule, trainer: Trainer) -> Iterator[Any]:
    """Training batches as a run would begin with, on the model's device."""
    data.prepare_data()
    data.setup("fit")
    for batch, _, _ in iter(CombinedLoader(data.train_dataloader(), "max_size_cycle")):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = model._on_before_batch_transfer(batch, dataloader_idx=0)
        yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _print(
    pruned: Pruned, before: dict[str, float], after: dict[str, float], seconds: dict[str, float], folder: Path
) -> None:
    """Print a line for all layers that are alike but for their block's number, then the figures."""
    alike: dict[str, list[LayerReport]] = {}
    for layer in pruned.layers:
        alike.setdefault(".".join("*" if part.isdigit() else part for part in layer.name.split(".")), []).append(layer)
    table = Table(title="What was pruned")
    for column in ("weight", "layers", "entries", "zeros", "least error", "median", "largest", "seconds"):
        table.add_column(column, justify="left" if column == "weight" else "right", overflow="fold")
    for name, layers in (*alike.items(), ("all", pruned.layers)):
        errors_of = [layer.error for layer in layers]
        if name == "all":
            table.add_section()
        table.add_row(
            layers[0].name if len(layers) == 1 else name,
            str(len(layers)),
            f"{sum(layer.entries for layer in layers):,}",
            f"{sum(layer.zeros for layer in layers):,}",
            *(f"{value:.3f}" for value in (min(errors_of), statistics.median(errors_of), max(errors_of))),
            f"{sum(layer.seconds for layer in layers):.1f}",
        )
    figures = Table(title="Before and after")
    for column in ("", "before", "after"):
        figures.add_column(column, justify="left" if not column else "right")
    for name, value in after.items():
        figures.add_row(name, f"{before[name]:.4f}", f"{value:.4f}")
    figures.add_row("seconds", f"{seconds['before']:.0f}", f"{seconds['after']:.0f}; to prune {seconds['prune']:.0f}")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(figures)
    console.print(f"folder: {relative(folder)}", highlight=False, soft_wrap=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: Hydra's words, by default all that this process was started with."""
    launch.run(prune, "prune", words)


if __name__ == "__main__":
    main()
