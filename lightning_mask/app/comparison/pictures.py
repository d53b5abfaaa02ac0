"""Pictures of a comparison: quality against density, where masks lie, how much they have in common. Needs Matplotlib."""

import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from lightning_mask.app.comparison.masks import Overlap, Where
from lightning_mask.app.comparison.statistics import Row, density_text, percent

_COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5", "C6", "C8", "C9", "navy", "limegreen", "magenta", "goldenrod", "gray")
_MARKERS = "os^DvPX<>ph*d"  # 13 to 14 colours: 182 pairs
_BANDS = ("black", "tab:brown", "dimgray")
_SPREAD = 0.1
"""Decades over which the strategies at one density are spread, so that their error bars lie beside each other."""


def quality(rows: Sequence[Row], baselines: Sequence[str], path: Path) -> None:
    """Draw the score against the density: a panel for each task, error bars of a standard error.

    A baseline without a density is a band over the whole width, any other strategy without one a point at the share of the
    model's entries that it trains.

    Args:
        rows: What :func:`~lightning_mask.app.comparison.statistics.summarise` returned.
        baselines: Names.
        path: File to write, PNG.
    """
    tasks = list(dict.fromkeys(row.task for row in rows))
    across = min(3, len(tasks))
    down = math.ceil(len(tasks) / across)
    figure, axes = _figure(down, across, 5.2 * across + 2.2, 4.8 * down)
    bands = {row.strategy for row in rows if row.is_whole and row.strategy in baselines}
    others = list(dict.fromkeys(row.strategy for row in rows if row.strategy not in bands))
    drawn: dict[str, Any] = {}
    for axis, task in zip_longest(axes.flat, tasks):
        if task is None:
            axis.remove()
            continue
        here = [row for row in rows if row.task == task and math.isfinite(row.mean)]
        for place, strategy in enumerate(others):
            points = [row for row in here if row.strategy == strategy and math.isfinite(_density(row))]
            if not points:
                continue
            shift = 10 ** (_SPREAD * ((place + 0.5) / len(others) - 0.5))
            known = strategy in baselines
            alone = all(row.is_whole for row in points)
            drawn[strategy] = axis.errorbar(
                [100 * _density(row) * (1.0 if row.is_whole else shift) for row in points],
                [row.mean for row in points],
                [0.0 if math.isnan(row.standard_error) else row.standard_error for row in points],
                color="black" if known else _COLOURS[place % len(_COLOURS)],
                marker=_MARKERS[place % len(_MARKERS)],
                linestyle=("none" if alone else "--" if known else ("-", "-.")[place // len(_COLOURS) % 2]),
                linewidth=1.2,
                markersize=6,
                elinewidth=1,
                capsize=2,
                zorder=3,
            )
        shown = [row for row in here if row.strategy in bands]
        low, high = axis.get_ylim()
        inside = [row for row in shown if low - (high - low) < row.mean < high + (high - low)]
        for place, name in enumerate(b for b in baselines if b in bands):
            for row in shown:
                if row.strategy != name:
                    continue
                colour = _BANDS[place % len(_BANDS)]
                if row in inside or not axis.containers:
                    drawn[name] = axis.axhline(row.mean, color=colour, linewidth=1.2, linestyle=(0, (1, 1 + place)))
                    if math.isfinite(row.standard_error):
                        bounds = row.mean - row.standard_error, row.mean + row.standard_error
                        axis.axhspan(*bounds, color=colour, alpha=0.13, linewidth=0)
                else:  # so far off that it would flatten all the rest
                    below = row.mean < low
                    at = (0.98, 0.02 + 0.06 * place) if below else (0.98, 0.94 - 0.06 * place)
                    text = f"{name} {row.mean:.3f} {'↓' if below else '↑'}"
                    axis.text(*at, text, transform=axis.transAxes, color=colour, fontsize=9, ha="right")
        axis.set(
            xscale="log",
            title=task,
            xlabel="density, %",
            ylabel=f"{here[0].metric}" if here else "",
        )
        axis.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    if drawn:
        names = [name for name in [*baselines, *(o for o in others if o not in baselines)] if name in drawn]
        figure.legend([drawn[name] for name in names], names, loc="outside right upper", fontsize=9, frameon=False)
    _save(figure, path)


def _density(row: Row) -> float:
    """The share that was chosen; that of the model's entries that train where none was, or a number of entries."""
    return row.density if isinstance(row.density, float) and not row.is_whole else row.share


def where(tables: Sequence[Where], path: Path) -> None:
    """Draw the share of a mask's entries in each block and type of module: a line for each strategy, a row for each task.

    Args:
        tables: What :func:`~lightning_mask.app.comparison.masks.where` returned.
        path: File to write, PNG.
    """
    widest = max(len(table.blocks) for table in tables), max(len(table.kinds) for table in tables)
    cell, height = 0.46, 0.3
    tall = [height * len(table.rows) + 2.4 for table in tables]
    figure, axes = _figure(len(tables), 2, cell * sum(widest) + 3.2, sum(tall), width_ratios=widest, height_ratios=tall)
    for (left, right), table in zip(axes, tables, strict=True):
        for axis, names, which in ((left, table.blocks, 0), (right, table.kinds, 1)):
            values = 100 * np.array([shares[which] for shares in table.rows.values()])
            axis.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, 100), aspect="auto")
            _annotate(axis, values)
            _label(axis, names, list(table.rows) if which == 0 else [])
            axis.axhline(0.5, color="black", linewidth=1)
        at = "" if table.density is None else f" at {density_text(table.density)}"
        left.set_title(f"{table.task}{at}: % of a mask's entries, by block", fontsize=10, loc="left")
        right.set_title("by type of module", fontsize=10, loc="left")
    _save(figure, path)


def overlap(tables: Sequence[Overlap], path: Path) -> None:
    """Draw the Jaccard matrices in per cent: a row of panels for each task, a column for each density.

    Args:
        tables: What :func:`~lightning_mask.app.comparison.masks.overlap` returned.
        path: File to write, PNG.
    """
    tasks = list(dict.fromkeys(table.task for table in tables))
    panels = [[table for table in tables if table.task == task] for task in tasks]
    across = min(2, max(map(len, panels)))
    lines = [line[i : i + across] for line in panels for i in range(0, len(line), across)]
    side = 0.36 * max(len(table.strategies) for table in tables) + 1.9
    figure, axes = _figure(len(lines), across, side * across, side * len(lines))
    for axis, table in zip_longest(axes.flat, [t for line in lines for t in [*line, *[None] * (across - len(line))]]):
        if table is None:
            axis.remove()
            continue
        values = 100 * table.values
        np.fill_diagonal(values, math.nan)  # what each has in common with itself says nothing
        axis.set_facecolor("whitesmoke")
        axis.imshow(values, cmap="Blues", norm=PowerNorm(0.5, 0, 100))
        _annotate(axis, values)
        _label(axis, table.strategies, table.strategies)
        axis.set_title(f"{table.task} at {density_text(table.density)}: Jaccard, %{_chance(table)}", fontsize=10)
    _save(figure, path)


def _chance(table: Overlap) -> str:
    """What two independent random masks of density d have in common: d^2 / (2 d - d^2)."""
    if not isinstance(table.density, float):
        return ""
    return f" ({percent(table.density / (2 - table.density))} by chance)"


def _figure(down: int, across: int, width: float, height: float, **ratios: Any) -> tuple[Figure, Any]:
    """A figure of its own canvas: nothing of the user's pyplot is touched."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(down, across, squeeze=False, gridspec_kw=ratios)


def _label(axis: Any, across: Sequence[str], down: Sequence[str]) -> None:
    axis.set_xticks(range(len(across)), across, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(range(len(down)), down, fontsize=9)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _annotate(axis: Any, values: "np.ndarray[Any, np.dtype[np.float64]]") -> None:
    for (y, x), value in np.ndenumerate(values):
        if math.isfinite(value) and value > 0:
            text = f"{value:.0f}" if value >= 9.5 else f"{value:.1f}" if value >= 0.05 else "~0"
            axis.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if value > 40 else "black")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120, format="png")
