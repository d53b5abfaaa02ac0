"""Step time and memory against density, as a table and a plot."""

import os
import statistics
from pathlib import Path
from typing import Any

from benchmark.memory import peaks_mb
from benchmark.model import Classifier
from benchmark.turns import Way, interleave
from benchmark.ways import by_hand, installed, ours, shira, shira_entries

DENSITIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.001, 0.0001)
RANKS = (100, 27, 5, 1)
OURS, HAND, SHIRA = "ours", "by hand: bit-and + restore", "PEFT's SHiRA"


def density_ways() -> dict[str, Way]:
    """A way for each point of the plot, named after its line and its density or rank."""
    ways = {}
    for density in DENSITIES:
        ways[f"{OURS}|{density}"] = ours(density)
        ways[f"{HAND}|{density}"] = by_hand("bits", density)
    if installed("peft"):
        ways |= {f"{SHIRA}|{rank}": Way(prepare=shira(rank)) for rank in RANKS}
    return ways


def density(base: Classifier, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measure every point."""
    clocks, peaks = interleave(density_ways(), base, rounds, steps), peaks_mb(density_ways)
    n = sum(p.numel() for p in base.parameters())
    rows = []
    for name, clock in clocks.items():
        way, _, at = name.partition("|")
        rows.append(
            {
                "way": way,
                "density %": 100 * (shira_entries(base, int(at)) / n if way == SHIRA else float(at)),
                "ms": statistics.median(clock.turns_ms()),
                "optimizer MB": clock.state_bytes / 1e6,
                "gradient MB": clock.gradient_bytes / 1e6,
                "peak MB": peaks[name][0],
            }
        )
    return sorted(rows, key=lambda row: (row["way"], -row["density %"]))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw step time and peak memory against density, from 100 % on the left to 0.01 % on the right."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axis, key, label in zip(
        axes, ("ms", "peak MB"), ("step time, ms", "peak memory beyond the model, MB"), strict=True
    ):
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [(row["density %"], row[key]) for row in rows if row["way"] == way]
            axis.plot(*zip(*points, strict=True), marker="o", label=way)
        axis.set(xscale="log", xlabel="entries that train, % of the model", ylabel=label)
        axis.invert_xaxis()
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend()
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        figure.savefig(temporary, dpi=150)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        pyplot.close(figure)
