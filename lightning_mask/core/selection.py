"""Selection: the whole recipe for one mask, and the pipeline that follows it."""

import copy
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mask.core import allocation, criteria, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose, draw_random, share_out, transposed_among
from lightning_mask.core.criteria import Context, Criterion
from lightning_mask.core.distributed import rank
from lightning_mask.core.maskset import MaskSet, full, own
from lightning_mask.core.patterns import Patterns, as_patterns, resolve
from lightning_mask.core.sharding import shard


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
            groups = share_out(shapes, budgets, self.structure, self.allocation, model)
            if not sum(keep for _, keep in groups):
                total = sum(parameters[n].numel() for n in names)
                of = f"any row of the {total:,}" if self.allocation == "row" else f"the {total:,}"
                raise ValueError(
                    f"density={self.density!r} of {of} entries in scope is not one entry; raise it, or leave score "
                    "and density out."
                )
            if self.allocation == "row":
                empty = [name for units, keep in groups if not keep for unit in units for name in unit]
                self._warn_of_narrow_rows(empty, len(names))
        if self.mask is not None:
            self.given(model)

    def _warn_of_narrow_rows(self, empty: list[str], of: int) -> None:
        if empty and rank() == 0:
            shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
            warnings.warn(
                f"allocation='row' with density={self.density!r} keeps no entry of {shown}, so {len(empty)} of the {of} tensors "
                "in scope train nothing; raise density, or take them out of scope.",
                stacklevel=3,
            )

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
            transposed = transposed_among(names, selection.structure, selection.allocation, model)
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
