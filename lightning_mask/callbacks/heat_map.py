"""The density of each layer, ordered as a network is: blocks from left to right, types of tensors from top to bottom."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = tuple[int, int]
"""Active entries, and entries."""


@dataclass
class Grid:
    """Tensors that a network repeats in block after block, or those that it has once.

    Args:
        name: Of the blocks, with ``*`` for their numbers; empty for what is not repeated.
        types: What the tensors are called inside of a block; for what is not repeated, their whole names.
        blocks: Numbers of the blocks; for what is not repeated, one empty word.
        cells: By type and block.
    """

    name: str
    types: list[str] = field(default_factory=list)
    blocks: list[str] = field(default_factory=list)
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def add(self, kind: str, block: str, cell: Cell) -> None:
        """Put a tensor in its place."""
        if kind not in self.types:
            self.types.append(kind)
        if block not in self.blocks:
            self.blocks.append(block)
        self.cells[kind, block] = cell


def grids(tensors: Iterable[tuple[str, int, int]]) -> list[Grid]:
    """Order tensors by block and type.

    Args:
        tensors: Name, active entries and entries of each, in the model's order.

    Returns:
        One grid for each series of two or more blocks whose tensors have names of their own, then one for all else.

    Example:
        >>> first, rest = grids([("h.0.q.weight", 1, 9), ("h.1.q.weight", 9, 9), ("head.weight", 3, 3)])
        >>> first.name, first.types, first.blocks, rest.types
        ('h.*', ['q.weight'], ['0', '1'], ['head.weight'])
    """
    placed = [(_place(name), (count, total), name) for name, count, total in tensors]
    blocks: dict[str, dict[str, None]] = {}
    for (series, block, _), _, _ in placed:
        blocks.setdefault(series, {})[block] = None
    found: dict[str, Grid] = {}
    rest = Grid("")
    for (series, block, kind), cell, name in placed:
        if series and len(blocks[series]) > 1 and "." in kind:
            found.setdefault(series, Grid(series)).add(kind, block, cell)
        else:
            rest.add(name, "", cell)
    return [*found.values(), *([rest] if rest.types else [])]


def _place(name: str) -> tuple[str, str, str]:
    """Series of blocks, number of the block, and type of a tensor: "net.layers.1.0.conv.weight" is in "net.layers.*.*"."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return "", "", name
    end = next((i for i in range(first, len(parts)) if not parts[i].isdigit()), len(parts))
    return ".".join([*parts[:first], *"*" * (end - first)]), ".".join(parts[first:end]), ".".join(parts[end:])


def shade(density: float) -> float:
    """Return how strongly a density is coloured, in [0, 1]: its cube root, as a thousandth is to be seen, too."""
    return max(0.0, min(density, 1.0)) ** (1 / 3)


def draw_heat_map(tensors: Sequence[tuple[str, int, int]], title: str) -> Any:
    """Return a picture of the density of each tensor, uint8 [height, width, 3]; needs Matplotlib.

    Args:
        tensors: Name, active entries and entries of each, in the model's order.
        title: Of the picture.
    """
    shown = grids(tensors)
    heights = [len(grid.types) for grid in shown]
    widest = max(len(grid.blocks) for grid in shown)
    figure = _figure(min(3.5 + 0.42 * max(widest, 6), 20), min(1.1 + 0.24 * sum(heights) + 0.6 * len(shown), 60))
    figure.suptitle(title, fontsize=9)
    for grid, axes in zip(
        shown, figure.subplots(len(shown), 1, squeeze=False, height_ratios=heights)[:, 0], strict=True
    ):
        shades = [[_shade(grid.cells.get((kind, block))) for block in grid.blocks] for kind in grid.types]
        image = axes.imshow(shades, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        axes.set_yticks(range(len(grid.types)), [_ending(kind) for kind in grid.types], fontsize=6)
        axes.set_xticks(range(len(grid.blocks)), grid.blocks, fontsize=6)
        axes.set_title(grid.name, fontsize=7)
    bar = figure.colorbar(image, ax=figure.axes, label="active entries")
    marks = (0.0, 0.001, 0.01, 0.1, 1.0)
    bar.set_ticks([shade(mark) for mark in marks], labels=[f"{mark:.4g}" for mark in marks])
    return _pixels(figure)


def draw_confusion(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> Any:
    """Return a picture of a confusion matrix, uint8 [height, width, 3]; needs Matplotlib.

    Args:
        counts: Rows are true classes, columns are predicted ones.
        names: Of the classes.
        title: Of the picture.
    """
    size = min(2.5 + 0.42 * len(names), 20)
    figure = _figure(size + 0.8, size)
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in counts]
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(counts if len(names) <= 30 else []):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, str(count), ha="center", va="center", color=colour, fontsize=7)
    labels = [_ending(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    axes.set_yticks(range(len(names)), labels, fontsize=7)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, label="share of the true class")
    return _pixels(figure)


def _shade(cell: Cell | None) -> float:
    return float("nan") if cell is None else shade(cell[0] / max(cell[1], 1))


def _ending(name: str, length: int = 44) -> str:
    """The end of a name, which tells the most; dollars would be read as formulas."""
    return (name if len(name) <= length else f"…{name[1 - length :]}").replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure: Any) -> Any:
    import numpy as np

    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
