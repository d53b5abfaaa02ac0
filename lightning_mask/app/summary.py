"""What is left of a run: ``summary.json`` and the table at its end."""

import json
import math
import platform
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

import lightning_mask
from lightning_mask.core.files import whole_file


def summarise(
    cfg: DictConfig,
    *,
    metrics: dict[str, float],
    mask: dict[str, Any],
    seconds: dict[str, float],
    tested: str | None,
    hosts: Sequence[str],
    examples_per_second: float | None = None,
) -> dict[str, Any]:
    """Return the facts of a run as plain values.

    Args:
        cfg: The composed config.
        metrics: Figures by name.
        mask: What :meth:`lightning_mask.callbacks.RunReport.results` returned; may be empty.
        seconds: Wall-clock seconds by part of the run.
        tested: Which weights were tested; None: none.
        hosts: Name of each process's machine.
        examples_per_second: What all processes together trained on; None: not known.
    """
    return {
        "task_name": cfg.task_name,
        "tags": OmegaConf.to_container(cfg.tags),
        "seed": cfg.seed,
        "overrides": list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else [],
        "metrics": metrics,
        "tested": tested,
        "mask": mask,
        "seconds": seconds,
        "world_size": len(hosts),
        "hosts": dict(Counter(hosts)),
        "examples_per_second": examples_per_second,
        "initial_checkpoint": cfg.get("initial_checkpoint"),
        "ckpt_path": cfg.ckpt_path,
        "versions": {
            "lightning_mask": lightning_mask.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all; figures that are not finite become null."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False, ensure_ascii=False)
    with whole_file(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def print_summary(summary: dict[str, Any], folder: Path) -> None:
    """Print the table at the end of a run.

    Args:
        summary: What :func:`summarise` returned.
        folder: The run's folder.
    """
    table = Table(title="The run", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    figures = summary["metrics"]
    shown = [name for name in figures if name.startswith("test/")] or [n for n in figures if n.startswith("val/")]
    for name in shown:
        table.add_row(name, f"{figures[name]:.4f}")
    if summary["tested"] is not None:
        table.add_row("tested weights", summary["tested"])
    mask = summary["mask"]
    if mask:
        table.add_row("active entries", f"{mask['active']:,} of {mask['total']:,} ({mask['density']:.2%})")
        if mask.get("sparsity") is not None:
            table.add_row("sparsity", f"{mask['sparsity']:.4%} of what may be pruned")
        table.add_row("held entries changed", f"{mask['held_changed']:,} of {mask['held_checked']:,}")
        for phase in mask["phases"]:
            name = phase.get("name") or phase.get("phase")
            table.add_row("phase", f"{name} from step {phase['step']}: {phase['reason']}")
        table.add_row("steps", f"{mask['steps']:,}")
        table.add_row("seconds per step", f"{mask['seconds_per_step']:.3f}")
    if summary["examples_per_second"]:
        table.add_row("examples per second", f"{summary['examples_per_second']:,.1f}")
    table.add_row("seconds", ", ".join(f"{part} {value:.0f}" for part, value in summary["seconds"].items()))
    if summary["world_size"] > 1:
        hosts = [f"{count} on {host}" for host, count in summary["hosts"].items()]
        table.add_row(
            "processes", ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more hosts" if len(hosts) > 4 else "")
        )
    table.add_row("folder", relative(folder))
    Console(soft_wrap=not sys.stdout.isatty()).print(table)


def relative(folder: Path) -> str:
    """Return a path as a person reads it: relative to the working directory where it lies below that."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
