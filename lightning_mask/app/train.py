"""Train by mask from a composed config: `lightning-mask train`, `python -m lightning_mask.app.train`, or `train(cfg)`."""

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf

from lightning_mask.app import launch
from lightning_mask.app.agreement import SameRun
from lightning_mask.app.chatter import quieten
from lightning_mask.app.checkpoints import LastCheckpoint, check_checkpoint
from lightning_mask.app.checks import check_complete, check_types, check_used
from lightning_mask.app.delta import RunDelta
from lightning_mask.app.launch import agree_on_run, all_ranks_end, keep_config, one_job
from lightning_mask.app.lock import kept_to_this_job
from lightning_mask.app.newest import NEWEST, newest_checkpoint
from lightning_mask.app.parts import make_callbacks, make_model, make_trainer
from lightning_mask.app.ranks import check_started, words_of_rank
from lightning_mask.app.report import try_report
from lightning_mask.app.sparsity import write_sparsity
from lightning_mask.app.summary import print_summary, summarise, write_json
from lightning_mask.app.throughput import Throughput
from lightning_mask.callbacks import PhaseUnfreeze, PruneMask, RunReport
from lightning_mask.callbacks.phase import write_phases
from lightning_mask.callbacks.signals import listening

_Kind = TypeVar("_Kind", bound=Callback)


def train(cfg: DictConfig) -> dict[str, float]:
    """Do one run: fit, test, write ``summary.json`` into the run's folder, print the table.

    Args:
        cfg: The composed root config (``conf/train.yaml``).

    Returns:
        The last figures of training, validation and test by name, e.g. ``{"test/accuracy": 0.75}``.

    Raises:
        ValueError: If a value of the config is out of range, or parts do not go together.
        FileNotFoundError: If ``ckpt_path``, ``initial_checkpoint`` or a file of the data is missing.
        FileExistsError: If another run is at work in the folder.
    """
    started = time.time()
    quieten()
    _check(cfg)
    with kept_to_this_job(Path(cfg.paths.output_dir)):
        keep_config(cfg)
        return _train(cfg, started)


def _train(cfg: DictConfig, started: float) -> dict[str, float]:
    if cfg.train and _is_auto(cfg.get("mask")):
        from lightning_mask.app.auto import choose  # which trains, and so imports this module

        cfg = choose(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model = make_model(cfg, data)
    callbacks = make_callbacks(cfg)
    trainer = make_trainer(cfg, [SameRun(cfg), Throughput(), *callbacks])
    _check_sizes(cfg, data, trainer)
    with all_ranks_end(trainer):
        return _run(cfg, data, model, callbacks, trainer, started)


def _run(
    cfg: DictConfig,
    data: LightningDataModule,
    model: LightningModule,
    callbacks: list[Callback],
    trainer: Trainer,
    started: float,
) -> dict[str, float]:
    facts: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    seconds: dict[str, float] = {}
    weights = None
    start = _ours(trainer, SameRun).start = _start(cfg, callbacks, model)
    delta = RunDelta(cfg, model, callbacks, trainer)
    if cfg.train:
        since = time.time()
        trainer.fit(model, datamodule=data, ckpt_path=start)
        seconds["fit"] = time.time() - since
        metrics |= _floats(trainer.callback_metrics)
        report = next((c for c in callbacks if isinstance(c, RunReport)), None)
        facts = report.results() if report is not None else {}
        _keep_phases(cfg, callbacks, trainer)
        _keep_sparsity(cfg, callbacks, trainer)
        _keep(
            cfg, model, trainer, metrics=metrics, mask=facts, seconds=seconds
        )  # a test that fails must not take it along
    if cfg.test:
        since = time.time()
        weights, path = _weights_to_test(callbacks) if cfg.train else (str(start), start)
        trainer.test(model, datamodule=data, ckpt_path=path, verbose=False)
        seconds["test"] = time.time() - since
        metrics |= _floats(trainer.callback_metrics)
    seconds["all"] = time.time() - started
    summary = _keep(cfg, model, trainer, metrics=metrics, mask=facts, seconds=seconds, tested=weights)
    delta.write(lambda: make_model(cfg, data), _weights_to_test(callbacks)[1] or model, facts, metrics)
    if trainer.is_global_zero:
        if cfg.get("report") and not cfg.trainer.fast_dev_run:
            try_report(cfg.paths.output_dir)
        print_summary(summary, Path(cfg.paths.output_dir))
    return metrics


def _keep(
    cfg: DictConfig,
    model: LightningModule,
    trainer: Trainer,
    *,
    metrics: dict[str, float],
    mask: dict[str, Any],
    seconds: dict[str, float],
    tested: str | None = None,
) -> dict[str, Any]:
    """Return the facts of the run; rank 0 writes them into its folder."""
    same, pace = _ours(trainer, SameRun), _ours(trainer, Throughput)
    summary = summarise(
        cfg,
        metrics=metrics,
        mask=mask,
        seconds=seconds,
        tested=tested,
        hosts=same.hosts,
        examples_per_second=pace.examples_per_second,
    )
    if getattr(model, "confusion_matrix", None):
        summary["confusion_matrix"] = {"classes": model.class_names, "rows_true": model.confusion_matrix}
    if "auto" in cfg:
        summary["auto"] = OmegaConf.to_container(cfg.auto)
    if trainer.is_global_zero:
        write_json(Path(cfg.paths.output_dir) / "summary.json", summary)
    return summary


def _ours(trainer: Trainer, kind: type[_Kind]) -> _Kind:
    """A callback that every run has."""
    return next(c for c in trainer.callbacks if isinstance(c, kind))  # type: ignore[attr-defined]


def _keep_phases(cfg: DictConfig, callbacks: list[Callback], trainer: Trainer) -> None:
    """Write the resolved phases into the run's folder, whatever logger there is, for ``mask.phases`` of another run."""
    for callback in callbacks:
        if isinstance(callback, PhaseUnfreeze) and trainer.is_global_zero and not cfg.trainer.fast_dev_run:
            write_phases(callback.phases, Path(cfg.paths.output_dir) / "phases.yaml")


def _keep_sparsity(cfg: DictConfig, callbacks: list[Callback], trainer: Trainer) -> None:
    """Write the sparsity of each layer over time into the run's folder."""
    pruners = [c for c in callbacks if isinstance(c, PruneMask) and c.history]
    if trainer.is_global_zero and not cfg.trainer.fast_dev_run:
        for number, pruner in enumerate(pruners):
            name = f"sparsity-{number}" if len(pruners) > 1 else "sparsity"
            write_sparsity(pruner.history, trainer.global_step, Path(cfg.paths.output_dir) / name)


def _check(cfg: DictConfig) -> None:
    if "strategies" in cfg:
        raise ValueError("The experiment is a comparison of many runs: give it to lightning-mask compare.")
    if "tasks" in cfg:
        raise ValueError("The experiment is of several tasks: give it to scripts/packnet.py.")
    check_started()
    check_complete(cfg)
    check_types(cfg)
    if HydraConfig.initialized():
        check_used(cfg, HydraConfig.get().overrides.task)
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool):
        raise ValueError(f"seed={cfg.seed!r} must be a whole number: the data's order and random masks come from it.")
    if not cfg.train and not cfg.test:
        raise ValueError("train=false and test=false leave nothing to do.")
    if not cfg.train and cfg.ckpt_path is None:
        raise ValueError("train=false tests a checkpoint: give it with ckpt_path=...")
    if _is_file(cfg.ckpt_path) and cfg.ckpt_path not in NEWEST and not Path(cfg.ckpt_path).exists():
        raise FileNotFoundError(
            f"There is no checkpoint ckpt_path={cfg.ckpt_path}: give an existing one, or ckpt_path=auto."
        )
    initial = cfg.get("initial_checkpoint")
    if initial is not None and not Path(initial).is_file():
        raise FileNotFoundError(f"There is no file initial_checkpoint={initial}: give the checkpoint of another run.")


def _is_auto(block: Any) -> bool:
    """Whether a strategy is yet to be chosen."""
    return isinstance(block, DictConfig) and str(block.get("_target_")) == "lightning_mask.app.auto.Auto"


def _is_file(path: str | None) -> bool:
    """Whether a checkpoint is a local file; else it is a word or an address that Lightning knows what to do with."""
    return path is not None and path not in ("best", "hpc") and not re.match(r"registry(:|$)|\w+://", path)


def _check_sizes(cfg: DictConfig, data: LightningDataModule, trainer: Trainer) -> None:
    """Refuse a set that is too small before any other is used."""
    sizes: dict[str, int] = getattr(data, "sizes", {})
    needed = [("validation", cfg.train and trainer.limit_val_batches, "trainer.limit_val_batches=0 does without one")]
    needed += [("test", cfg.test and trainer.limit_test_batches, "test=false does without one")]
    for name, used, way_out in needed:
        size = sizes.get(name, trainer.world_size)
        if used and size < trainer.world_size:
            there_is = f"only {size} examples for {trainer.world_size} processes" if size else "no example"
            raise ValueError(
                f"There is {there_is} in the {name} set: give it a larger share (data.source.{name}=0.1); {way_out}."
            )


def _start(cfg: DictConfig, callbacks: list[Callback], model: LightningModule) -> str | None:
    """Return the checkpoint to go on from, or to test; "auto", or "last": the newest usable one of the run's own folder.

    Raises:
        FileNotFoundError: If there is none; a training run that says "auto" then starts from the beginning.
        ValueError: If it is not of this model.
    """
    path: str | None = cfg.ckpt_path
    if path in NEWEST:
        folder = Path(cfg.paths.output_dir) / "checkpoints"
        folder = next((c.path.parent for c in callbacks if isinstance(c, LastCheckpoint)), folder)
        newest = newest_checkpoint(folder)
        if newest is None and not cfg.train:
            raise FileNotFoundError(
                f"ckpt_path={path}: there is no {folder / 'last.ckpt'}, nor another. Give the path of a checkpoint."
            )
        if newest is None:
            rank_zero_info(f"no last.ckpt in {folder}: starting from the beginning")
            return None
        path = str(newest)
    if path is not None:
        if _is_file(path):
            check_checkpoint(path, model)
        rank_zero_info(f"going on from {path}" if cfg.train else f"testing {path}")
    return path


def _weights_to_test(callbacks: list[Callback]) -> tuple[str, str | None]:
    """Return a name for the weights that are tested after training, and their file; None: those in memory."""
    if any(isinstance(c, PruneMask) for c in callbacks):
        return "last (while pruning, the best so far may not be pruned yet)", None
    best = next((c.best_model_path for c in callbacks if isinstance(c, ModelCheckpoint) and c.best_model_path), None)
    return (f"best: {Path(best).name}", best) if best else ("last", None)


def _floats(figures: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items()}


def _job(cfg: DictConfig) -> float | None:
    """Run one job of the command line; a sweeper that searches gets the figure that it asked for."""
    with one_job(), listening(_signals(cfg)):
        metrics = train(cfg)
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish()  # else the next job of a sweep would go on with this one's run
        wanted = cfg.get("optimized_metric")
        if wanted is None:
            return None
        if wanted not in metrics:
            raise ValueError(f"optimized_metric={wanted!r} was not logged; there are {', '.join(sorted(metrics))}.")
        return metrics[wanted]


def _signals(cfg: DictConfig) -> list[str]:
    """The signals that ask a run to stop: they are noted from now on, also while data and model are made."""
    blocks = [block for block in (cfg.get("callbacks") or {}).values() if isinstance(block, DictConfig)]
    return [name for b in blocks if str(b.get("_target_")).endswith(".Preemption") for name in b.get("signals", [])]


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: Hydra's words, by default all that this process was started with."""
    agree_on_run()
    launch.run(_job, "train", words_of_rank(sys.argv[1:] if words is None else words))


if __name__ == "__main__":
    main()
