"""Compare ways of choosing a mask: `lightning-mask compare experiment=compare_text`, or `compare(cfg)`.

Every strategy trains for the same number of steps on the same data, at a learning rate of its own, which is found on seeds
that the comparison does not use.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_mask.app import comparison, launch
from lightning_mask.app.auto import CHOICE
from lightning_mask.app.checks import check_complete
from lightning_mask.app.summary import write_json
from lightning_mask.app.trials import Trial, is_basic, run_trials, stored

Density = float | None


@dataclass(frozen=True)
class Cell:
    """A strategy at a density on a task: the rates to try, then the seeds to run.

    Args:
        task: Its name.
        strategy: Its name.
        density: Share of the entries in scope; None: the strategy has none.
        overrides: Words of the command line that make it.
        folder: Where its trials are kept.
        metric: Of the task.
        mode: Which score is better, "max" or "min".
        start: Rung of the ladder of rates (:func:`rate`) in the middle of those that are tried.
        tuned: Seeds for finding the rate.
        seeds: Seeds of the comparison.
        points: Number of rates that are tried.
        widen: Number of further ones where the best lies at an end.
    """

    task: str
    strategy: str
    density: Density
    overrides: tuple[str, ...]
    folder: Path
    metric: str
    mode: str
    start: int
    tuned: tuple[int, ...]
    seeds: tuple[int, ...]
    points: int
    widen: int

    @property
    def name(self) -> str:
        """Strategy and density."""
        return self.strategy if self.density is None else f"{self.strategy} {self.density:g}"

    def trial(self, rung: int, seed: int, *, tuning: bool) -> Trial:
        """Return a run at a rate of the ladder; one that only finds the rate is not tested."""
        words = (*self.overrides, f"lr={rate(rung):g}", f"seed={seed}", f"test={'false' if tuning else 'true'}")
        return Trial(words, self.folder / f"lr-{rate(rung):g}-seed-{seed}")


@dataclass
class Progress:
    """What is known of one cell.

    Args:
        scores: Validation score by rung, the mean over the seeds for finding the rate; None where a run failed or diverged.
        rung: The best; None: not known yet, or no rate worked.
        error: Why no rate worked.
        next: Trials that can run now.
        left: Number of trials until the cell is complete, those in ``next`` included.
    """

    scores: dict[int, float | None] = field(default_factory=dict)
    rung: int | None = None
    error: str | None = None
    next: list[Trial] = field(default_factory=list)
    left: int = 0


def rate(rung: int) -> float:
    """Return a learning rate of the ladder 1, 3, 10, 30, ...

    Example:
        >>> [rate(rung) for rung in (-8, -7, -6)]
        [0.0001, 0.0003, 0.001]
    """
    return float(f"{(1, 3)[rung % 2]}e{rung // 2}")


def first_rung(dense: float, share: float, exponent: float) -> int:
    """Return the rung next to ``dense * share ** -exponent``: the right rate rises as fewer entries train.

    That it does is what Xu and Zhang 2024 ("Random masking finds winning tickets for parameter-efficient fine-tuning") found;
    the power is a rule of thumb for where to begin, and the best rate is searched around it.

    Args:
        dense: A good rate for training everything.
        share: Share of the entries that train, in (0, 1].
        exponent: Of the power.
    """
    exact = math.log10(dense * share**-exponent)
    return min(
        range(math.floor(2 * exact) - 2, math.ceil(2 * exact) + 3), key=lambda r: abs(math.log10(rate(r)) - exact)
    )


def progress(cell: Cell, results: Mapping[Path, Mapping[str, Any]]) -> Progress:
    """Say what is known of a cell, and what can run next.

    Args:
        cell: The cell.
        results: Those of trials, by folder.

    Raises:
        ValueError: If a run did not log the metric.
    """
    known = Progress()
    if cell.points == 1:  # nothing to choose from
        known.rung = cell.start
        return _runs(cell, known, results)
    tried = [cell.start + step for step in range(-(cell.points // 2), cell.points - cell.points // 2)]
    widened = 0
    while True:
        trials = [cell.trial(rung, seed, tuning=True) for rung in tried for seed in cell.tuned]
        known.next = [trial for trial in trials if trial.folder not in results]
        if known.next:
            known.left = len(known.next) + len(cell.seeds)
            return known
        for rung in tried:
            of_rung = [results[cell.trial(rung, seed, tuning=True).folder] for seed in cell.tuned]
            known.scores[rung] = mean_score([score(r, "val", cell.metric) for r in of_rung])
        # of equal ones the largest: rates that are too small for a sparse mask all leave the scores where they began
        best = max(sorted(known.scores, reverse=True), key=lambda rung: worth(known.scores[rung], cell.mode))
        if known.scores[best] is None:
            known.error = next((str(e) for t in trials if (e := results[t.folder]["error"])), "the loss was not finite")
            return known
        ends = {min(tried): min(tried) - 1, max(tried): max(tried) + 1}
        if best not in ends or widened == cell.widen:
            break
        tried.append(ends[best])
        widened += 1
    known.rung = best
    return _runs(cell, known, results)


def _runs(cell: Cell, known: Progress, results: Mapping[Path, Mapping[str, Any]]) -> Progress:
    """Add what is left to run at the rate that was chosen."""
    assert known.rung is not None
    runs = [cell.trial(known.rung, seed, tuning=False) for seed in cell.seeds]
    known.next = [trial for trial in runs if trial.folder not in results]
    known.left = len(known.next)
    return known


def score(result: Mapping[str, Any], part: str, metric: str) -> float | None:
    """Return a figure of a result; None: the run failed, or the figure was not finite.

    Raises:
        ValueError: If the run did not log it.
    """
    if result["error"] is not None:
        return None
    figures = result["metrics"]
    if f"{part}/{metric}" not in figures:
        raise ValueError(
            f"metric={metric!r}: {part}/{metric} was not logged; there are {', '.join(sorted(figures))} ({result['folder']})."
        )
    value: float | None = figures[f"{part}/{metric}"]
    return value


def mean_score(scores: Sequence[float | None]) -> float | None:
    """Return the mean; None where one is missing or not finite."""
    known = [value for value in scores if value is not None and math.isfinite(value)]
    return sum(known) / len(known) if len(known) == len(scores) else None


def worth(value: float | None, mode: str) -> float:
    """Return a number that is higher for a better score, and lowest where there is none."""
    return -math.inf if value is None else value if mode == "max" else -value


def cells(cfg: DictConfig, folder: Path) -> list[Cell]:
    """Return the cells of a comparison, in the order in which they run.

    All strategies come at the first density before any at the second; each of them on all tasks, one after another.

    Args:
        cfg: The composed config (``conf/compare.yaml``).
        folder: Of the comparison.
    """
    made = []
    for index, density in enumerate(cfg.densities):
        for name, strategy in cfg.strategies.items():
            takes, tuned = _takes(strategy), strategy.get("tuned", True)
            if not takes and index:
                continue
            for task_name, task in cfg.tasks.items():
                if task_name not in strategy.get("tasks", cfg.tasks):
                    continue
                words = [*cfg.overrides, *task.overrides, *strategy.overrides]
                words += [f"trainer.max_steps={cfg.steps}", f"trainer.val_check_interval={cfg.steps}"]
                if takes:
                    words.append(takes.format(density=f"{density!r}", sparsity=f"{1 - density:.10g}"))
                if cfg.paths.cache_dir is not None:
                    words.append(f"paths.cache_dir='{cfg.paths.cache_dir}'")
                share = float(density if strategy.share is None else strategy.share)
                made.append(
                    Cell(
                        task=str(task_name),
                        strategy=str(name),
                        density=density if takes else None,
                        overrides=tuple(words),
                        folder=folder / "trials" / str(task_name) / (f"{name}-{density:g}" if takes else str(name)),
                        metric=task.metric,
                        mode=task.get("mode", "max"),
                        start=first_rung(task.lr, share, cfg.tuning.exponent),
                        tuned=tuple(cfg.tuning.seeds),
                        seeds=tuple(cfg.seeds),
                        points=cfg.tuning.points if tuned else 1,
                        widen=cfg.tuning.widen if tuned else 0,
                    )
                )
    return made


def _takes(strategy: DictConfig) -> str | None:
    """The word that gives a strategy its density; None: it takes none."""
    word: str | None = strategy.get("takes", "mask.density={density}" if strategy.share is None else None)
    return word


def compare(cfg: DictConfig, folder: Path) -> list[dict[str, Any]]:
    """Run what has no result yet, write results and rates, and report.

    In ``folder``: ``trials/``, a folder for each; ``results.json``, a row for each run of the comparison; ``rates.json``, for
    each cell the scores by rate and the rate that was chosen; and what :func:`lightning_mask.app.comparison.report` writes.

    Args:
        cfg: The composed config (``conf/compare.yaml``).
        folder: Of the comparison; with the same one, it goes on where it was.

    Returns:
        The rows of ``results.json`` that did not fail.

    Raises:
        ValueError: If a value of the config is out of range, or parts do not go together.
        ImportError: If what draws the report is not installed.
    """
    check(cfg)
    launcher = HydraConfig.get().launcher if HydraConfig.initialized() else None
    if cfg.budget is not None and not is_basic(launcher):
        raise ValueError(
            f"budget={cfg.budget}: a launcher begins all runs that can run at once, so no time is left to look at the clock "
            "between them; leave budget out, or the launcher."
        )
    comparison.require_tools()
    console = Console(soft_wrap=True, highlight=False)
    wanted = cells(cfg, folder)
    results: dict[Path, dict[str, Any]] = {}
    remember(wanted, results, retry_failed=cfg.retry_failed)
    if not cfg.report_only:
        _run(cfg, wanted, results, console, launcher)
    rows = write(wanted, results, folder)
    failed = [row for row in rows if row["error"] is not None]
    for row in failed:
        name = row["strategy"] if row["density"] is None else f"{row['strategy']} {row['density']:g}"
        console.print(f"failed: {row['task']}, {name}: {row['error']}")
    good = [row for row in rows if row["error"] is None]
    if not good:
        console.print("No run of the comparison has a result yet, so there is nothing to report.")
        return []
    console.print(f"report: {comparison.report(rows, folder, tuple(cfg.baselines))}")
    return good


def _run(
    cfg: DictConfig,
    wanted: Sequence[Cell],
    results: dict[Path, dict[str, Any]],
    console: Console,
    launcher: DictConfig | None,
) -> None:
    """Run trials until nothing is left or the budget of minutes is used up."""
    started, ran, together = time.time(), 0, not is_basic(launcher)
    total = left = sum(progress(cell, results).left for cell in wanted)
    times = [r["wall_seconds"] for r in results.values() if r["error"] is None]
    each = sum(times) / len(times) if times else cfg.trial_seconds
    console.print(
        f"{len(wanted)} cells, {len(results)} trials done, at least {left} to run: about {span(left * each)} "
        f"({each:.0f} s a trial{'' if times else ', as the config says'})"
    )
    names = {trial.folder: cell for cell in wanted for trial in progress(cell, results).next}

    def told(trial: Trial, result: dict[str, Any]) -> None:
        nonlocal ran, left, total
        ran += 1
        results[trial.folder] = result
        left = sum(progress(cell, results).left for cell in wanted)
        total = max(total, ran + left)
        until = (
            "" if together else f", {span((time.time() - started) / ran * left)} left"
        )  # they all end before the first is told
        console.print(f"{_line(names[trial.folder], trial, result)}  {ran} of {ran + left}{until}")

    while True:
        if cfg.budget is not None and time.time() - started >= 60 * cfg.budget and left:
            console.print(f"budget={cfg.budget} minutes are over with {left} trials to run: the same command goes on.")
            return
        ready = []
        for cell in wanted:
            for trial in progress(cell, results).next:
                names[trial.folder] = cell
                ready.append(trial)
        if not ready:
            return
        now = ready if together else ready[:1]
        if together:
            console.print(f"{len(now)} runs begin; each is shown when all of them have ended")
        found = run_trials(now, launcher=launcher, retry_failed=cfg.retry_failed, told=told)
        results |= {trial.folder: result for trial, result in zip(now, found, strict=True)}  # some may have run before


def _line(cell: Cell, trial: Trial, result: Mapping[str, Any]) -> str:
    what = f"{cell.task}  {cell.name}  {trial.folder.name}"
    if result["error"] is not None:
        return f"{what}  failed: {result['error']}"
    part = "test" if any(name.startswith("test/") for name in result["metrics"]) else "val"
    value = score(result, part, cell.metric)
    shown = "not finite" if value is None else f"{value:.4f}"
    return f"{what}  {part}/{cell.metric} {shown}  {result['wall_seconds']:.0f} s"


def remember(wanted: Sequence[Cell], results: dict[Path, dict[str, Any]], *, retry_failed: bool = False) -> None:
    """Put the results that there are already into ``results``, by folder."""
    asked: set[Path] = set()
    while True:
        new = [t for cell in wanted for t in progress(cell, results).next if t.folder not in asked]
        if not new:
            return
        asked |= {trial.folder for trial in new}
        for trial, result in zip(new, stored(new, retry_failed=retry_failed), strict=True):
            if result is not None:
                results[trial.folder] = result


def write(wanted: Sequence[Cell], results: Mapping[Path, dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Write ``results.json`` and ``rates.json``, and return the rows of the first: one for each run and each failure."""
    rows: list[dict[str, Any]] = []
    rates: dict[str, dict[str, Any]] = {}
    for cell in wanted:
        known = progress(cell, results)
        if known.scores or known.rung is not None:
            found = {f"{rate(rung):g}": value for rung, value in sorted(known.scores.items())}
            best = None if known.rung is None else rate(known.rung)
            at_end = bool(known.scores) and known.rung in (min(known.scores), max(known.scores))
            rates.setdefault(cell.task, {})[cell.name] = {"lr": best, "val_scores": found, "at_end_of_grid": at_end}
        head = {"task": cell.task, "strategy": cell.strategy, "density": cell.density}
        head |= {"metric": cell.metric, "mode": cell.mode}
        if known.error is not None:
            rows.append({**head, "lr": None, "seed": None, "score": None, "error": known.error})
        else:  # what was sought without them may be another rate
            for trial, error in _failed_on_the_way(cell, known, results):
                rows.append({**head, "lr": None, "seed": None, "score": None, "error": f"{trial.folder.name}: {error}"})
        for seed in cell.seeds if known.rung is not None else ():
            result = results.get(cell.trial(known.rung, seed, tuning=False).folder)  # type: ignore[arg-type]
            if result is not None:
                tuned = {"lr": rate(known.rung), "lr_at_end": at_end, "seed": seed}  # type: ignore[arg-type]
                rows.append({**head, **tuned, **_row(result, cell.metric)})
    write_json(folder / "results.json", {"results": rows})
    write_json(folder / "rates.json", rates)
    return rows


def _failed_on_the_way(
    cell: Cell, known: Progress, results: Mapping[Path, Mapping[str, Any]]
) -> list[tuple[Trial, str]]:
    """The runs that looked for the rate and failed, for another reason than that they diverged."""
    trials = [cell.trial(rung, seed, tuning=True) for rung in sorted(known.scores) for seed in cell.tuned]
    return [(t, results[t.folder]["error"]) for t in trials if results[t.folder]["error"] is not None]


def _row(result: Mapping[str, Any], metric: str) -> dict[str, Any]:
    folder = Path(result["folder"])
    masks, found, seconds = folder / "masks.safetensors", folder / CHOICE, result["seconds"].get("fit")
    own = {}
    if found.exists():  # a strategy that found its own rate, in a time of its own
        choice = json.loads(found.read_text(encoding="utf-8"))
        own = {"lr": choice["choice"]["lr"]} if choice["choice"]["lr"] is not None else {}
        seconds = None if seconds is None else seconds + choice["seconds"]
    return {
        **own,
        "score": score(result, "test", metric),
        "val_score": score(result, "val", metric),
        "active": result["mask"].get("active"),
        "total": result["mask"].get("total"),
        "seconds": seconds,
        "seconds_per_step": result["mask"].get("seconds_per_step"),
        "optimizer_bytes": result["mask"].get("optimizer_bytes"),
        "held_changed": result["mask"].get("held_changed"),
        "masks": str(masks) if masks.exists() else None,
        "folder": result["folder"],
        "error": result["error"],
    }


def check(cfg: DictConfig) -> None:
    """Refuse a comparison that cannot be run, or would not be fair.

    Raises:
        ValueError: Naming the key.
    """
    check_complete(cfg)
    for key in ("tasks", "strategies", "densities", "seeds"):
        if not cfg[key]:
            raise ValueError(
                f"{key} is empty: nothing is compared. Choose experiment=compare_text, compare_image or your own."
            )
    for name, block, keys in [
        ("tasks", cfg.tasks, ("overrides", "metric", "lr")),
        ("strategies", cfg.strategies, ("overrides", "share")),
    ]:
        for of, each in block.items():
            lacks = [key for key in keys if key not in each]
            if lacks:
                raise ValueError(f"{name}.{of} lacks {', '.join(lacks)}: it has {', '.join(keys)}.")
    for name, task in cfg.tasks.items():
        if task.get("mode", "max") not in comparison.MODES:
            raise ValueError(f"tasks.{name}.mode={task.mode!r} must be max (a higher {task.metric} is better) or min.")
    for name, strategy in cfg.strategies.items():
        if strategy.share is not None and not 0 < strategy.share <= 1:
            raise ValueError(
                f"strategies.{name}.share={strategy.share} must be in (0, 1], or null where it takes a density."
            )
        word = _takes(strategy)
        if word is not None and ("{density}" in word) + ("{sparsity}" in word) != 1:
            raise ValueError(
                f"strategies.{name}.takes={word!r} must be a word with {{density}} or {{sparsity}} in it, e.g. "
                "mask.sparsity={sparsity}."
            )
    for density in cfg.densities:
        if not isinstance(density, float) or not 0 < density <= 1:
            raise ValueError(f"densities: {density!r} must be a share above 0, at most 1.0.")
    both = set(cfg.seeds) & set(cfg.tuning.seeds)
    if both:
        raise ValueError(
            f"seeds and tuning.seeds share {', '.join(map(str, sorted(both)))}: rates are found on other seeds."
        )
    for key in ("seeds", "tuning.seeds", "densities"):
        values = OmegaConf.select(cfg, key)
        if len(set(values)) < len(values) or not values:
            raise ValueError(f"{key}={list(values)} must name at least one, none twice.")
    if cfg.tuning.points < 1 or cfg.tuning.widen < 0 or cfg.steps < 1:
        raise ValueError("tuning.points and steps must be at least 1, tuning.widen at least 0.")
    unknown = [name for name in cfg.baselines if name not in cfg.strategies]
    if unknown:
        raise ValueError(
            f"baselines: there is no strategy {unknown[0]!r}; there are {', '.join(map(str, cfg.strategies))}."
        )


def span(seconds: float) -> str:
    """Return a time for people.

    Example:
        >>> span(50), span(3000), span(40000)
        ('50 s', '50 min', '11.1 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _job(cfg: DictConfig) -> None:
    compare(cfg, Path(HydraConfig.get().runtime.output_dir))


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: Hydra's words, by default all that this process was started with."""
    launch.run(_job, "compare", words)


if __name__ == "__main__":
    main()
