"""From scores to masks: the best units within their budgets, the best of every few neighbours, or units at random."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core import allocation, structures
from lightning_mask.core.allocation import Budget, Budgets
from lightning_mask.core.criteria import random_scores
from lightning_mask.core.draw import draw_entries
from lightning_mask.core.ranking import top_k
from lightning_mask.core.sharding import shard, whole
from lightning_mask.core.transposed import transposed_weights, turned, turned_shape

Shapes = Mapping[str, tuple[int, ...]]


def choose(
    scores: Mapping[str, Tensor],
    budgets: Budgets,
    structure: str | structures.Structure,
    allocation_name: str,
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Return the masks that keep the best units of ``scores`` within their budgets.

    Units are taken by the mean score of their entries, the best first; of equal ones the first. Of entries each budget is
    met exactly; of larger units, those that together come nearest to it are kept (the fewer of two that come as near), at
    least one.

    Args:
        scores: Name to real tensor of the parameter's shape.
        budgets: Tensors of ``scores`` and what to keep of them; together all of ``scores``.
        structure: What a unit is.
        allocation_name: How each budget is shared among its tensors.
        model: The module whose parameters are meant; for structures that are read from it (``head``, ``layer``).

    Raises:
        ValueError: If a tensor cannot have that structure, or units span tensors of two budgets.
    """
    masks = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items() if not score.numel()}
    shapes = {name: tuple(score.shape) for name, score in scores.items() if name not in masks}
    for groups, keep in share_out(shapes, budgets, structure, allocation_name, model):
        units = [structures.unit_scores(scores, group) for group in groups]
        masks |= _kept(groups, units, keep, allocation_name, scores)
    return {name: masks[name] for name in scores}


def _kept(
    groups: Sequence[structures.Group],
    units: Sequence[Tensor],
    keep: int,
    allocation_name: str,
    like: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Masks of the tensors in ``groups``, of the best units within ``keep`` entries."""
    if allocation_name == "row":
        (entries,) = units
        chosen = [_best_of_each_row(entries, keep)]
    else:
        chosen = _best(units, [structures.unit_size(group) for group in groups], keep)
    found = (structures.spread(mask, group, like) for group, mask in zip(groups, chosen, strict=True))
    return {name: mask for masks in found for name, mask in masks.items()}


def share_out(
    shapes: Shapes,
    budgets: Budgets,
    structure: str | structures.Structure,
    allocation_name: str,
    model: nn.Module | None = None,
    transposed: Mapping[str, int] | None = None,
) -> list[tuple[list[structures.Group], int]]:
    """Return the groups of tensors whose units are ranked against each other, and how many entries of theirs to keep.

    Where units span several tensors, what the allocation gives to each of these is added up.

    Args:
        shapes: Name to shape of the tensors in scope.
        budgets: As in :func:`choose`.
        structure: What a unit is.
        allocation_name: How each budget is shared among its tensors.
        model: As in :func:`choose`; and the one whose weights may lie the other way round, as ``(in, out, ...)``.
        transposed: Names of such weights, and their numbers of groups, where there is no model to read them from.

    Raises:
        ValueError: As :func:`choose`.
    """
    if transposed is None:
        transposed = transposed_among(shapes, structure, allocation_name, model)
    shapes = {name: turned_shape(shape, transposed.get(name, 0)) for name, shape in shapes.items()}
    groups = structures.facing(structures.get(structure)(shapes, model), transposed)
    at = {name: i for i, group in enumerate(groups) for name in group}
    shares: list[tuple[set[int], int]] = []
    for names, budget in budgets:
        mine = {name: shapes[name] for name in names if name in shapes}
        torn = next((group for group in groups if 0 < len(group.keys() & mine.keys()) < len(group)), None)
        if torn is not None:
            inside, outside = (next(n for n in torn if (n in mine) == there) for there in (True, False))
            raise ValueError(
                f"density: {inside} and {outside} share units of structure={structure!r} and have different budgets; put them "
                "under one pattern."
            )
        for together, keep in allocation.get(allocation_name)(mine, budget):
            members = {at[name] for name in together}
            joined = [share for share in shares if share[0] & members]
            shares = [share for share in shares if not share[0] & members]
            shares.append((members.union(*(m for m, _ in joined)), keep + sum(k for _, k in joined)))
    return [([groups[i] for i in sorted(members)], keep) for members, keep in shares if members]


def transposed_among(
    names: Collection[str], structure: str | structures.Structure, allocation_name: str, model: nn.Module | None
) -> dict[str, int]:
    """Which tensors lie as ``(in, out, ...)``, and in how many groups; none where it makes no difference."""
    if model is None or not structures.tells_sides(structure, allocation_name):
        return {}
    return {name: groups for name, groups in transposed_weights(model).items() if name in names}


def n_of_m(
    scores: Mapping[str, Tensor], n: int, m: int, transposed: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Return the masks that keep the ``n`` best of every ``m`` neighbours along the input dimension; ties by position.

    A weight's input dimension is everything but its first, flattened (``in, kh, kw`` for a convolution), which is the
    layout that sparse tensor cores read; of a weight that lies as ``(in, out, ...)``, everything but the second.

    Args:
        scores: Name to real tensor of the parameter's shape.
        n: How many are kept.
        m: Of how many.
        transposed: Names of weights of shape ``(in, out, ...)``, and their numbers of groups.

    Raises:
        ValueError: If the input dimension of a tensor is not divisible by ``m``.
    """
    masks = {}
    for name, score in scores.items():
        groups = (transposed or {}).get(name, 0)
        check_n_of_m(name, tuple(score.shape), m, groups)
        rows = turned(whole(score).detach(), groups)
        mask = _best_of_lines(rows.reshape(-1, m), n).view(rows.shape)
        masks[name] = shard(turned(mask, groups).contiguous(), score)
    return masks


def check_n_of_m(name: str, shape: tuple[int, ...], m: int, groups: int = 0) -> None:
    """Refuse a tensor that has no groups of ``m`` along its input dimension.

    Args:
        name: Of the tensor, in the error.
        shape: Of the tensor.
        m: How many neighbours.
        groups: Of a weight that lies as ``(in, out, ...)``; else 0.

    Raises:
        ValueError: Naming the tensor and its width.
    """
    width = math.prod(turned_shape(shape, groups)[1:]) if len(shape) > 1 else 0
    if not width or width % m:
        raise ValueError(
            f"{name} of shape {shape} has an input width of {width}, which is not divisible by {m}; take it out of the scope."
        )


def taken_of(groups: Sequence[structures.Group], keep: int) -> int:
    """Return how many entries the units of ``groups`` that come nearest to ``keep`` have; ``keep``, where they differ in size.

    Args:
        groups: As :func:`share_out` returns them.
        keep: Likewise.
    """
    sizes = {structures.unit_size(group) for group in groups}
    if len(sizes) > 1:
        return keep
    (size,) = sizes
    return size * _units(size, sum(math.prod(structures.unit_shape(group)) for group in groups), keep)


def _units(size: int, of: int, keep: int) -> int:
    """How many of ``of`` units of one size come nearest to ``keep`` entries: the fewer of two that come as near, at least one."""
    return min(max((2 * keep + size - 1) // (2 * size), min(keep, 1)), of)


def _best(units: Sequence[Tensor], sizes: Sequence[int], keep: int) -> list[Tensor]:
    """Masks of the best units whose entries together come nearest to ``keep``."""
    if len(set(sizes)) == 1:
        return top_k(units, _units(sizes[0], sum(u.numel() for u in units), keep))
    scores = torch.cat([whole(u).reshape(-1).float().cpu() for u in units])
    widths = torch.cat([torch.full((u.numel(),), s) for u, s in zip(units, sizes, strict=True)])
    order = torch.argsort(scores, descending=True, stable=True)
    taken = torch.cat([torch.zeros(1, dtype=torch.int64), widths[order].cumsum(0)])
    count = int((taken - keep).abs().argmin())
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[: max(count, min(keep, 1))]] = True
    return [m.to(u.device) for m, u in zip(mask.split([u.numel() for u in units]), units, strict=True)]


def _best_of_each_row(score: Tensor, keep: int) -> Tensor:
    """Mask of the best entries of each row of one tensor, ``keep`` in all."""
    lines = whole(score).detach().reshape(allocation.row_count(tuple(score.shape)), -1)
    each, more = allocation.of_each_row(keep, len(lines))
    return torch.cat([_best_of_lines(lines[:more], each + 1), _best_of_lines(lines[more:], each)])


def _best_of_lines(lines: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` best of each line of a two-dimensional tensor; ties by position; a few lines at a time."""
    mask = torch.zeros(lines.shape, dtype=torch.bool, device=lines.device)
    at_once = max(_AT_ONCE // max(lines.shape[1], 1), 1)
    for part, out in zip(lines.split(at_once), mask.split(at_once), strict=True):
        order = part.float().argsort(dim=1, descending=True, stable=True)
        out.scatter_(1, order[:, :k], True)
    return mask


_AT_ONCE = 1 << 16


def draw_random(recipe: Mapping[str, Any], shapes: Shapes, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the masks of a random recipe, which depend on its seed and the shapes of the tensors in scope alone.

    Each unit is as likely as any other, whatever its size. A recipe whose structure is read from the model needs ``model``
    too.
    """
    parts = recipe.get("budgets", [[list(shapes), recipe["density"]]])
    budgets = [(names, Budget(amount)) for names, amount in parts]
    seed, structure, allocation_name = recipe["seed"], recipe["structure"], recipe["allocation"]
    transposed = recipe.get("transposed", {})
    masks: dict[str, Tensor] = {}
    if structure == "entry" and allocation_name != "row":
        for names, budget in budgets:
            masks |= draw_entries({name: shapes[name] for name in names}, budget, allocation_name, seed)
        return {name: masks[name] for name in shapes}
    like = {name: torch.empty(()).expand(shape) for name, shape in shapes.items()}
    for groups, keep in share_out(shapes, budgets, structure, allocation_name, model, transposed):
        noise = [next(iter(random_scores({next(iter(g)): structures.unit_shape(g)}, seed).values())) for g in groups]
        masks |= _kept(groups, noise, keep, allocation_name, like)
    return {name: masks[name] for name in shapes}
