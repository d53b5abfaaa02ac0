"""Selection: the whole recipe for one mask, and the pipeline that follows it."""

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core import allocation, criteria, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.criteria import Context, Criterion, random_scores
from lightning_mask.core.draw import draw_entries
from lightning_mask.core.maskset import MaskSet, active, full, own
from lightning_mask.core.patterns import Patterns, as_patterns, resolve
from lightning_mask.core.ranking import top_k
from lightning_mask.core.sharding import shard

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Selection:
    """Which entries of a network may change, as a recipe of plain values.

    Args:
        train: Patterns of tensors that may change whole.
        score: Criterion that ranks the entries in ``scope``; its choice is added to ``train``.
        density: Float in (0, 1], the share of the entries in scope that is active; or int, their number.
        scope: Patterns of the tensors that are ranked; default: every trainable tensor that ``train`` does not name.
        structure: What is ranked together: ``entry``, ``row``, ``tensor``.
        allocation: How the budget is shared among tensors: ``global``, ``uniform``, ``erk``.
        batches: Number of training batches (per rank) shown to a criterion that needs data.
        seed: Seed of random criteria.
        mask: A mask set or the path of one, instead of a criterion.

    Raises:
        ValueError: If a value is out of range or two arguments exclude each other.
    """

    train: Patterns = None
    score: str | Criterion | None = None
    density: float | int | None = None
    scope: Patterns = None
    structure: str = "entry"
    allocation: str = "global"
    batches: int = 32
    seed: int = 0
    mask: str | os.PathLike[str] | MaskSet | None = None

    def __post_init__(self) -> None:
        check_patterns(self.train, "train")
        check_patterns(self.scope, "scope")
        structures.get(self.structure)
        allocation.get(self.allocation)
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
        """Return the names of the tensors that the criterion ranks.

        Args:
            model: The module.
            trainable: Names of the tensors that the default scope is drawn from; default: those that require a gradient.

        Raises:
            ValueError: If a pattern matches nothing, or the scope is empty or holds a tensor that is not of real numbers.
        """
        if self.score is None:
            return []
        train = set(resolve(self.train, model, "train"))
        parameters = dict(model.named_parameters())
        if trainable is None:
            trainable = {name for name, p in parameters.items() if p.requires_grad}
        if self.scope is None:
            names = [n for n, p in parameters.items() if n not in train and n in trainable and p.numel()]
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
            groups = allocation.get(self.allocation)(shapes, Budget(self.density or 0))
            if not sum(keep for _, keep in groups):
                total = sum(parameters[n].numel() for n in names)
                raise ValueError(
                    f"density={self.density!r} of the {total:,} entries in scope is not one entry; raise it, or leave score "
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
            "density": self.density,
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


def check_density(density: Any) -> None:
    """Refuse a density that is no share in (0, 1] and no count from 1.

    Raises:
        ValueError: Naming the value.
    """
    count = isinstance(density, int) and not isinstance(density, bool) and density >= 1
    fraction = isinstance(density, float) and 0 < density <= 1
    if not (count or fraction):
        raise ValueError(
            f"density={density!r} must be a share in (0, 1] as a float (1.0 is all) or a number of entries from 1 as an int."
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
        names = selection.scope_names(model, trainable)
        if selection.score == "random":
            recipe["scope_names"] = names
            chosen = draw_random(recipe, {name: tuple(parameters[name].shape) for name in names})
        else:
            context = copy.copy(context)
            context.seed = selection.seed
            scores = criteria.compute(selection.score, {name: parameters[name] for name in names}, context)
            assert selection.density is not None
            chosen = choose(scores, Budget(selection.density), selection.structure, selection.allocation)
        masks |= chosen
    return MaskSet({name: own(shard(mask, parameters[name])) for name, mask in masks.items()}, recipe)


def choose(scores: Mapping[str, Tensor], budget: Budget, structure: str, allocation_name: str) -> dict[str, Tensor]:
    """Return the masks that keep the best units of ``scores`` within ``budget``.

    The number of active entries is the budget exactly for ``structure="entry"``; for larger units it is the nearest
    number of whole units, at least one.
    """
    kind = structures.get(structure)
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    masks: dict[str, Tensor] = {}
    for names, keep in allocation.get(allocation_name)(shapes, budget):
        units = [kind.reduce(scores[name]) for name in names]
        sizes = [scores[n].numel() // max(kind.units(shapes[n]), 1) for n in names]
        chosen = _best(units, sizes, keep)
        masks |= {name: kind.expand(mask, shapes[name]) for name, mask in zip(names, chosen, strict=True)}
    return {name: masks[name] for name in scores}


def n_of_m(scores: Mapping[str, Tensor], n: int, m: int, transposed: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the masks that keep the ``n`` best of every ``m`` neighbours along the input dimension; ties by position.

    A weight's input dimension is everything but its first, flattened (``in, kh, kw`` for a convolution), which is the
    layout that sparse tensor cores read; of the weights named in ``transposed``, which are of shape ``(in, out, ...)``,
    everything but the second.

    Raises:
        ValueError: If the input dimension of a tensor is not divisible by ``m``.
    """
    masks = {}
    for name, score in scores.items():
        check_n_of_m(name, tuple(score.shape), m, name in transposed)
        rows = score.transpose(0, 1) if name in transposed else score
        groups = rows.detach().float().reshape(-1, m)
        order = groups.argsort(dim=1, descending=True, stable=True)
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, :n], True).view(rows.shape)
        masks[name] = mask.transpose(0, 1).contiguous() if name in transposed else mask
    return masks


def check_n_of_m(name: str, shape: tuple[int, ...], m: int, transposed: bool = False) -> None:
    """Refuse a tensor that has no groups of ``m`` along its input dimension.

    Raises:
        ValueError: Naming the tensor and its width.
    """
    inputs = (shape[0], *shape[2:]) if transposed else shape[1:]
    width = int(torch.Size(inputs).numel()) if len(shape) > 1 else 0
    if not width or width % m:
        raise ValueError(
            f"{name} of shape {shape} has an input width of {width}, which is not divisible by {m}; take it out of the scope."
        )


def _best(units: Sequence[Tensor], sizes: Sequence[int], keep: int) -> list[Tensor]:
    """Masks of the best units whose entries together come nearest to ``keep``."""
    if len(set(sizes)) == 1:
        count = keep if sizes[0] == 1 else max(round(keep / max(sizes[0], 1)), min(keep, 1))
        return top_k(units, min(count, sum(u.numel() for u in units)))
    scores = torch.cat([u.float().cpu() for u in units])
    widths = torch.cat([torch.full((u.numel(),), s) for u, s in zip(units, sizes, strict=True)])
    order = torch.argsort(scores, descending=True, stable=True)
    taken = torch.cat([torch.zeros(1, dtype=torch.int64), widths[order].cumsum(0)])
    count = int((taken - keep).abs().argmin())
    mask = torch.zeros(len(scores), dtype=torch.bool)
    mask[order[: max(count, min(keep, 1))]] = True
    return [m.to(u.device) for m, u in zip(mask.split([u.numel() for u in units]), units, strict=True)]


def draw_random(recipe: Mapping[str, Any], shapes: Shapes) -> dict[str, Tensor]:
    """Return the masks of a random recipe, which depend on its seed and the shapes of the tensors in scope alone."""
    budget, seed = Budget(recipe["density"]), recipe["seed"]
    if recipe["structure"] == "entry":
        return draw_entries(shapes, budget, recipe["allocation"], seed)
    return choose(random_scores(shapes, seed), budget, recipe["structure"], recipe["allocation"])


def count(masks: Mapping[str, Tensor]) -> int:
    """Number of active entries of plain masks."""
    return sum(active(mask) for mask in masks.values())
