"""Selection: the whole recipe for one mask, and the pipeline that follows it."""

import copy
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core import allocation, criteria, structures
from lightning_mask.core.allocation import Budget, Budgets
from lightning_mask.core.criteria import Context, Criterion, random_scores
from lightning_mask.core.draw import draw_entries
from lightning_mask.core.maskset import MaskSet, active, full, own
from lightning_mask.core.patterns import Patterns, as_patterns, resolve
from lightning_mask.core.ranking import top_k
from lightning_mask.core.sharding import shard, whole
from lightning_mask.core.transposed import transposed_weights, turned, turned_shape

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Selection:
    """Which entries of a network may change, as a recipe of plain values.

    Args:
        train: Patterns of tensors that may change whole.
        score: Criterion that ranks the entries in ``scope``; its choice is added to ``train``.
        density: Float in (0, 1], the share of the entries in scope that is active; or int, their number. Or a dict of
            patterns to such values: each is a budget of its own for the tensors in scope that its pattern names and no
            earlier one does; what none names is held.
        scope: Patterns of the tensors that are ranked; default: every trainable tensor that ``train`` does not name
            (with ``structure="head"``: of these, the tensors that have heads).
        structure: What is chosen as one unit, by the mean score of its entries: ``entry``, ``row`` (output unit), ``column``
            (input unit), ``head`` (its query, key and value rows and its output columns), ``block:RxC``, ``tensor``,
            ``layer`` (all of a repeated block).
        allocation: How a budget is shared among tensors: ``global``, ``uniform``, ``erk``, ``row`` (the same number of
            entries of each output unit).
        batches: Number of training batches (per rank) shown to a criterion that needs data.
        seed: Seed of random criteria.
        mask: A mask set or the path of one, instead of a criterion.

    Raises:
        ValueError: If a value is out of range or two arguments exclude each other.
    """

    train: Patterns = None
    score: str | Criterion | None = None
    density: float | int | Mapping[str, float | int] | None = None
    scope: Patterns = None
    structure: str = "entry"
    allocation: str = "global"
    batches: int = 32
    seed: int = 0
    mask: str | os.PathLike[str] | MaskSet | None = None

    def __post_init__(self) -> None:
        check_patterns(self.train, "train")
        check_patterns(self.scope, "scope")
        check_shape(self.structure, self.allocation)
        if self.score is not None:
            criteria.get(self.score)
            check_density(self.density)
            if self.mask is not None:
                raise ValueError("score and mask exclude each other: a mask is given or chosen by a criterion.")
        elif self.density is not None or self.scope is not None:
            raise ValueError("density and scope need a criterion: give score=, or leave them out.")
        check_batches(self.batches)

    @property
    def empty(self) -> bool:
        """True when the recipe names nothing at all."""
        return self.train is None and self.score is None and self.mask is None

    def scope_names(self, model: nn.Module, trainable: Collection[str] | None = None) -> list[str]:
        """Return the names of the tensors that the criterion ranks, in the model's order.

        Args:
            model: The module.
            trainable: Names of the tensors that the default scope is drawn from; default: those that require a gradient.

        Raises:
            ValueError: If a pattern matches nothing, or the scope is empty or holds a tensor that is not of real numbers.
        """
        if self.score is None:
            return []
        ranked = {name for names, _ in self.budgets(model, trainable) for name in names}
        return [name for name, _ in model.named_parameters() if name in ranked]

    def budgets(self, model: nn.Module, trainable: Collection[str] | None = None) -> list[tuple[list[str], Budget]]:
        """Return the tensors that are ranked and their budget; several of both where ``density`` is a dict.

        Args:
            model: The module.
            trainable: As in :meth:`scope_names`.

        Raises:
            ValueError: As :meth:`scope_names`; or if a pattern of ``density`` names nothing in scope, or too little for its
                budget, or so much too little that it is not one entry.
        """
        names = self._scope(model, trainable)
        if not isinstance(self.density, Mapping):
            return [(names, Budget(self.density or 0))]
        parts, free = [], dict.fromkeys(names)
        for pattern, amount in self.density.items():
            mine = [name for name in resolve(pattern, model, "density") if name in free]
            where = f"density: the pattern {pattern!r}"
            if not mine:
                raise ValueError(
                    f"{where} names no tensor in scope that an earlier pattern does not name; take it out, move it forward, or "
                    "widen scope."
                )
            entries = sum(model.get_parameter(name).numel() for name in mine)
            if isinstance(amount, int) and amount > entries:
                raise ValueError(f"{where} asks for {amount:,} of {entries:,} entries; lower the number.")
            if not Budget(amount).keep(entries):
                raise ValueError(f"{where} asks for {amount!r} of {entries:,} entries, which is not one; raise it.")
            parts.append((mine, Budget(amount)))
            for name in mine:
                del free[name]
        return parts

    def _scope(self, model: nn.Module, trainable: Collection[str] | None) -> list[str]:
        train = set(resolve(self.train, model, "train"))
        parameters = dict(model.named_parameters())
        if trainable is None:
            trainable = {name for name, p in parameters.items() if p.requires_grad}
        if self.scope is None:
            names = [n for n, p in parameters.items() if n not in train and n in trainable and p.numel()]
            names = structures.default_scope(self.structure, names, model)
        else:
            names = [n for n in resolve(self.scope, model, "scope") if n not in train and parameters[n].numel()]
        if not names:
            raise ValueError(
                "scope: nothing is left to rank, `train` names every tensor already; narrow train or drop score."
            )
        for name in names:
            if not parameters[name].is_floating_point():
                raise ValueError(
                    f"scope: {name} is of dtype {parameters[name].dtype}, which cannot be ranked; take it away with '!{name}'."
                )
        return names

    def check(self, model: nn.Module, trainable: Collection[str] | None = None) -> None:
        """Resolve everything that needs no data, to fail before training.

        Raises:
            ValueError: As :func:`select` would.
        """
        resolve(self.train, model, "train")
        names = self.scope_names(model, trainable)
        parameters = dict(model.named_parameters())
        if names:
            shapes = {n: tuple(parameters[n].shape) for n in names}
            budgets = self.budgets(model, trainable)
            if not sum(keep for _, keep in share_out(shapes, budgets, self.structure, self.allocation, model)):
                total = sum(parameters[n].numel() for n in names)
                of = f"any row of the {total:,}" if self.allocation == "row" else f"the {total:,}"
                raise ValueError(
                    f"density={self.density!r} of {of} entries in scope is not one entry; raise it, or leave score "
                    "and density out."
                )
        if self.mask is not None:
            self.given(model)

    def given(self, model: nn.Module) -> MaskSet:
        """Return the mask set that was passed or read from its file, checked against ``model``.

        Raises:
            ValueError: If it is of another model: a name or a shape that the model does not have.
        """
        masks = self.mask if isinstance(self.mask, MaskSet) else MaskSet.load(self.mask or "")
        where = "mask" if isinstance(self.mask, MaskSet) else f"mask={str(self.mask)!r}"
        parameters = dict(model.named_parameters())
        for name, mask in masks.items():
            if name not in parameters:
                raise ValueError(f"{where} belongs to another model: this one has no parameter {name!r}.")
            if mask.shape != parameters[name].shape:
                raise ValueError(
                    f"{where} belongs to another model: {name} has shape {tuple(mask.shape)} there and "
                    f"{tuple(parameters[name].shape)} here."
                )
        return masks

    def recipe(self) -> dict[str, Any]:
        """Return the recipe as plain values that JSON can hold."""
        score = None if self.score is None else criteria.name_of(self.score)
        mask = self.mask.hash() if isinstance(self.mask, MaskSet) else self.mask
        return {
            "train": list(as_patterns(self.train)),
            "score": score,
            "density": dict(self.density) if isinstance(self.density, Mapping) else self.density,
            "scope": None if self.scope is None else list(as_patterns(self.scope)),
            "structure": self.structure,
            "allocation": self.allocation,
            "batches": self.batches,
            "seed": self.seed,
            "mask": None if mask is None else str(mask),
        }


def check_patterns(patterns: Any, argument: str) -> None:
    """Refuse what is neither None, nor a pattern, nor a list of patterns.

    Raises:
        ValueError: Naming the value.
    """
    if patterns is not None and not isinstance(patterns, Sequence):
        raise ValueError(f"{argument}={patterns!r} must be a pattern or a list of patterns.")
    as_patterns(patterns)


def check_batches(batches: Any) -> None:
    """Refuse a number of batches that is no whole number from 1.

    Raises:
        ValueError: Naming the value.
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise ValueError(f"batches={batches!r} must be a whole number from 1.")


def check_shape(structure: str, allocation_name: str) -> None:
    """Refuse a structure or an allocation that there is not, and two that do not go together.

    Raises:
        ValueError: Naming them.
    """
    structures.get(structure)
    allocation.get(allocation_name)
    if allocation_name == "row" and structure != "entry":
        raise ValueError(
            f"allocation='row' takes single entries of each row; structure={structure!r} does not go with it."
        )
    if structure in ("tensor", "layer") and allocation_name != "global":
        raise ValueError(
            f"allocation={allocation_name!r} would give a budget to each unit of structure={structure!r}, which is active or "
            "held as a whole; leave allocation at 'global'."
        )


def check_density(density: Any) -> None:
    """Refuse a density that is no share in (0, 1] and no count from 1, nor a dict of patterns to such values.

    Raises:
        ValueError: Naming the value.
    """
    if isinstance(density, Mapping) and density:
        for pattern, amount in density.items():
            if isinstance(amount, Mapping):
                raise ValueError(f"density={density!r} must hold a share or a number for each pattern.")
            as_patterns([pattern])
            check_density(amount)
        return
    count = isinstance(density, int) and not isinstance(density, bool) and density >= 1
    fraction = isinstance(density, float) and 0 < density <= 1
    if not (count or fraction):
        raise ValueError(
            f"density={density!r} must be a share in (0, 1] as a float (1.0 is all) or a number of entries from 1 as an int, "
            "or a dict of patterns to these."
        )


def select(
    selection: Selection, model: nn.Module, context: Context, trainable: Collection[str] | None = None
) -> MaskSet:
    """Follow the recipe: return one mask for every parameter of ``model``.

    Args:
        selection: The recipe.
        model: The module.
        context: What a criterion may look at.
        trainable: Names of the tensors that the default scope is drawn from; default: those that require a gradient.

    Raises:
        ValueError: If a pattern matches nothing, a mask is of another model, or the criterion is at fault.
    """
    parameters = dict(model.named_parameters())
    whole = set(resolve(selection.train, model, "train"))
    masks = {name: full(name in whole, p) for name, p in parameters.items()}
    recipe = selection.recipe()
    if selection.mask is not None:
        masks |= {name: mask for name, mask in selection.given(model).items() if name not in whole}
    elif selection.score is not None:
        names, budgets = selection.scope_names(model, trainable), selection.budgets(model, trainable)
        if selection.score == "random":
            if len(budgets) > 1 or isinstance(selection.density, Mapping):
                recipe["budgets"] = [[mine, budget.amount] for mine, budget in budgets]
            if not structures.needs_model(selection.structure):
                recipe["scope_names"] = names  # its file keeps the recipe alone
            transposed = _transposed(names, selection.structure, selection.allocation, model)
            if transposed:
                recipe["transposed"] = transposed
            chosen = draw_random(recipe, {name: tuple(parameters[name].shape) for name in names}, model)
        else:
            context = copy.copy(context)
            context.seed = selection.seed
            scores = criteria.compute(selection.score, {name: parameters[name] for name in names}, context)
            chosen = choose(scores, budgets, selection.structure, selection.allocation, model)
        masks |= chosen
    return MaskSet({name: own(shard(mask, parameters[name])) for name, mask in masks.items()}, recipe)


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
        transposed = _transposed(shapes, structure, allocation_name, model)
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


def _transposed(
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


def _best(units: Sequence[Tensor], sizes: Sequence[int], keep: int) -> list[Tensor]:
    """Masks of the best units whose entries together come nearest to ``keep``."""
    if len(set(sizes)) == 1:
        count = (2 * keep + sizes[0] - 1) // (2 * sizes[0])  # the fewer of two that come as near
        return top_k(units, min(max(count, min(keep, 1)), sum(u.numel() for u in units)))
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


def count(masks: Mapping[str, Tensor]) -> int:
    """Number of active entries of plain masks."""
    return sum(active(mask) for mask in masks.values())
