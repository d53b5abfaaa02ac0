"""Where masks lie in a model, and how much those of different strategies have in common."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lightning_mask.app.comparison.statistics import Density, Row, by_task, density_order
from lightning_mask.core.maskset import MaskSet

_MOST_KINDS = 16
"""Types of modules that are told apart; the smallest of more are put together."""
_ONES = np.array([bin(byte).count("1") for byte in range(256)], dtype=np.uint8)
"""Number of ones in each byte."""


class Masks:
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


def overlap(rows: Sequence[Row], masks: Masks | None = None) -> list[Overlap]:
    """Return the Jaccard matrices of each task and density that two strategies or more have masks at.

    Args:
        rows: What :func:`~lightning_mask.app.comparison.statistics.summarise` returned.
        masks: Where masks are read through.

    Raises:
        ValueError: As for :func:`jaccard`.
    """
    masks = masks or Masks()
    found = []
    for task, here in by_task(rows).items():
        for density in sorted({r.density for r in here if not r.is_whole and r.masks}, key=density_order):
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


def where(rows: Sequence[Row], masks: Masks | None = None) -> list[Where]:
    """Return, for each task with masks, where they lie: at the density that most strategies have, in the middle of several.

    Args:
        rows: What :func:`~lightning_mask.app.comparison.statistics.summarise` returned.
        masks: Where masks are read through.

    Raises:
        ValueError: If masks of one task are of different models.
    """
    masks = masks or Masks()
    found = []
    for task, here in by_task(rows).items():
        with_masks = [r for r in here if r.masks]
        if not with_masks:
            continue
        at = [r.density for r in with_masks if not r.is_whole]
        often = sorted({d for d in at if at.count(d) == max(map(at.count, at))}, key=density_order)
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
    if len(kinds) <= _MOST_KINDS:
        return list(kinds), dict(shares)
    by_size = sorted(range(len(kinds)), key=lambda i: -max(row[i] for row in shares.values()))
    kept = sorted(by_size[: _MOST_KINDS - 1])
    less = {name: [*(row[i] for i in kept), sum(row) - sum(row[i] for i in kept)] for name, row in shares.items()}
    return [*(kinds[i] for i in kept), "others"], less
