"""What a run left in its folder, read without trust in any of it."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lightning_mask.core.engine import Row
from lightning_mask.core.maskset import MaskSet, active

Points = list[tuple[int, float]]
"""Optimizer steps and values."""

SIGNS = ("summary.json", ".hydra/config.yaml", "metrics.csv", "masks.safetensors")
"""Files of which a run leaves one at least."""

T = TypeVar("T")


@dataclass
class Phase:
    """A span of training with one selection.

    Args:
        name: Of the phase.
        step: Optimizer step at which it began.
        reason: Why it began.
        settings: What ``phases.yaml`` says of it.
        active: Active entries of each tensor as it ended; None: not known.
    """

    name: str
    step: int
    reason: str
    settings: dict[str, Any] = field(default_factory=dict)
    active: dict[str, int] | None = None


@dataclass
class Run:
    """The facts of a run; whatever it did not leave is empty.

    Args:
        folder: Its own.
        started: Seconds since the epoch.
        summary: ``summary.json``.
        config: ``.hydra/config.yaml``, flat: dotted names and plain values.
        config_text: The same file as it is.
        choices: Options chosen for the groups of the config.
        figures: What was logged, by name.
        gaps: Number of logged figures that were not finite, by name.
        phases: In their order.
        tensors: What was held at the end.
        sparsity: Sparsity of each pruned tensor over time; the name of the whole scope is "".
    """

    folder: Path
    started: float
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    choices: dict[str, str] = field(default_factory=dict)
    figures: dict[str, Points] = field(default_factory=dict)
    gaps: dict[str, int] = field(default_factory=dict)
    phases: list[Phase] = field(default_factory=list)
    tensors: list[Row] = field(default_factory=list)
    sparsity: dict[str, Points] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.folder.resolve().name

    @property
    def task(self) -> str:
        """Name of what was done."""
        return str(self.summary.get("task_name") or self.config.get("task_name") or "run")

    @property
    def mask(self) -> dict[str, Any]:
        """The facts about the mask."""
        mask: dict[str, Any] = self.summary.get("mask") or {}
        return mask

    @property
    def metrics(self) -> dict[str, float]:
        """The last figures by name."""
        return {k: v for k, v in (self.summary.get("metrics") or {}).items() if isinstance(v, int | float)}

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        logged = max((points[-1][0] + 1 for points in self.figures.values() if points), default=0)
        return int(self.mask.get("steps") or logged)


def is_run(folder: Path) -> bool:
    """Whether a folder is one that a run leaves."""
    return any((folder / sign).is_file() for sign in SIGNS)


def read_run(folder: Path) -> Run:
    """Read a run's folder.

    Raises:
        ValueError: If it is none, or a file in it is damaged.
    """
    if not is_run(folder):
        what = "is no folder of a run" if folder.is_dir() else "is no folder"
        raise ValueError(f"{folder} {what}: give one that holds a {', a '.join(SIGNS[:-1])} or a {SIGNS[-1]}.")
    run = Run(folder, started(folder))
    run.summary = _read(folder / "summary.json", _summary) or {}
    run.config, run.config_text = _read(folder / ".hydra/config.yaml", _config) or ({}, "")
    run.choices = _read(folder / ".hydra/hydra.yaml", _choices) or {}
    for path in _metrics_files(folder):
        _read(path, lambda file: _add_figures(run, file))
    run.tensors = _tensors(run)
    settings = _read(folder / "phases.yaml", _settings) or []
    run.phases = _parsed(folder / "summary.json", lambda _: _phases(run, settings))
    for path in sorted(folder.glob("sparsity*.csv")):
        run.sparsity |= _read(path, _sparsity) or {}
    if not run.sparsity:  # it is written as training ends
        start = "mask/sparsity/"
        run.sparsity = {n.removeprefix(start): points for n, points in run.figures.items() if n.startswith(start)}
    return run


def started(folder: Path) -> float:
    """Return when a run began, or the earliest time that its folder tells of, in seconds since the epoch."""
    times = [path.stat().st_mtime for sign in SIGNS if (path := folder / sign).is_file()]
    config = folder / ".hydra/config.yaml"
    return config.stat().st_mtime if config.is_file() else min(times, default=0.0)


def previous_run(run: Run) -> Run | None:
    """Return the newest older run in the same parent folder that came to its end; None: there is none."""
    own = run.folder.resolve()
    others = [f for f in own.parent.iterdir() if f != own and (f / "summary.json").is_file()]
    older = [f for f in others if (started(f), f.name) < (run.started, own.name)]
    for folder in sorted(older, key=lambda f: (started(f), f.name), reverse=True):
        try:
            return read_run(folder)
        except ValueError:
            continue
    return None


def _read(path: Path, parse: Callable[[Path], T]) -> T | None:
    """Parse a file; None: there is none."""
    return _parsed(path, parse) if path.is_file() else None


def _parsed(path: Path, parse: Callable[[Path], T]) -> T:
    """Parse a file, or what was read of it. Whatever is wrong with it becomes one line."""
    try:
        return parse(path)
    except (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
        yaml.YAMLError,
        csv.Error,
    ) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged, or not what a run writes ({type(error).__name__}: {what}).") from error


_KINDS = {"metrics": dict, "mask": dict, "seconds": dict, "versions": dict, "overrides": list, "tags": list}
_NUMBERS = ({"total", "active", "density"}, {"held_checked", "held_changed"}, {"steps"}, {"seconds_per_step"})
"""Of ``mask``, in groups that are there together."""


def _summary(path: Path) -> dict[str, Any]:
    summary = json.loads(path.read_text(encoding="utf-8"), parse_int=_whole)
    for key, kind in _KINDS.items():
        if not isinstance(summary.get(key) or kind(), kind):
            raise ValueError(f"{key} is no {kind.__name__}")
    mask = summary.get("mask") or {}
    numbers = {f"mask.{key}": mask.get(key) for group in _NUMBERS if group & mask.keys() for key in sorted(group)}
    numbers |= {f"seconds.{part}": value for part, value in (summary.get("seconds") or {}).items()}
    if mask.get("sparsity") is not None:
        numbers["mask.sparsity"] = mask["sparsity"]
    for key, value in numbers.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{key} is no number")
        if key in ("mask.density", "mask.sparsity") and not 0 <= value <= 1:
            raise ValueError(f"{key} is no share")
    confusion = summary.get("confusion_matrix")
    if confusion:
        rows = confusion["rows_true"]
        if {len(rows), *map(len, rows)} != {len(confusion["classes"])}:
            raise ValueError("confusion_matrix is not square")
        if not all(isinstance(count, int) for row in rows for count in row):
            raise ValueError("confusion_matrix has entries that are no counts")
    return dict(summary)


def _whole(digits: str) -> int:
    if len(digits) > 18:
        raise ValueError(f"{digits[:18]}... is more than a run can count")
    return int(digits)


def _config(path: Path) -> tuple[dict[str, Any], str]:
    text = path.read_text(encoding="utf-8")
    return flat(yaml.safe_load(text) or {}), text


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists as one mapping of dotted names to plain values.

    Example:
        >>> flat({"mask": {"train": ["head"], "scope": None}})
        {'mask.train.0': 'head', 'mask.scope': None}
    """
    if isinstance(node, dict | list) and node:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return {k: v for key, value in items for k, v in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: node} if prefix else {}


def _choices(path: Path) -> dict[str, str]:
    choices = yaml.safe_load(path.read_text(encoding="utf-8"))["hydra"]["runtime"]["choices"]
    return {str(group): str(option) for group, option in choices.items() if option is not None}


def _metrics_files(folder: Path) -> list[Path]:
    """The figures of the parts of a run that went on in its folder, in their order."""
    earlier = [p for p in folder.glob("metrics.*.csv") if p.suffixes[0][1:].isdigit()]
    return [*sorted(earlier, key=lambda p: int(p.suffixes[0][1:])), folder / "metrics.csv"]


def _add_figures(run: Run, path: Path) -> None:
    """Add a file's figures; where it begins at an earlier step than the last one ended, it takes the place of those."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        names = next(rows, [])
        if "step" not in names:
            raise ValueError("there is no column named step")
        at = names.index("step")
        columns = [(i, name) for i, name in enumerate(names) if name not in ("step", "epoch")]
        found: dict[str, Points] = {}
        first = math.inf
        for row in rows:
            if len(row) != len(names) or not row[at]:
                continue  # the last line of a run that was killed
            step = int(float(row[at]))
            first = min(first, step)
            for i, name in columns:
                if row[i]:
                    found.setdefault(name, []).append((step, _number(row[i])))
    for name, points in run.figures.items():
        run.figures[name] = [p for p in points if p[0] < first]
    for name, points in found.items():
        finite = [p for p in points if math.isfinite(p[1])]
        if len(finite) < len(points):
            run.gaps[name] = run.gaps.get(name, 0) + len(points) - len(finite)
        run.figures.setdefault(name, []).extend(finite)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _tensors(run: Run) -> list[Row]:
    """What was held at the end, of the summary, else of the masks alone."""
    rows = run.mask.get("tensors")
    if rows is not None:
        return _parsed(run.folder / "summary.json", lambda _: [_row(each) for each in rows])
    return _read(run.folder / "masks.safetensors", _rows_of_masks) or []


def _row(row: dict[str, Any]) -> Row:
    if int(row["active"]) < 0:
        raise ValueError(f"{row['name']}: active is no count")
    return Row(
        str(row["name"]), tuple(map(int, row["shape"])), int(row["active"]), float(row["density"]), str(row["held_by"])
    )


def _rows_of_masks(path: Path) -> list[Row]:
    counted = [(name, mask, active(mask)) for name, mask in MaskSet.load(path).items()]
    return [Row(n, tuple(mask.shape), count, count / max(mask.numel(), 1), "not known") for n, mask, count in counted]


def _phases(run: Run, settings: list[dict[str, Any]]) -> list[Phase]:
    """The phases of the summary; of a run without one, where the logged number of the phase changes."""
    entries = run.mask.get("phases")
    if entries is None:
        logged = run.figures.get("mask/phase", [])
        changes = [p for before, p in zip([(0, -1.0), *logged], logged, strict=False) if before[1] != p[1]]
        entries = [{"phase": int(number), "step": step, "reason": ""} for step, number in changes]
    held = {
        int(each["phase"]): {str(name): int(count) for name, count in each["active"].items()}
        for each in run.mask.get("phase_active") or []
    }
    phases = []
    for entry in entries:
        index = int(entry["phase"])
        given = settings[index] if 0 <= index < len(settings) else {}
        name = entry.get("name") or given.get("name") or f"phase {index}"
        phases.append(Phase(str(name), int(entry["step"]), str(entry["reason"]), given, held.get(index)))
    return phases


def _settings(path: Path) -> list[dict[str, Any]]:
    phases = [dict(phase) for phase in yaml.safe_load(path.read_text(encoding="utf-8"))]
    for scale in (phase.get("lr_scale") for phase in phases):
        for factor in scale.values() if isinstance(scale, dict) else [scale or 0]:
            float(factor)
    return phases


def _sparsity(path: Path) -> dict[str, Points]:
    found: dict[str, Points] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["tensor"], []).append((int(row["step"]), float(row["sparsity"])))
    return found
