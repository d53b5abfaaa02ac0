"""Whether a sparsity can be reached beside what FreezeMask and PhaseUnfreeze hold: a held entry is not pruned."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_mask.core import allocation as allocations
from lightning_mask.core import sharding
from lightning_mask.core.allocation import Budget
from lightning_mask.core.maskset import active
from lightning_mask.core.patterns import resolve
from lightning_mask.core.schedules import Ramp
from lightning_mask.core.selection import Selection
from lightning_mask.core.transposed import transposed_weights, turned_shape

if TYPE_CHECKING:
    from lightning_mask.callbacks.session import Session

Parts = Sequence[tuple[list[str], float]]
"""Tensors in scope, and the final sparsity that they share; no tensor has two."""


def check_reach(session: "Session", parts: Parts, allocation: str, free: Mapping[str, Tensor] | None = None) -> None:
    """Refuse a sparsity that what is held for the whole run rules out.

    Args:
        session: Of the fit.
        parts: What is to be pruned, and how far.
        allocation: How the zeros of a part are shared.
        free: Masks of what may change, where they are chosen already; None: what can be told before that.

    Raises:
        ValueError: Naming how much is held, and by whom.
    """
    if session.phases is not None:
        return
    transposed = transposed_weights(session.module) if allocation == "row" else {}
    for scope, sparsity in parts:
        tensors = {name: session.module.get_parameter(name) for name in scope}
        shapes = {name: turned_shape(tuple(t.shape), transposed.get(name, 0)) for name, t in tensors.items()}
        for names, keep in allocations.get(allocation)(shapes, Budget(sparsity, removed=True)):
            total = sum(tensors[name].numel() for name in names)
            changes = _free_of_all(session, names) if free is None else sum(active(free[name]) for name in names)
            if total - keep > changes and total - keep > changes + sum(_zeros(tensors[n]) for n in names):
                of = "in scope" if len(names) == len(scope) else f"of {names[0]}"
                held = f"FreezeMask holds all but {changes:,} of them"
                if not session.freezers:
                    held = f"all but {changes:,} of them do not train (requires_grad=False, or in no optimizer)"
                raise ValueError(
                    f"PruneMask: sparsity={sparsity} of the {total:,} entries {of} cannot be reached: {held}, and a held "
                    "entry is not pruned; let them train, give PruneMask a scope that trains, or set prune_held=True."
                )


def check_phases(session: "Session", parts: Parts, ramp: Ramp) -> None:
    """Refuse a ramp that rises in a phase that lets too little of the scope change; all are measured by now.

    What comes after a phase that a metric ends is not known yet, and is left to the updates.

    Raises:
        ValueError: Naming the phase.
    """
    phases = session.phases
    if phases is None:
        return
    for names, sparsity in parts:
        tensors = [session.module.get_parameter(name) for name in names]
        total, zeros = sum(t.numel() for t in tensors), sum(_zeros(t) for t in tensors)
        start, reached = 0.0, 0
        for i, (phase, end) in enumerate(zip(phases.phases, phases.ends, strict=True)):
            if end == math.inf and i < len(phases.phases) - 1:
                break
            due = ramp.last_update(int(min(end - 1, ramp.end))) if end > start else None
            target = allocations.share(ramp.sparsity(sparsity, due[1]), total) if due else 0
            selection = phase.selection
            free = _free_of_all(session, names) if selection.empty else _free_at_most(selection, session, names)
            if target > reached and target - reached > free + zeros:
                raise ValueError(
                    f"PruneMask: {target:,} of the {total:,} entries in scope are to be zero by the end of {phases.label(i)} of "
                    f"PhaseUnfreeze, which lets only {free:,} of them change, and a held entry is not pruned. Move start and "
                    "end to where they train, let the phase train more of them, or set prune_held=True."
                )
            start, reached = end, max(reached, target)


def _free_of_all(session: "Session", names: list[str]) -> int:
    """How many entries of ``names`` all FreezeMasks can let change, at most; without any, how many train."""
    if session.freezers:
        return min(_free_at_most(freezer.selection, session, names) for freezer in session.freezers)
    trains = session.trainable & session.owned
    return sum(session.module.get_parameter(name).numel() for name in names if name in trains)


def _free_at_most(selection: Selection, session: "Session", names: list[str]) -> int:
    """How many entries of ``names`` the selection can let change, at most."""
    module = session.module
    sizes = {name: module.get_parameter(name).numel() for name in names}
    whole = sum(sizes.get(name, 0) for name in resolve(selection.train or (), module))
    if selection.mask is not None:
        return whole + sum(active(mask) for name, mask in selection.given(module).items() if name in sizes)
    if selection.density is None:
        return whole
    total = whole
    for ranked, budget in selection.budgets(module, session.trainable):
        kept = budget.keep(sum(module.get_parameter(name).numel() for name in ranked))
        total += min(kept, sum(sizes.get(name, 0) for name in ranked))
    return total


def _zeros(tensor: Tensor) -> int:
    return sharding.count(tensor.detach() == 0)
