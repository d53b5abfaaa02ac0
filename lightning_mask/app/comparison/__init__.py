"""From the results of many runs to what can be said of them: a table, paired differences, groups, and where masks lie.

In the order of the work: ``statistics`` (rows, differences and rankings), ``masks`` (where they lie, what they have in
common), ``tables`` and ``pictures``; :func:`report` writes all of it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mask.app.comparison.masks import Masks, Overlap, Where, block_and_kind, jaccard, overlap, where
from lightning_mask.app.comparison.statistics import (
    BASELINES,
    CONFIDENCE,
    FEWEST,
    MODES,
    Density,
    Difference,
    Ranking,
    Row,
    density_text,
    holm,
    judged,
    paired,
    percent,
    rank,
    summarise,
)
from lightning_mask.app.comparison.tables import as_csv, as_markdown, markdown_table, overlap_csv
from lightning_mask.core.files import whole_file

__all__ = [
    "BASELINES",
    "CONFIDENCE",
    "FEWEST",
    "MODES",
    "Density",
    "Difference",
    "Overlap",
    "Ranking",
    "Row",
    "Where",
    "block_and_kind",
    "density_text",
    "holm",
    "jaccard",
    "judged",
    "markdown_table",
    "overlap",
    "paired",
    "percent",
    "rank",
    "report",
    "require_tools",
    "summarise",
    "where",
]


def report(results: Sequence[Mapping[str, Any]], folder: Path, baselines: Sequence[str] = BASELINES) -> Path:
    """Write tables and pictures of many runs into ``folder``: each file whole, or not at all.

    ``table.md``, ``table.csv`` and ``quality.png`` always; ``where.png``, ``overlap.csv`` and ``overlap.png`` where there
    are masks to show. Files of an earlier report that this one has no content for are removed.

    Args:
        results: One mapping for each run that ended: ``task``, ``strategy``, ``density`` (share, number or None), ``lr``,
            ``seed``, ``score`` (None or nan: not finite) and its name ``metric``; and, if known, ``mode`` ("max": higher is
            better, as without it, or "min"), ``val_score``, ``active`` and ``total`` (entries), ``seconds``,
            ``optimizer_bytes``, ``masks`` (file), and ``lr_at_end`` (whether no rate beyond it was tried). One with an
            ``error`` is listed, and is part of nothing else.
        folder: Where to write; it is made.
        baselines: Strategies that all others are compared with: at the same density if the baseline has one.

    Returns:
        The path of ``table.md``.

    Raises:
        ImportError: If SciPy or Matplotlib is missing.
        ValueError: If there is no result without an error, one lacks a key, two are of the same run, a task has two metrics, or
            masks of one task are of different models.
        FileNotFoundError: If a file of masks is not there.
    """
    require_tools()
    from lightning_mask.app.comparison import pictures

    failed = [result for result in results if result.get("error") is not None]
    rows = summarise(results, baselines)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "table.md"
    _write(folder / "table.csv", as_csv(rows, baselines))
    _write(table, as_markdown(rows, baselines, (), failed))
    with whole_file(folder / "quality.png") as temporary:
        pictures.quality(rows, baselines, temporary)
    drawn = ["quality.png"]
    masks = Masks()
    overlaps = overlap(rows, masks)
    shares = where(rows, masks)
    if shares:
        with whole_file(folder / "where.png") as temporary:
            pictures.where(shares, temporary)
        drawn.append("where.png")
    else:
        (folder / "where.png").unlink(missing_ok=True)
    if overlaps:
        _write(folder / "overlap.csv", overlap_csv(overlaps))
        with whole_file(folder / "overlap.png") as temporary:
            pictures.overlap(overlaps, temporary)
        drawn.append("overlap.png")
    else:
        for name in ("overlap.csv", "overlap.png"):
            (folder / name).unlink(missing_ok=True)
    _write(table, as_markdown(rows, baselines, drawn, failed))
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


def _write(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
