"""The tables of a comparison, in Markdown and as CSV."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lightning_mask.app.comparison.masks import Overlap
from lightning_mask.app.comparison.statistics import (
    FIGURES,
    Density,
    Difference,
    Ranking,
    Row,
    by_task,
    density_order,
    density_text,
    percent,
    rank,
    summarise,
)

_NOTES = """\
Score: mean over seeds, ± its standard error. A difference is paired by seed and has its own 95 % interval (paired t). A
verdict allows for the number of comparisons with that baseline in the task (Holm, 5 %), so an interval beside zero may still
be "no difference seen"; it takes three seeds. In a ranking all pairs at a density are compared (Holm, 5 %); inside a group
there is no order, and a later group was separated from the best of each earlier one, not from each of its members."""

_AT_END = """\
A rate with "at the end" is the largest or smallest of those that were tried: a further one may be better (tuning.widen)."""


def markdown_table(results: Sequence[Mapping[str, Any]], task: str | None = None, against: str = "dense") -> str:
    """Return a table short enough for a README: a line for each strategy, a column for each density.

    A cell is the mean score and its standard error, with ``▲`` or ``▼`` where the seeds show it to be better or worse than
    ``against`` (as in :func:`lightning_mask.app.comparison.report`). A strategy without a density stands in the column of
    its own size.

    Args:
        results: As for :func:`lightning_mask.app.comparison.report`.
        task: The task; None: all, each under its name.
        against: The baseline of the marks.

    Raises:
        ValueError: If there are no results of ``task``, and as for :func:`lightning_mask.app.comparison.report`.
    """
    rows = summarise([r for r in results if task is None or r.get("task") == task], (against,))
    return "\n\n".join(_short(here, against, titled=task is None) for here in by_task(rows).values()) + "\n"


def as_markdown(
    rows: Sequence[Row], baselines: Sequence[str], drawn: Sequence[str], failed: Sequence[Mapping[str, Any]] = ()
) -> str:
    """Return ``table.md``: for each task a line for each row, what failed, and the rankings; then the pictures.

    Args:
        rows: What :func:`~lightning_mask.app.comparison.statistics.summarise` returned.
        baselines: As for it.
        drawn: Names of the files of pictures.
        failed: Results with an ``error``.
    """
    parts = []
    for task, here in by_task(rows).items():
        compared = [b for b in baselines if any(b in row.differences for row in here)]
        head = ["strategy", "density", "seeds", here[0].metric, "active entries", "lr", "seconds", "optimizer"]
        lines = [head + [f"less {baseline}" for baseline in compared]]
        for row in here:
            bad, n = _not_finite(row), len(row.scores)
            line = [row.strategy, density_text(row.density), f"{n} ({bad} not finite)" if bad else f"{n}", _score(row)]
            line += [_count(row.means.get("active")), _rates(row)]
            line += [_seconds(row.means.get("seconds")), _bytes(row.means.get("optimizer_bytes"))]
            lines.append(line + [_gap(row.differences.get(baseline), n) for baseline in compared])
        parts += [f"## {task}", _markdown(lines)]
        absent = [b for b in baselines if all(row.strategy != b for row in here)]
        if absent:
            parts.append(f"No results of: {', '.join(absent)}.")
        parts += _lost([result for result in failed if result["task"] == task])
        parts.append("\n".join(f"- {line}" for line in map(_ranking, rank(here))))
    for task in dict.fromkeys(result["task"] for result in failed if all(row.task != result["task"] for row in rows)):
        parts += [f"## {task}", *_lost([result for result in failed if result["task"] == task])]
    parts.append(_NOTES + (f" {_AT_END}" if any(row.at_end for row in rows) else ""))
    parts += [f"![{Path(name).stem}]({name})" for name in drawn]
    return "\n\n".join(parts) + "\n"


def as_csv(rows: Sequence[Row], baselines: Sequence[str]) -> str:
    """Return ``table.csv``: a line for each row, in full precision; empty where there is no number.

    Args:
        rows: What :func:`~lightning_mask.app.comparison.statistics.summarise` returned.
        baselines: As for it.
    """
    of_each = ("pairs", "difference", "low", "high", "p", "p_holm", "verdict")
    head = ["task", "strategy", "density", "metric", "seeds", "not_finite", "mean", "standard_error", "lr", *FIGURES]
    lines = [[*head, *(f"{baseline}_{name}" for baseline in baselines for name in of_each)]]
    for row in rows:
        line: list[Any] = [row.task, row.strategy, row.density, row.metric, len(row.scores), _not_finite(row)]
        line += [row.mean, row.standard_error, " ".join(f"{rate:g}" for rate in row.rates)]
        line += [int(v) if v is not None and v.is_integer() else v for v in map(row.means.get, FIGURES)]
        for baseline in baselines:
            d = row.differences.get(baseline)
            line += [None] * len(of_each) if d is None else [d.pairs, d.mean, d.low, d.high, d.p, d.adjusted, d.verdict]
        lines.append(["" if v is None or (isinstance(v, float) and math.isnan(v)) else v for v in line])
    return _csv(lines)


def overlap_csv(overlaps: Sequence[Overlap]) -> str:
    """Return ``overlap.csv``: a line for each pair of strategies at one density.

    Args:
        overlaps: What :func:`~lightning_mask.app.comparison.masks.overlap` returned.
    """
    lines: list[list[Any]] = [["task", "density", "strategy", "other", "jaccard", "seeds"]]
    for one in overlaps:
        for i, j in combinations(range(len(one.strategies)), 2):
            value = "" if math.isnan(one.values[i, j]) else float(one.values[i, j])
            lines.append([one.task, one.density, one.strategies[i], one.strategies[j], value, int(one.seeds[i, j])])
    return _csv(lines)


def _short(rows: Sequence[Row], against: str, titled: bool) -> str:
    densities = sorted({row.density for row in rows if not row.is_whole}, key=density_order)
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
    note += "; no mark: no difference shown."
    return f"{_markdown(lines)}\n\n{note}"


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(lines[0]) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _ranking(ranking: Ranking) -> str:
    text = "; then ".join(_group(names, best) for names, best in zip(ranking.groups, ranking.best, strict=True))
    for reason, names in ranking.unranked.items():
        text += f"{'; ' if text else ''}{reason}: {', '.join(names)}"
    return f"{density_text(ranking.density)}: {text}." if ranking.density is not None else f"{text}."


def _group(names: Sequence[str], best: str | None) -> str:
    if len(names) == 1:
        return names[0]
    if best is not None:
        return f"{best}, and no difference seen from it: {', '.join(name for name in names if name != best)}"
    return f"no difference seen among: {', '.join(names)}"


def _gap(d: Difference | None, seeds: int) -> str:
    if d is None:
        return ""
    if math.isnan(d.mean):
        return d.verdict
    interval = "" if math.isnan(d.low) else f" [{d.low:+.4f}, {d.high:+.4f}]"
    return f"{d.mean:+.4f}{interval} {d.verdict}" + (f" ({d.pairs} pairs)" if d.pairs != seeds else "")


def _rates(row: Row) -> str:
    rates = ", ".join(f"{rate:g}" for rate in row.rates) or "–"
    return f"{rates}, at the end" if row.at_end else rates


def _lost(failed: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for result in failed:
        density = "" if result["density"] is None else f" at {density_text(result['density'])}"
        seed = "" if result["seed"] is None else f", seed {result['seed']}"
        lines.append(f"- {result['strategy']}{density}{seed}: {result['error']}")
    return ["\n".join(["Failed, and so in no mean:", "", *lines])] if lines else []


def _score(row: Row) -> str:
    if math.isnan(row.mean):
        return "not finite"
    return f"{row.mean:.4f}" + ("" if math.isnan(row.standard_error) else f" ± {row.standard_error:.4f}")


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
