"""Allocations: how a budget of entries is shared among the tensors in scope."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
Groups = list[tuple[list[str], int]]
"""Tensors that are ranked against each other, and how many entries of theirs to keep."""


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
    n = sum(sizes.values())
    wanted = {name: budget.keep(n) / max(n, 1) * size for name, size in sizes.items()}
    return [([name], count) for name, count in largest_remainders(wanted, sizes, budget.keep(n)).items()]


def erk(shapes: Shapes, budget: Budget) -> Groups:
    """Erdos-Renyi-Kernel: a tensor's density is proportional to ``sum(shape) / prod(shape)``, at most 1.

    Source: Evci et al., "Rigging the Lottery" (2020), section 3 (1); Mocanu et al. (2018) without the kernel dimensions.
    Tensors that would pass 1 are kept whole and the rest is scaled again; the counts add up to the budget exactly
    (largest remainders first).
    """
    sizes = _sizes(shapes)
    total = budget.keep(sum(sizes.values()))
    raw = {name: sum(shape) / max(sizes[name], 1) if shape else 1.0 for name, shape in shapes.items()}
    whole: set[str] = set()
    while True:
        free = [name for name in shapes if name not in whole]
        left = total - sum(sizes[name] for name in whole)
        weight = sum(raw[name] * sizes[name] for name in free)
        epsilon = left / weight if weight else 0.0
        over = {name for name in free if epsilon * raw[name] > 1}
        if not over:
            break
        whole |= over
    wanted = {n: float(sizes[n]) if n in whole else epsilon * raw[n] * sizes[n] for n in shapes}
    return [([name], count) for name, count in largest_remainders(wanted, sizes, total).items()]


def largest_remainders(wanted: Mapping[str, float], sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """Round ``wanted`` to whole numbers that add up to ``total``, none above its size."""
    counts = {name: min(math.floor(value), sizes[name]) for name, value in wanted.items()}
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    missing = total - sum(counts.values())
    while missing > 0:
        room = [name for name in order if counts[name] < sizes[name]][:missing]
        for name in room:
            counts[name] += 1
        missing -= len(room)
    return counts


ALLOCATIONS: dict[str, Callable[[Shapes, Budget], Groups]] = {
    "global": global_,
    "uniform": uniform,
    "erk": erk,
}


def get(name: str) -> Callable[[Shapes, Budget], Groups]:
    """Return the allocation of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in ALLOCATIONS:
        raise ValueError(f"allocation={name!r} is unknown; there are {', '.join(sorted(ALLOCATIONS))}.")
    return ALLOCATIONS[name]
