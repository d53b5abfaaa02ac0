"""What the scores of many runs say: means, paired differences with a verdict, and groups.

How the numbers come about:

* Runs are paired by seed, and a difference is the mean over the seeds that both have: what a seed does to both (the split,
  the order of the batches, the new head) cancels. Its interval is Student's, two-sided, with n - 1 degrees of freedom,
  for that difference alone (Student, "The probable error of a mean", Biometrika 6, 1908).
* A verdict counts the others: within one task, the comparisons with one baseline are a family, and Holm's step-down
  procedure (Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979) keeps the chance of
  one false verdict or more in it at 5 %. So an interval may lie beside zero and the verdict still be "no difference seen".
* There is no verdict from fewer than three seeds, nor from differences that are the same in every seed: their spread of
  zero is the grain of the metric, not its noise.
* A ranking is over all pairs at one density, each over the seeds that both have, again with Holm. It names groups: the best
  and what the seeds do not separate from it, then the same among the rest. Inside a group there is no order. A strategy
  that has fewer than three seeds in common with others gets no place.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

BASELINES = ("dense", "head", "random")
CONFIDENCE = 0.95
FEWEST = 3
"""Seeds that a verdict takes."""
FIGURES = ("val_score", "active", "total", "seconds", "optimizer_bytes")
"""What else is known of a run, if it is."""

Density = float | int | None

MODES = ("max", "min")
"""Which score of a task is better."""

_KEYS = ("task", "strategy", "density", "lr", "seed", "score", "metric")


@dataclass(frozen=True)
class Difference:
    """A strategy less another, over the seeds that both have.

    Attributes:
        pairs: Number of such seeds.
        mean: Mean difference; nan without a pair, or where a score is not finite.
        low: Lower end of its own 95 % interval; nan below two pairs.
        high: Upper end.
        p: Two-sided p of the paired t test; nan below three pairs or without spread.
        adjusted: ``p`` after Holm, over the family that the difference was put into.
        verdict: ``better``, ``worse``, ``no difference seen``, or why there is none: ``too few seeds``, ``no spread``,
            ``not finite``.
    """

    pairs: int
    mean: float
    low: float
    high: float
    p: float
    adjusted: float = math.nan
    verdict: str = ""


@dataclass(frozen=True)
class Row:
    """What the seeds of one strategy at one density gave.

    Attributes:
        task: Name of the task.
        strategy: Name of the strategy.
        density: Share (float) or number (int) of entries; None where the strategy has none.
        metric: Name of the score.
        scores: Score by seed; nan where a run's was not finite.
        mean: Mean score; nan where one of them is not finite.
        standard_error: Of the mean, from the seeds' standard deviation (n - 1); nan below two seeds.
        means: Mean over seeds of each of ``FIGURES`` that some run has.
        rates: The learning rates that occur.
        at_end: Whether the rate is the largest or smallest of those that were tried, so that another may be better.
        mode: Which score is better, "max" or "min".
        masks: File of the mask by seed, where there is one.
        differences: By baseline.
    """

    task: str
    strategy: str
    density: Density
    metric: str
    scores: Mapping[int, float]
    mean: float
    standard_error: float
    means: Mapping[str, float]
    rates: tuple[float, ...]
    at_end: bool
    mode: str
    masks: Mapping[int, str]
    differences: Mapping[str, Difference] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether no density was chosen, so that it is compared with every density."""
        return self.density is None or (isinstance(self.density, float) and self.density == 1.0)

    @property
    def share(self) -> float:
        """Entries that train over all entries of the model; the density where they were not counted; nan without both."""
        if self.means.get("total"):
            return self.means.get("active", math.nan) / self.means["total"]
        return self.density if isinstance(self.density, float) else math.nan


@dataclass(frozen=True)
class Ranking:
    """Groups of strategies at one density, the best first; no order inside a group.

    Attributes:
        density: Share or number of entries.
        groups: Names in alphabetical order.
        best: Of each group the name of the best, where the seeds separate some of the others from each other; else None.
        unranked: By reason, the names of strategies that no place was given.
    """

    density: Density
    groups: Sequence[Sequence[str]]
    best: Sequence[str | None]
    unranked: Mapping[str, Sequence[str]]


def summarise(results: Sequence[Mapping[str, Any]], baselines: Sequence[str] = BASELINES) -> list[Row]:
    """Return one row for each task, strategy and density: tasks as they come, the baselines first, then by name and density.

    Args:
        results: As for :func:`lightning_mask.app.comparison.report`.
        baselines: As for :func:`lightning_mask.app.comparison.report`.

    Raises:
        ValueError: As for :func:`lightning_mask.app.comparison.report`.
    """
    results = [result for result in results if result.get("error") is None]
    _check(results)
    runs: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in results:
        runs.setdefault((result["task"], result["strategy"], result["density"]), []).append(result)
    order = {name: place for place, name in enumerate(baselines)}
    rows: list[Row] = []
    for here in by_task(map(_row, runs.values())).values():
        here.sort(key=lambda row: (order.get(row.strategy, len(order)), row.strategy, density_order(row.density)))
        rows += _with_differences(here, baselines)
    return rows


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return ``ours - theirs`` over the seeds that both have: mean d, interval d +- t(0.975, n - 1) s / sqrt(n).

    Args:
        ours: Score by seed.
        theirs: Score by seed.
    """
    from scipy import stats

    gaps = np.array([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())], dtype=np.float64)
    n = len(gaps)
    if n == 0 or not np.isfinite(gaps).all():
        return Difference(n, math.nan, math.nan, math.nan, math.nan, verdict="not finite" if n else "too few seeds")
    mean = float(gaps.mean())
    if n == 1:
        return Difference(n, mean, math.nan, math.nan, math.nan, verdict="too few seeds")
    spread = float(gaps.std(ddof=1))
    size = max(abs(value) for scores in (ours, theirs) for value in scores.values() if math.isfinite(value))
    if spread <= 1e-12 * size:  # what rounding leaves of differences that are the same
        spread = 0.0
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * spread / math.sqrt(n)
    if n < FEWEST:
        return Difference(n, mean, mean - half, mean + half, math.nan, verdict="too few seeds")
    if spread == 0.0:
        same = abs(mean) <= 1e-12 * size
        return Difference(n, mean, mean, mean, math.nan, verdict="no difference seen" if same else "no spread")
    p = 2 * float(stats.t.sf(abs(mean) * math.sqrt(n) / spread, n - 1))
    return Difference(n, mean, mean - half, mean + half, p)


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p, in the order given: the running maximum of (m - i) * p over the sorted p, i from 0, at most 1.

    Args:
        p: The p of a family of m tests; those that are nan are no tests and stay nan.
    """
    tests = sorted((value, place) for place, value in enumerate(p) if not math.isnan(value))
    adjusted, highest = [math.nan] * len(p), 0.0
    for i, (value, place) in enumerate(tests):
        highest = max(highest, min(1.0, (len(tests) - i) * value))
        adjusted[place] = highest
    return adjusted


def judged(family: Sequence[Difference], mode: str = "max") -> list[Difference]:
    """Return a family of differences with Holm's p and a verdict each.

    Args:
        family: What :func:`paired` returned, of all comparisons that are made together.
        mode: Which score is better, "max" or "min".
    """
    return [
        replace(d, adjusted=p, verdict=d.verdict or _verdict(d.mean if mode == "max" else -d.mean, p))
        for d, p in zip(family, holm([d.p for d in family]), strict=True)
    ]


def rank(rows: Sequence[Row]) -> list[Ranking]:
    """Return one ranking for each density of one task; strategies without a density take part in each.

    So does one at density 1.0, unless it was tried at others as well: then that is a density like these.

    All pairs are compared, by their paired differences and with Holm over all pairs, because the best is chosen by the data.
    A group is the best of what is left and all that is not separated from it.

    Args:
        rows: Of one task.
    """
    times = Counter(row.strategy for row in rows)
    whole = [row for row in rows if row.is_whole and times[row.strategy] == 1]
    others = [row for row in rows if row not in whole]
    densities = sorted({row.density for row in others}, key=density_order)
    return [_rank(d, [*whole, *(row for row in others if row.density == d)]) for d in densities or [None]]


def by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each task: tasks and rows as they come."""
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def density_order(density: Density) -> tuple[int, float]:
    """Return a key to sort densities by: none first, then shares, then numbers."""
    return (0, 0.0) if density is None else (1 + isinstance(density, int), float(density))


def density_text(density: Density) -> str:
    """Return a density as it is shown: ``0.5 %``, ``20,000 entries``, or a dash."""
    if density is None:
        return "–"
    return f"{density:,} entries" if isinstance(density, int) else percent(density)


def percent(share: float) -> str:
    """Return a share as it is shown: ``0.5 %``."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"


def _check(results: Sequence[Mapping[str, Any]]) -> None:
    if not results:
        raise ValueError("There is no result to report: no run has ended, or the task that was asked for has none.")
    seen: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    metrics: dict[str, str] = {}
    for result in results:
        missing = [key for key in _KEYS if key not in result]
        if missing:
            raise ValueError(f"A result lacks {', '.join(missing)}: {dict(result)}.")
        run = tuple(result[key] for key in ("task", "strategy", "density", "seed"))
        if run in seen:
            at = "" if run[2] is None else f" at {density_text(run[2])}"
            raise ValueError(
                f"{run[0]}: two results of {run[1]}{at} with seed {run[3]} (lr {seen[run]['lr']} and {result['lr']}); "
                "report one of them."
            )
        seen[run] = result
        metric = f"{result['metric']} ({result.get('mode', 'max')})"
        if metrics.setdefault(result["task"], metric) != metric:
            raise ValueError(
                f"{run[0]}: scores of different metrics, {metrics[run[0]]} and {metric}, cannot be compared."
            )


def _row(results: Sequence[Mapping[str, Any]]) -> Row:
    scores = {int(r["seed"]): _number(r["score"]) for r in sorted(results, key=lambda r: int(r["seed"]))}
    values = np.array(list(scores.values()))
    finite, n = bool(np.isfinite(values).all()), len(values)
    means = {}
    for key in FIGURES:
        known = [float(r[key]) for r in results if r.get(key) is not None]
        if known:
            means[key] = sum(known) / len(known)
    first = results[0]
    return Row(
        task=first["task"],
        strategy=first["strategy"],
        density=first["density"],
        metric=first["metric"],
        scores=scores,
        mean=float(values.mean()) if finite else math.nan,
        standard_error=float(values.std(ddof=1)) / math.sqrt(n) if finite and n > 1 else math.nan,
        means=means,
        rates=tuple(sorted({float(r["lr"]) for r in results if r["lr"] is not None})),
        at_end=any(r.get("lr_at_end") for r in results),
        mode=first.get("mode", "max"),
        masks={int(r["seed"]): str(r["masks"]) for r in results if r.get("masks")},
    )


def _number(value: Any) -> float:
    number = math.nan if value is None else float(value)
    return number if math.isfinite(number) else math.nan


def _with_differences(rows: Sequence[Row], baselines: Sequence[str]) -> list[Row]:
    """Compare the rows of one task with each baseline; each baseline is a family of its own."""
    found: list[dict[str, Difference]] = [{} for _ in rows]
    for baseline in baselines:
        places, family = [], []
        for place, row in enumerate(rows):
            other = _baseline(rows, baseline, row)
            if other is not None and row.strategy != baseline:
                places.append(place)
                family.append(paired(row.scores, other.scores))
        for place, difference in zip(places, judged(family, rows[0].mode), strict=True):
            found[place][baseline] = difference
    return [replace(row, differences=differences) for row, differences in zip(rows, found, strict=True)]


def _baseline(rows: Sequence[Row], baseline: str, row: Row) -> Row | None:
    of_it = [other for other in rows if other.strategy == baseline]
    same = [other for other in of_it if other.density == row.density and not other.is_whole]
    whole = [other for other in of_it if other.is_whole]
    return next(iter(same + whole), None)


def _verdict(mean: float, p: float) -> str:
    if p >= 1 - CONFIDENCE:
        return "no difference seen"
    return "better" if mean > 0 else "worse"


def _rank(density: Density, rows: Sequence[Row]) -> Ranking:
    unranked: dict[str, list[str]] = {}
    mode = rows[0].mode
    left: list[Row] = []
    for row in sorted(rows, key=lambda r: r.strategy):
        if math.isnan(row.mean):
            unranked.setdefault("not finite", []).append(row.strategy)
        elif len(row.scores) < FEWEST:
            unranked.setdefault("too few seeds", []).append(row.strategy)
        else:
            left.append(row)
    while left:
        apart = {row.strategy: sum(len(row.scores.keys() & r.scores.keys()) < FEWEST for r in left) for row in left}
        odd = max(left, key=lambda row: (apart[row.strategy], -len(row.scores), row.strategy))
        if not apart[odd.strategy]:
            break
        unranked.setdefault("other seeds", []).append(odd.strategy)
        left.remove(odd)
    means = {row.strategy: row.mean if mode == "max" else -row.mean for row in left}
    pairs = list(combinations(left, 2))
    verdicts: dict[tuple[str, str], str] = {}
    for (a, b), d in zip(pairs, judged([paired(a.scores, b.scores) for a, b in pairs], mode), strict=True):
        verdicts[a.strategy, b.strategy] = d.verdict
        verdicts[b.strategy, a.strategy] = {"better": "worse", "worse": "better"}.get(d.verdict, d.verdict)
    groups: list[list[str]] = []
    bests: list[str | None] = []
    names = list(means)
    while names:
        unbeaten = [name for name in names if all(verdicts.get((name, other)) != "worse" for other in names)]
        best = max(unbeaten or names, key=lambda name: means[name])
        group = [name for name in names if name == best or verdicts[best, name] == "no difference seen"]
        groups.append(group)
        torn = any(verdicts[pair] != "no difference seen" for pair in combinations(group, 2))
        bests.append(best if torn else None)
        alike = [name for name in names if name != best and verdicts[best, name] == "no spread"]
        if alike:
            unranked.setdefault(f"no spread against {best}", []).extend(alike)
        names = [name for name in names if name not in group and name not in alike]
    return Ranking(density, groups, bests, unranked)
