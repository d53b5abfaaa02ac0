"""The sparsity of each layer over time, as a table and, where Matplotlib is installed, as a picture."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mask.core.files import whole_file

History = Sequence[Mapping[str, Any]]
"""As ``PruneMask.history``: rows of ``step``, ``sparsity`` and ``layers``."""


def write_sparsity(history: History, steps: int, path: Path) -> list[Path]:
    """Write what pruning did, each file whole or not at all.

    Args:
        history: One row for each update.
        steps: Length of the run.
        path: Where to, without a suffix.

    Returns:
        The files, ``path.csv``, in which a row is a step, a tensor and its share of zeros, and ``path.png``.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["step", "tensor", "sparsity"])
    for update in history:
        rows.writerow([update["step"], "", f"{update['sparsity']:.6f}"])
        rows.writerows([update["step"], name, f"{value:.6f}"] for name, value in update["layers"].items())
    written = [path.with_suffix(".csv")]
    with whole_file(written[0]) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return written
    written.append(path.with_suffix(".png"))
    with whole_file(written[1]) as temporary:
        _draw(history, steps, temporary)
    return written


def _draw(history: History, steps: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    at = [0, *(update["step"] for update in history), steps]
    names = list(history[-1]["layers"])
    table = [[0.0, *(update["layers"].get(name, 0.0) for update in history)] for name in names]
    figure = Figure(figsize=(9, max(3.0, 1.6 + 0.22 * len(names))), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [1, max(1.0, 0.12 * len(names))]})
    above.stairs(
        [0.0, *(100 * update["sparsity"] for update in history)], at, baseline=None, color="black", linewidth=2
    )
    above.set_ylabel("zeros in scope, %")
    above.grid(alpha=0.3)
    image = below.pcolormesh(at, range(len(names) + 1), [[100 * v for v in row] for row in table], vmin=0, vmax=100)
    below.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=6)
    below.invert_yaxis()
    below.set_xlabel("optimizer step")
    figure.colorbar(image, ax=below, label="zeros, %")
    figure.savefig(path, dpi=130, format="png")
