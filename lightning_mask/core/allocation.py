"""Allocations: how a budget of entries is shared among the tensors in scope."""

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
Groups = list[tuple[list[str], int]]
"""Tensors that are ranked against each other, and how many entries of theirs to keep."""

Budgets = Sequence[tuple[Sequence[str], "Budget"]]
"""Tensors, and the budget that they share; no tensor has two."""


def share(fraction: float, n: int) -> int:
    """Return ``floor(fraction * n + 0.5)``: the number of entries that a share of ``n`` means."""
    return math.floor(fraction * n + 0.5)


@dataclass(frozen=True)
class Budget:
    """How many entries to keep: a share (float) or a number (int) of them, or what is left when that is taken away.

    Attributes:
        amount: A float is a share of the entries, an int their number (1 is one entry, 1.0 is all).
        removed: True when ``amount`` says what is taken away (sparsity) and not what is kept (density).
    """

    amount: float | int
    removed: bool = False

    def keep(self, n: int) -> int:
        """Number of entries kept of ``n``; the count from a share is ``floor(share * n + 0.5)``.

        Raises:
            ValueError: If ``amount`` is a number above ``n``.
        """
        count = share(self.amount, n) if isinstance(self.amount, float) else self.amount
        if count > n:
            raise ValueError(
                f"{count:,} entries were asked for and the scope has {n:,}; lower the number or widen the scope."
            )
        return n - count if self.removed else count


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: math.prod(shape) for name, shape in shapes.items()}


def global_(shapes: Shapes, budget: Budget) -> Groups:
    """Rank all entries against each other."""
    return [(list(shapes), budget.keep(sum(_sizes(shapes).values())))]


def uniform(shapes: Shapes, budget: Budget) -> Groups:
    """Keep the same share of every tensor."""
    sizes = _sizes(shapes)
    if isinstance(budget.amount, float):
        return [([name], budget.keep(n)) for name, n in sizes.items()]
    return _in_proportion(sizes, sizes, budget.keep(sum(sizes.values())))


def erk(shapes: Shapes, budget: Budget) -> Groups:
    """Erdos-Renyi-Kernel: a tensor's density is proportional to ``sum(shape) / prod(shape)``, at most 1.

    Source: Evci et al., "Rigging the Lottery" (2020), section 3 (1); Mocanu et al. (2018) without the kernel dimensions.
    Tensors that would pass 1 are kept whole and the rest is scaled again; the counts add up to the budget exactly, and none
    falls when the budget grows.
    """
    sizes = _sizes(shapes)
    weights = {
        name: float(sum(shape)) if sizes[name] and shape else float(sizes[name]) for name, shape in shapes.items()
    }
    return _in_proportion(weights, sizes, budget.keep(sum(sizes.values())))


def row(shapes: Shapes, budget: Budget) -> Groups:
    """Keep equally many entries of each row (output unit, dimension 0 of shapes ``(out, in, ...)``): its best inputs.

    A vector is one row. A share keeps ``floor(share * width + 0.5)`` of a row; a number of entries is dealt out to all rows
    equally, where they are wide enough, and rows differ by one at most. :func:`of_each_row` says how many of a row from the
    count of its tensor.

    Source: Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning" (GPS, 2024), takes the
    same number of the connections into each neuron.
    """
    sizes = _sizes(shapes)
    rows = {name: row_count(shape) if sizes[name] else 0 for name, shape in shapes.items()}
    if isinstance(budget.amount, float):
        return [([name], n and rows[name] * budget.keep(n // rows[name])) for name, n in sizes.items()]
    return _in_proportion(rows, sizes, budget.keep(sum(sizes.values())))


def row_count(shape: tuple[int, ...]) -> int:
    """Number of rows of a tensor of that shape; a vector or a single entry is one."""
    return shape[0] if len(shape) > 1 else 1


def of_each_row(keep: int, rows: int) -> tuple[int, int]:
    """Return how many entries each of ``rows`` rows keeps of ``keep`` in all, and how many of the first rows keep one more."""
    return divmod(keep, rows)


def _in_proportion(weights: Mapping[str, float], sizes: Mapping[str, int], total: int) -> Groups:
    """Share ``total`` in proportion to ``weights``, none above its size; what is cut off is shared among the others.

    Shares are rounded by Webster's method: the next entry goes where ``(count + 0.5) / weight`` is least, to the first of
    equal ones. So a larger total gives no tensor less, and along a ramp what is pruned can stay pruned.
    """
    whole: set[str] = set()
    while True:
        free = [name for name in sizes if name not in whole]
        left = total - sum(sizes[name] for name in whole)
        weight = sum(weights[name] for name in free)
        unit = left / weight if weight else 0.0
        over = {name for name in free if unit * weights[name] > sizes[name]}
        if not over:
            break
        whole |= over
    least = (
        unit - len(free) / (2 * weight) if weight else 0.0
    )  # rounding cannot bring the entries per weight below this
    counts = {name: max(min(math.floor(least * weights[name] - 1.5), size), 0) for name, size in sizes.items()}
    queue = [((counts[n] + 0.5) / weights[n], i, n) for i, (n, size) in enumerate(sizes.items()) if counts[n] < size]
    heapq.heapify(queue)
    for _ in range(total - sum(counts.values())):
        _, i, name = heapq.heappop(queue)
        counts[name] += 1
        if counts[name] < sizes[name]:
            heapq.heappush(queue, ((counts[name] + 0.5) / weights[name], i, name))
    return [([name], count) for name, count in counts.items()]


ALLOCATIONS: dict[str, Callable[[Shapes, Budget], Groups]] = {
    "global": global_,
    "uniform": uniform,
    "erk": erk,
    "row": row,
}


def get(name: str) -> Callable[[Shapes, Budget], Groups]:
    """Return the allocation of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation={name!r} is unknown; there are {', '.join(sorted(ALLOCATIONS))}.")
    return ALLOCATIONS[name]
