"""A training step in every way, in one process: time and memory."""

import statistics
from typing import Any

from benchmark.memory import mask_bytes, mask_files, peaks_mb, ranking_bytes
from benchmark.model import DENSITY, Classifier, random_masks
from benchmark.turns import Clock, interleave, ratio, size
from benchmark.ways import BY_HAND, FUSED, step_ways
from lightning_mask.core.compact import Slots

Rows = list[dict[str, Any]]


def step(base: Classifier, rounds: int, steps: int) -> tuple[Rows, Rows]:
    """Time every way; return the rows, and the goals with what was measured."""
    clocks = interleave(step_ways(), base, rounds, steps)
    rows = [
        {
            "way": name,
            "ms": statistics.median(clock.turns_ms()),
            "over unmasked": over(clocks, name, FUSED),
            "optimizer MB": clock.state_bytes / 1e6,
            "gradient MB": clock.gradient_bytes / 1e6,
        }
        for name, clock in clocks.items()
    ]
    fastest = min(BY_HAND, key=lambda name: statistics.median(clocks[name].turns_ms()))
    pairs = [
        ("entry mask at 1 %: step over unmasked", "ours", FUSED, 0.95),
        ("the same over hand-written multiply + restore", "ours", next(iter(BY_HAND)), 0.70),
        (f"the same over the fastest hand-written way ({fastest.partition(': ')[2]})", "ours", fastest, 0.82),
        ("1 % of rows: step over the linears whole", "linears, 1 % of the rows: ours", LINEARS_WHOLE, 0.72),
        ("last layer + head: step over unmasked", "last layer + head: ours", FUSED, 0.35),
        ("the same over a hand-written loop", "last layer + head: ours", "last layer + head by hand", 1.03),
        ("linears pruned to 90 %: step over unpruned", f"{PRUNED}: ours", FUSED, 1.0),
        ("the same with PyTorch's default AdamW", f"{PRUNED}, AdamW default: ours", "unmasked, AdamW default", 1.0),
        ("all matrices pruned to 90 %: step over unpruned", "all matrices pruned to 90 %: ours", FUSED, 1.0),
        ("everything active: step over no callback", "everything active: ours", FUSED, 1.01),
    ]
    goals = [goal(what, limit, over(clocks, one, other)) for what, one, other, limit in pairs]
    dense, sparse, density = clocks[FUSED], clocks["ours"], random_masks(base, DENSITY).density()
    goals += [
        goal("optimizer state over density * dense", 1.02, sparse.state_bytes / dense.state_bytes / density),
        goal("gradients alive after backward over dense", 0.015, sparse.gradient_bytes / dense.gradient_bytes),
    ]
    return rows, goals


LINEARS_WHOLE = "linears trained whole, by hand"
PRUNED = "linears pruned to 90 %"


def goal(what: str, limit: float, measured: float) -> dict[str, Any]:
    """A row of the table of goals; smaller is better in all of them."""
    return {"what": what, "goal at most": limit, "measured": measured, "met": measured <= limit}


def over(clocks: dict[str, Clock], one: str, other: str) -> float:
    return ratio(clocks[one].turns_ms(), clocks[other].turns_ms())


def memory() -> tuple[Rows, Rows, Rows]:
    """Return the peaks of all ways, the sizes of mask files and of a ranking, and the goals."""
    peaks = peaks_mb(step_ways)
    rows = [{"way": name, "peak MB": training, "and to the end": end} for name, (training, end) in peaks.items()]
    files, ranking = mask_files(), ranking_bytes()
    goals = [
        goal("memory beyond the scores while ranking, bytes an entry", 0.1, ranking),
        goal("mask file over n/8 + 4 KiB a tensor", 1.0, files[0]["over n/8 + 4 KiB a tensor"]),
        goal("file of a seeded mask over the bits it stands for", 0.05, files[1]["bytes"] / (files[1]["entries"] / 8)),
    ]
    return rows, files, goals


def bytes_per_entry(base: Classifier, step_rows: Rows, ddp_rows: Rows) -> dict[str, float]:
    """What the measured bytes of ours come to for each active entry, and the mask's for each entry of the model."""
    masks = random_masks(base, DENSITY)
    slots = [Slots(mask) for mask in masks.values() if 0 < int(mask.sum()) < mask.numel()]
    row = next(r for r in step_rows if r["way"] == "ours")
    sent = next(r for r in ddp_rows if r["way"] == "ours")["sent MB"]
    active = masks.count()
    return {
        "optimizer": row["optimizer MB"] * 1e6 / active,
        "gradient": row["gradient MB"] * 1e6 / active,
        "wire": sent * 1e6 / active,
        "index and values": sum(size(s.index) + 4 * s.size for s in slots) / active,
        "mask": mask_bytes(masks) / masks.numel(),
    }


def dense_bytes_per_entry(base: Classifier, step_rows: Rows, ddp_rows: Rows) -> dict[str, float]:
    """The same for training everything."""
    row = next(r for r in step_rows if r["way"] == FUSED)
    n = sum(p.numel() for p in base.parameters())
    return {
        "optimizer": row["optimizer MB"] * 1e6 / n,
        "gradient": row["gradient MB"] * 1e6 / n,
        "wire": ddp_rows[0]["sent MB"] * 1e6 / n,
        "index and values": 0.0,
        "mask": 0.0,
    }


def at_scale(dense: dict[str, float], ours: dict[str, float]) -> Rows:
    """Gigabytes of one rank, from the measured bytes of an entry, for n parameters and R ranks that hold a copy each.

    With d = 1 for dense and the density for ours, and b the measured bytes of an (active) entry::

        optimizer = b_optimizer * d * n                    gradients = b_gradient * d * n
        wire      = b_wire * d * n * 2 (R - 1) / R         sent in a step by each rank of a ring all-reduce
        mask      = b_mask * n + b_index * d * n           the mask, and the indices and values of what is active

    Sharded over the ranks (FSDP2) optimizer, gradients and mask are divided by R.
    """
    rows = []
    for n in (1e9, 7e9, 70e9):
        for ranks in (8, 64):
            for way, d, each in (("dense", 1.0, dense), (f"ours, {DENSITY:.0%}", DENSITY, ours)):
                rows.append(
                    {
                        "parameters": f"{n / 1e9:.0f} B",
                        "ranks": ranks,
                        "way": way,
                        "optimizer GB": each["optimizer"] * d * n / 1e9,
                        "sharded": each["optimizer"] * d * n / ranks / 1e9,
                        "gradients GB": each["gradient"] * d * n / 1e9,
                        "wire GB a step": each["wire"] * d * n * 2 * (ranks - 1) / ranks / 1e9,
                        "mask GB": (each["mask"] * n + each["index and values"] * d * n) / 1e9,
                    }
                )
    return rows
