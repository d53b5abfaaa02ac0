"""From the results of many runs to what can be said of them: a table, paired differences, groups, and where masks lie.

How the numbers come about:

* Runs are paired by seed, and a difference is the mean over the seeds that both have: what a seed does to both (the split,
  the order of the batches, the new head) cancels. Its interval is Student's, two-sided, with n - 1 degrees of freedom,
  for that difference alone (Student, "The probable error of a mean", Biometrika 6, 1908).
* A verdict counts the others: within one task, the comparisons with one baseline are a family, and Holm's step-down
  procedure (Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statist. 6, 1979) keeps the chance of
  one false verdict or more in it at 5 %. So an interval may lie beside zero and the verdict still be "no difference seen".
* There is no verdict from fewer than three seeds, nor from differences that are the same in every seed: their spread of
  zero is the grain of the metric, not its noise.
* A ranking is over all pairs at one density, again with Holm. It names groups: the best and what the seeds do not separate
  from it, then the same among the rest. Inside a group there is no order.
"""

import csv
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mask.core.maskset import MaskSet

BASELINES = ("dense", "head", "random")
CONFIDENCE = 0.95
FEWEST = 3
"""Seeds that a verdict takes."""

Density = float | int | None

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
        means: Mean over seeds of ``val_score``, ``active``, ``total``, ``seconds`` and ``optimizer_bytes``; those that
            some run has.
        rates: The learning rates that occur.
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
        unranked: By reason, the names of strategies that no place was given.
    """

    density: Density
    groups: Sequence[Sequence[str]]
    unranked: Mapping[str, Sequence[str]]


def report(results: Sequence[Mapping[str, Any]], folder: Path, baselines: Sequence[str] = BASELINES) -> Path:
    """Write tables and pictures of many runs into ``folder``: each file whole, or not at all.

    ``table.md``, ``table.csv`` and ``quality.png`` always; ``where.png``, ``overlap.csv`` and ``overlap.png`` where there
    are masks to show. Files of an earlier report that this one has no content for are removed.

    Args:
        results: One mapping for each run that ended: ``task``, ``strategy``, ``density`` (share, number or None), ``lr``,
            ``seed``, ``score`` (higher is better; None or nan: not finite) and its name ``metric``; and, if known,
            ``val_score``, ``active`` and ``total`` (entries), ``seconds``, ``optimizer_bytes`` and ``masks`` (file).
            A run that failed is left out.
        folder: Where to write; it is made.
        baselines: Strategies that all others are compared with: at the same density if the baseline has one.

    Returns:
        The path of ``table.md``.

    Raises:
        ImportError: If SciPy or Matplotlib is missing.
        ValueError: If there is no result, one lacks a key, two are of the same run, a task has two metrics, or masks of one
            task are of different models.
        FileNotFoundError: If a file of masks is not there.
    """
    require_tools()
    from lightning_mask.app import pictures

    rows = summarise(results, baselines)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.md"
    _write(folder / "table.csv", _as_csv(rows, baselines))
    _write(table, _as_markdown(rows, baselines, ()))
    _draw(folder / "quality.png", lambda path: pictures.quality(rows, baselines, path))
    masks = _Masks()
    overlaps = overlap(rows, masks)
    shares = where(rows, masks)
    drawn = ["quality.png"]
    if shares:
        _draw(folder / "where.png", lambda path: pictures.where(shares, path))
        drawn.append("where.png")
    if overlaps:
        _write(folder / "overlap.csv", _overlap_csv(overlaps))
        _draw(folder / "overlap.png", lambda path: pictures.overlap(overlaps, path))
        drawn.append("overlap.png")
    for name in {"where.png", "overlap.png", "overlap.csv"} - {*drawn, "overlap.csv" if overlaps else ""}:
        (folder / name).unlink(missing_ok=True)
    _write(table, _as_markdown(rows, baselines, drawn))
    return table


def require_tools() -> None:
    """Raise an error where SciPy or Matplotlib is missing, to be called before anything is trained for a report.

    Raises:
        ImportError: Naming the extra that brings them.
    """
    try:
        import matplotlib  # noqa: F401
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"Comparing runs needs SciPy and Matplotlib, and {error.name} is missing: pip install 'lightning-mask[compare]'."
        ) from None


def summarise(results: Sequence[Mapping[str, Any]], baselines: Sequence[str] = BASELINES) -> list[Row]:
    """Return one row for each task, strategy and density: tasks as they come, the baselines first, then by name and density.

    Args:
        results: As for :func:`report`.
        baselines: As for :func:`report`.

    Raises:
        ValueError: As for :func:`report`.
    """
    rows: list[Row] = []
    for of_task in _by(_checked(results), "task").values():
        grouped = _by(of_task, "strategy", "density")
        here = [_row(list(group)) for group in grouped.values()]
        order = {name: place for place, name in enumerate(baselines)}
        here.sort(key=lambda row: (order.get(row.strategy, len(order)), row.strategy, _size(row.density)))
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


def rank(rows: Sequence[Row]) -> list[Ranking]:
    """Return one ranking for each density of one task; strategies without a density take part in each.

    All pairs are compared, by their paired differences and with Holm over all pairs, because the best is chosen by the data.
    A group is the best of what is left and all that is not separated from it.

    Args:
        rows: Of one task.
    """
    whole = [row for row in rows if row.is_whole]
    densities = sorted({row.density for row in rows if not row.is_whole}, key=_size)
    return [
        _rank(density, [*whole, *(r for r in rows if not r.is_whole and r.density == density)])
        for density in densities or [None]
    ]


def markdown_table(results: Sequence[Mapping[str, Any]], task: str | None = None, against: str = "dense") -> str:
    """Return a table short enough for a README: a line for each strategy, a column for each density.

    A cell is the mean score and its standard error, with ``▲`` or ``▼`` where the seeds show it to be better or worse than
    ``against`` (as in :func:`report`). A strategy without a density stands in the column of its own size.

    Args:
        results: As for :func:`report`.
        task: The task; None: all, each under its name.
        against: The baseline of the marks.

    Raises:
        ValueError: If there are no results of ``task``, and as for :func:`report`.
    """
    rows = summarise([r for r in results if task is None or r.get("task") == task], (against,))
    return "\n\n".join(_short(here, against, titled=task is None) for here in _by_task(rows).values()) + "\n"


# Rows


def _checked(results: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
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
            raise ValueError(
                f"{run[0]}: two results of {run[1]}{_at(run[2])} with seed {run[3]} (lr {seen[run]['lr']} and {result['lr']}); "
                "report one of them."
            )
        seen[run] = result
        if metrics.setdefault(result["task"], result["metric"]) != result["metric"]:
            raise ValueError(
                f"{run[0]}: scores of different metrics, {metrics[run[0]]} and {result['metric']}, cannot be compared."
            )
    return results


def _by(results: Iterable[Mapping[str, Any]], *keys: str) -> dict[Any, list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(tuple(result[key] for key in keys) if len(keys) > 1 else result[keys[0]], []).append(result)
    return groups


def _by_task(rows: Iterable[Row]) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _row(results: Sequence[Mapping[str, Any]]) -> Row:
    scores = {int(r["seed"]): _number(r["score"]) for r in sorted(results, key=lambda r: int(r["seed"]))}
    values = np.array(list(scores.values()))
    finite, n = bool(np.isfinite(values).all()), len(values)
    means = {}
    for key in ("val_score", "active", "total", "seconds", "optimizer_bytes"):
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
        for place, difference in zip(places, judged(family), strict=True):
            found[place][baseline] = difference
    return [replace(row, differences=differences) for row, differences in zip(rows, found, strict=True)]


def _baseline(rows: Sequence[Row], baseline: str, row: Row) -> Row | None:
    of_it = [other for other in rows if other.strategy == baseline]
    same = [other for other in of_it if other.density == row.density and not other.is_whole]
    whole = [other for other in of_it if other.is_whole]
    return next(iter(same + whole), None)


def judged(family: Sequence[Difference]) -> list[Difference]:
    """Return a family of differences with Holm's p and a verdict each.

    Args:
        family: What :func:`paired` returned, of all comparisons that are made together.
    """
    return [
        replace(d, adjusted=p, verdict=d.verdict or _verdict(d.mean, p))
        for d, p in zip(family, holm([d.p for d in family]), strict=True)
    ]


def _verdict(mean: float, p: float) -> str:
    if p >= 1 - CONFIDENCE:
        return "no difference seen"
    return "better" if mean > 0 else "worse"


def _rank(density: Density, rows: Sequence[Row]) -> Ranking:
    unranked: dict[str, list[str]] = {}
    left: list[Row] = []
    for row in sorted(rows, key=lambda r: r.strategy):
        if math.isnan(row.mean):
            unranked.setdefault("not finite", []).append(row.strategy)
        elif len(row.scores) < FEWEST:
            unranked.setdefault("too few seeds", []).append(row.strategy)
        else:
            left.append(row)
    pairs = list(combinations(left, 2))
    verdicts: dict[tuple[str, str], str] = {}
    for (a, b), d in zip(pairs, judged([paired(a.scores, b.scores) for a, b in pairs]), strict=True):
        verdicts[a.strategy, b.strategy] = d.verdict
        verdicts[b.strategy, a.strategy] = {"better": "worse", "worse": "better"}.get(d.verdict, d.verdict)
    groups: list[list[str]] = []
    while left:
        best = max(left, key=lambda row: row.mean)
        group = [r for r in left if r is best or verdicts[best.strategy, r.strategy] != "better"]
        groups.append([row.strategy for row in group])
        left = [row for row in left if row not in group]
    return Ranking(density, groups, unranked)


# Masks


class _Masks:
    """The masks of runs as packed bits: an eighth of a byte an entry, so one whole mask at a time is in memory."""

    def __init__(self) -> None:
        self._sizes: dict[str, dict[str, tuple[list[int], int]]] = {}

    def bits(self, path: str) -> dict[str, Any]:
        """Return, by tensor, its ``shape`` and its ``bits`` (packed uint8, or True or False for all of them)."""
        masks = MaskSet.load(path)
        self._sizes[path] = {name: (list(mask.shape), int(mask.sum())) for name, mask in masks.items()}
        packed: dict[str, Any] = masks.to_state()["masks"]
        return packed

    def sizes(self, path: str) -> dict[str, tuple[list[int], int]]:
        """Return, by tensor, its shape and its number of active entries."""
        if path not in self._sizes:
            self.bits(path)
        return self._sizes[path]


_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)


def jaccard(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return |a and b| / |a or b| over the tensors that are not whole in both; nan where neither has an entry there.

    Jaccard, "The distribution of the flora in the alpine zone", New Phytologist 11 (1912).

    Args:
        a: By tensor, ``shape`` and ``bits``, as in ``MaskSet.to_state()["masks"]``.
        b: The same of the other mask.

    Raises:
        ValueError: If the masks are of different tensors.
    """
    shapes = [{name: list(item["shape"]) for name, item in masks.items()} for masks in (a, b)]
    if shapes[0] != shapes[1]:
        odd = sorted(n for n in shapes[0].keys() | shapes[1].keys() if shapes[0].get(n) != shapes[1].get(n))
        raise ValueError(f"These masks are of different models: {', '.join(odd[:3])} is not the same in both.")
    common = either = 0
    for name, item in a.items():
        n, ours, theirs = math.prod(item["shape"]), item["bits"], b[name]["bits"]
        if ours is True and theirs is True:
            continue
        one, other = _ones(ours, n), _ones(theirs, n)
        if isinstance(ours, bool) or isinstance(theirs, bool):
            both = min(one, other) if ours is True or theirs is True else 0
        else:
            both = int(_ONES[ours.numpy() & theirs.numpy()].sum(dtype=np.int64))
        common += both
        either += one + other - both
    return common / either if either else math.nan


def _ones(bits: Any, n: int) -> int:
    return n * bits if isinstance(bits, bool) else int(_ONES[bits.numpy()].sum(dtype=np.int64))


@dataclass(frozen=True)
class Overlap:
    """How much the masks of strategies at one density have in common.

    Attributes:
        task: Name of the task.
        density: Share or number of entries.
        strategies: Names.
        values: Jaccard, mean over seeds, [strategies, strategies], float64; nan where no seed has both.
        seeds: Number of seeds that have both, [strategies, strategies], int64.
    """

    task: str
    density: Density
    strategies: Sequence[str]
    values: "np.ndarray[Any, np.dtype[np.float64]]"
    seeds: "np.ndarray[Any, np.dtype[np.int64]]"


def overlap(rows: Sequence[Row], masks: "_Masks | None" = None) -> list[Overlap]:
    """Return the Jaccard matrices of each task and density that two strategies or more have masks at.

    Args:
        rows: What :func:`summarise` returned.
        masks: Where masks are read through.
    """
    masks = masks or _Masks()
    found = []
    for task, here in _by_task(rows).items():
        for density in sorted({r.density for r in here if not r.is_whole and r.masks}, key=_size):
            those = [r for r in here if not r.is_whole and r.density == density and r.masks]
            if len(those) < 2:
                continue
            sums, seeds = np.zeros((len(those),) * 2), np.zeros((len(those),) * 2, dtype=np.int64)
            for seed in sorted({s for r in those for s in r.masks}):
                bits = {place: masks.bits(r.masks[seed]) for place, r in enumerate(those) if seed in r.masks}
                for i, j in combinations(bits, 2):
                    value = jaccard(bits[i], bits[j])
                    if not math.isnan(value):
                        sums[[i, j], [j, i]] += value
                        seeds[[i, j], [j, i]] += 1
                for i in bits:
                    sums[i, i] += 1
                    seeds[i, i] += 1
            values = np.divide(sums, seeds, out=np.full_like(sums, math.nan), where=seeds > 0)
            found.append(Overlap(task, density, [r.strategy for r in those], values, seeds))
    return found


@dataclass(frozen=True)
class Where:
    """Where masks put their entries.

    Attributes:
        task: Name of the task.
        density: The density shown, of the strategies that have one.
        blocks: Names of the parts from the input to the output: ``before``, ``0``, ``1``, ..., ``after``.
        kinds: Names of the types of modules.
        rows: By strategy (and ``all entries``: the model itself), the share of its active entries in each block and in each
            kind, mean over seeds; each sums to 1.
    """

    task: str
    density: Density
    blocks: Sequence[str]
    kinds: Sequence[str]
    rows: Mapping[str, tuple[Sequence[float], Sequence[float]]]


MOST_KINDS = 16


def where(rows: Sequence[Row], masks: "_Masks | None" = None) -> list[Where]:
    """Return, for each task with masks, where they lie: at the density that most strategies have, in the middle of several.

    Args:
        rows: What :func:`summarise` returned.
        masks: Where masks are read through.
    """
    masks = masks or _Masks()
    found = []
    for task, here in _by_task(rows).items():
        with_masks = [r for r in here if r.masks]
        if not with_masks:
            continue
        at = [r.density for r in with_masks if not r.is_whole]
        often = sorted({d for d in at if at.count(d) == max(map(at.count, at))}, key=_size)
        density = often[len(often) // 2] if often else None
        chosen = [r for r in with_masks if r.is_whole or r.density == density]
        first = masks.sizes(next(iter(chosen[0].masks.values())))
        places = block_and_kind({name: shape for name, (shape, _) in first.items()})
        counts = {"all entries": [{name: math.prod(shape) for name, (shape, _) in first.items()}]}
        for r in chosen:
            of_seeds = [masks.sizes(path) for path in r.masks.values()]
            if any(sizes.keys() != first.keys() for sizes in of_seeds):
                raise ValueError(
                    f"{task}: the masks of {r.strategy} are of another model than those of {chosen[0].strategy}."
                )
            counts[r.strategy] = [{name: active for name, (_, active) in sizes.items()} for sizes in of_seeds]
        blocks = list(dict.fromkeys(block for block, _ in places.values()))
        kinds = list(dict.fromkeys(kind for _, kind in places.values()))
        by_block = {name: _shares(c, {n: b for n, (b, _) in places.items()}, blocks) for name, c in counts.items()}
        by_kind = {name: _shares(c, {n: k for n, (_, k) in places.items()}, kinds) for name, c in counts.items()}
        kinds, by_kind = _fewer(kinds, by_kind)
        found.append(Where(task, density, blocks, kinds, {name: (by_block[name], by_kind[name]) for name in counts}))
    return found


def block_and_kind(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, str]]:
    """Return, by parameter name, its block and its type of module; both read from the names alone.

    The blocks are the numbered modules that a name holds first (``encoder.layer.3``, ``stages.2.1``, ``layer1.0``), of the
    container with the most of them; what comes in front is ``before``, what comes behind ``after``. A type is the name
    without the block (outside of blocks, its last two modules); all biases are one type, and so are all other vectors (the
    scales of normalisation).

    Args:
        shapes: Shape by parameter name, in the model's order.
    """
    keys = {name: _numbered(name) for name in shapes}
    members: dict[str, list[str]] = {}
    for found in keys.values():
        if found is not None and found[1] not in members.setdefault(found[0], []):
            members[found[0]].append(found[1])
    container = max(members, key=lambda c: len(members[c]), default=None)
    numbers = {key: str(i) for i, key in enumerate(members[container])} if container is not None else {}
    if len(numbers) < 2:
        numbers = {}
    places: dict[str, tuple[str, str]] = {}
    outside = "before"
    for name, shape in shapes.items():
        found = keys[name]
        if found is not None and found[1] in numbers:
            outside = "after"
            block, module = numbers[found[1]], name[len(found[1]) + 1 :].removesuffix(".weight")
        else:
            block, module = outside, ".".join(name.removesuffix(".weight").split(".")[-2:])
        vector = "biases" if name.endswith("bias") else "norms" if len(shape) <= 1 else None
        places[name] = (block, vector or module)
    order = ["before", *numbers.values(), "after"]
    return dict(sorted(places.items(), key=lambda item: order.index(item[1][0])))


def _numbered(name: str) -> tuple[str, str] | None:
    """The container and the path of the first numbered module of a name: ``layer1.0.conv`` gives ``layer``, ``layer1.0``."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit() and i > 0), None)
    if first is None:
        return None
    last = first
    while last + 1 < len(parts) - 1 and parts[last + 1].isdigit():
        last += 1
    return ".".join(parts[:first]).rstrip("0123456789"), ".".join(parts[: last + 1])


def _shares(counts: Sequence[Mapping[str, int]], groups: Mapping[str, str], order: Sequence[str]) -> list[float]:
    """The share of the entries in each group, mean over the masks given."""
    total = dict.fromkeys(order, 0.0)
    for one in counts:
        active = sum(one.values())
        for name, n in one.items():
            total[groups[name]] += n / active / len(counts) if active else 0.0
    return list(total.values())


def _fewer(kinds: Sequence[str], shares: Mapping[str, list[float]]) -> tuple[list[str], dict[str, list[float]]]:
    """The kinds that hold most in some mask, in their order, and the rest together."""
    if len(kinds) <= MOST_KINDS:
        return list(kinds), dict(shares)
    by_size = sorted(range(len(kinds)), key=lambda i: -max(row[i] for row in shares.values()))
    kept = sorted(by_size[: MOST_KINDS - 1])
    less = {name: [*(row[i] for i in kept), sum(row) - sum(row[i] for i in kept)] for name, row in shares.items()}
    return [*(kinds[i] for i in kept), "others"], less


# Tables


def _as_csv(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    of_each = ("pairs", "difference", "low", "high", "p", "p_holm", "verdict")
    figures = ("val_score", "active", "total", "seconds", "optimizer_bytes")
    head = ["task", "strategy", "density", "metric", "seeds", "not_finite", "mean", "standard_error", "lr", *figures]
    lines = [[*head, *(f"{baseline}_{name}" for baseline in baselines for name in of_each)]]
    for row in rows:
        line: list[Any] = [row.task, row.strategy, row.density, row.metric, len(row.scores), _not_finite(row)]
        line += [row.mean, row.standard_error, " ".join(f"{rate:g}" for rate in row.rates)]
        line += [_whole_number(row.means.get(name)) for name in figures]
        for baseline in baselines:
            d = row.differences.get(baseline)
            line += [None] * len(of_each) if d is None else [d.pairs, d.mean, d.low, d.high, d.p, d.adjusted, d.verdict]
        lines.append(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in line])
    return _csv(lines)


def _whole_number(value: float | None) -> float | int | None:
    return int(value) if value is not None and value.is_integer() else value


def _overlap_csv(overlaps: Sequence[Overlap]) -> str:
    lines: list[list[Any]] = [["task", "density", "strategy", "other", "jaccard", "seeds"]]
    for one in overlaps:
        for i, j in combinations(range(len(one.strategies)), 2):
            value = "" if math.isnan(one.values[i, j]) else float(one.values[i, j])
            lines.append([one.task, one.density, one.strategies[i], one.strategies[j], value, int(one.seeds[i, j])])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


_NOTES = """\
Score: mean over seeds, ± its standard error. A difference is paired by seed and has its own 95 % interval (paired t). A
verdict allows for the number of comparisons with that baseline in the task (Holm, 5 %), so an interval beside zero may still
be "no difference seen"; it takes three seeds. In a ranking all pairs at a density are compared (Holm, 5 %); inside a group
there is no order, and a later group was separated from the best of each earlier one, not from each of its members."""


def _as_markdown(rows: Sequence[Row], baselines: Sequence[str], drawn: Sequence[str]) -> str:
    parts = []
    for task, here in _by_task(rows).items():
        compared = [b for b in baselines if any(b in row.differences for row in here)]
        head = ["strategy", "density", "seeds", here[0].metric, "active entries", "lr", "seconds", "optimizer"]
        lines = [head + [f"less {baseline}" for baseline in compared]]
        for row in here:
            bad, n = _not_finite(row), len(row.scores)
            line = [row.strategy, density_text(row.density), f"{n} ({bad} not finite)" if bad else f"{n}", _score(row)]
            line += [_count(row.means.get("active")), ", ".join(f"{rate:g}" for rate in row.rates) or "–"]
            line += [_seconds(row.means.get("seconds")), _bytes(row.means.get("optimizer_bytes"))]
            lines.append(line + [_gap(row.differences.get(baseline), n) for baseline in compared])
        parts += [f"## {task}", _markdown(lines)]
        absent = [b for b in baselines if all(row.strategy != b for row in here)]
        if absent:
            parts.append(f"No results of: {', '.join(absent)}.")
        parts.append("\n".join(f"- {line}" for line in map(_ranking, rank(here))))
    parts.append(_NOTES)
    parts += [f"![{Path(name).stem}]({name})" for name in drawn]
    return "\n\n".join(parts) + "\n"


def _short(rows: Sequence[Row], against: str, titled: bool) -> str:
    densities = sorted({row.density for row in rows if not row.is_whole}, key=_size)
    own = any(row.is_whole for row in rows)
    head = [f"{rows[0].task}: {rows[0].metric}" if titled else rows[0].metric]
    lines = [[*head, *(["its own size"] if own else []), *map(density_text, densities)]]
    for strategy in dict.fromkeys(row.strategy for row in rows):
        cells: dict[Density, str] = {}
        for row in rows:
            if row.strategy == strategy:
                verdict = row.differences[against].verdict if against in row.differences else ""
                mark = {"better": " ▲", "worse": " ▼"}.get(verdict, "")
                size = f" ({percent(row.share)})" if row.is_whole and not math.isnan(row.share) else ""
                cells[None if row.is_whole else row.density] = _score(row) + mark + size
        lines.append([strategy, *(cells.get(d, "") for d in [*([None] if own else []), *densities])])
    seeds = sorted({len(row.scores) for row in rows})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = f"Mean ± standard error, {number} seeds; ▲ better or ▼ worse than {against} (paired t, Holm, 5 %)"
    note += "; no mark: no difference seen."
    return f"{_markdown(lines)}\n\n{note}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _ranking(ranking: Ranking) -> str:
    said = []
    for group in ranking.groups:
        said.append(f"no difference seen among: {', '.join(group)}" if len(group) > 1 else group[0])
    text = "; then ".join(said)
    for reason, names in ranking.unranked.items():
        text += f"{'; ' if text else ''}{reason}: {', '.join(names)}"
    return f"{density_text(ranking.density)}: {text}." if ranking.density is not None else f"{text}."


def _gap(d: Difference | None, seeds: int) -> str:
    if d is None:
        return ""
    if math.isnan(d.mean):
        return d.verdict
    interval = "" if math.isnan(d.low) else f" [{d.low:+.4f}, {d.high:+.4f}]"
    return f"{d.mean:+.4f}{interval} {d.verdict}" + (f" ({d.pairs} pairs)" if d.pairs != seeds else "")


def _score(row: Row) -> str:
    if math.isnan(row.mean):
        return "not finite"
    return f"{row.mean:.4f}" + ("" if math.isnan(row.standard_error) else f" ± {row.standard_error:.4f}")


def density_text(density: Density) -> str:
    """Return a density as it is shown: ``0.5 %``, ``20,000 entries``, or a dash."""
    if density is None:
        return "–"
    return f"{density:,} entries" if isinstance(density, int) else percent(density)


def percent(share: float) -> str:
    """Return a share as it is shown: ``0.5 %``."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.3g} %"


def _at(density: Density) -> str:
    return "" if density is None else f" at {density_text(density)}"


def _count(n: float | None) -> str:
    return "–" if n is None else f"{round(n):,}"


def _seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _bytes(n: float | None) -> str:
    if n is None:
        return "–"
    return f"{n / 1e6:.0f} MB" if n >= 1e7 else f"{n / 1e6:.2g} MB" if n >= 1e5 else f"{n / 1e3:.2g} kB"


def _not_finite(row: Row) -> int:
    return sum(math.isnan(score) for score in row.scores.values())


def _size(density: Density) -> tuple[int, float]:
    """Shares before numbers, none first."""
    return (0, 0.0) if density is None else (1 + isinstance(density, int), float(density))


# Files


def _write(path: Path, text: str) -> None:
    _draw(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _draw(path: Path, draw: Callable[[Path], object]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        draw(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
