"""Pruning: the recipe for weights that go to zero along a schedule, outside Lightning."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core import criteria, schedules, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import check_n_of_m, choose, n_of_m
from lightning_mask.core.criteria import Context, Criterion
from lightning_mask.core.maskset import MaskSet, own
from lightning_mask.core.patterns import Patterns, resolve
from lightning_mask.core.prunable import default_scope, emptied, read_sparsity
from lightning_mask.core.schedules import Moment, Ramp, Run
from lightning_mask.core.selection import check_batches, check_patterns, check_shape
from lightning_mask.core.transposed import transposed_weights


@dataclass(frozen=True)
class Pruning:
    """Which weights go to zero, and when, as a recipe of plain values; what is pruned stays pruned.

    Args:
        sparsity: Final share of zeros in scope, a float in [0, 1); or ``"n:m"``, e.g. ``"2:4"``, all at once at ``start``.
        score: Criterion, higher = more worth keeping: a registered name, or a function.
        scope: Patterns; default: the weights of Linear and convolution layers and attention projections; not embeddings,
            norms, biases, or the output head.
        structure: What is pruned as one unit, as in :class:`~lightning_mask.core.Selection`.
        allocation: How zeros are shared among tensors: ``global``, ``uniform``, ``erk``, ``row``.
        schedule: Sparsity between ``start`` and ``end``: ``constant`` (all at once at ``start``), ``linear``, ``cubic``
            (Zhu and Gupta 2017), ``cosine``, ``geometric``.
        start: Moment of the first update.
        end: Moment of the last update, at which the final sparsity is reached.
        every: Moment between updates.
        batches: Number of training batches (per rank) shown to a criterion that needs data, at every update.
        seed: Seed of random criteria.

    Raises:
        ValueError: If a value is out of range.
    """

    sparsity: float | str
    score: str | Criterion = "magnitude"
    scope: Patterns = None
    structure: str = "entry"
    allocation: str = "global"
    schedule: str = "cubic"
    start: str = "0%"
    end: str = "50%"
    every: str = "1%"
    batches: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        _, pattern = read_sparsity(self.sparsity)
        if pattern is not None and self.structure != "entry":
            raise ValueError("An n:m sparsity chooses single entries of each group; leave structure out.")
        criteria.get(self.score)
        check_shape(self.structure, self.allocation)
        check_patterns(self.scope, "scope")
        check_batches(self.batches)
        schedules.schedule(self.schedule)
        for name in ("start", "end", "every"):
            Moment.parse(getattr(self, name), name)

    def names(self, model: nn.Module) -> list[str]:
        """Return the names of the tensors in scope.

        Raises:
            ValueError: If there is none, or one cannot be pruned.
        """
        _, pattern = read_sparsity(self.sparsity)
        names = resolve(self.scope, model, "scope") if self.scope is not None else default_scope(model)
        names = structures.default_scope(self.structure, names, model) if self.scope is None else names
        if not names:
            raise ValueError("scope: the model has no Linear, convolution or attention weight to prune; name tensors.")
        transposed = transposed_weights(model)
        for name in names:
            parameter = model.get_parameter(name)
            if not parameter.is_floating_point():
                raise ValueError(f"scope: {name} is of dtype {parameter.dtype}, which cannot be pruned.")
            if pattern is not None:
                check_n_of_m(name, tuple(parameter.shape), pattern[1], transposed.get(name, 0))
        return names

    def ramp(self, run: Run) -> Ramp:
        """Return when sparsity is raised in a run, and how far.

        Raises:
            ValueError: If the ramp does not fit into the run.
        """
        start = Moment.parse(self.start, "start").steps(run, "start")
        _, pattern = read_sparsity(self.sparsity)
        once = self.schedule == "constant" or pattern is not None
        end = start if once else Moment.parse(self.end, "end").steps(run, "end")
        every = 1 if once else max(Moment.parse(self.every, "every").steps(run, "every"), 1)
        if end < start:
            raise ValueError(f"end={self.end!r} lies before start={self.start!r} in this run.")
        if end > run.total_steps:
            raise ValueError(f"The ramp ends at step {end}, and the run has {run.total_steps:g}; end it earlier.")
        last = int(min(end, run.total_steps - 1))  # an update needs a step after it
        return Ramp(min(start, last), last, every, "constant" if once else self.schedule)

    def choose(
        self,
        model: nn.Module,
        context: Context,
        sparsity: float,
        alive: Mapping[str, Tensor],
        free: Mapping[str, Tensor],
    ) -> MaskSet:
        """Return what stays alive at ``sparsity``.

        Args:
            model: The module.
            context: What a criterion may look at.
            sparsity: Share of zeros in scope.
            alive: What is alive now, of each tensor in scope.
            free: What may change, of each parameter: a held entry that is not zero is not pruned.

        Raises:
            ValueError: If ``sparsity`` cannot be reached beside what is held, or would empty a weight.
        """
        parameters = {name: model.get_parameter(name) for name in alive}
        scores = criteria.compute(self.score, dict(parameters), context)
        for name, score in scores.items():
            held = ~free[name].to(score.device) & (parameters[name].detach() != 0)
            dead = ~alive[name].to(score.device)
            scores[name] = score.float().masked_fill(dead, -torch.inf).masked_fill(held, torch.inf)
        _, pattern = read_sparsity(self.sparsity)
        if pattern is not None:
            chosen = n_of_m(scores, *pattern, transposed=transposed_weights(model))
        else:
            budgets = [(list(scores), Budget(sparsity, removed=True))]
            chosen = choose(scores, budgets, self.structure, self.allocation, model)
        for name, mask in chosen.items():
            if bool((torch.isposinf(scores[name]) & ~mask.to(scores[name].device)).any()):
                raise ValueError(
                    f"sparsity {sparsity:.4f} cannot be reached without pruning held entries of {name}; let more of it train, "
                    "take it out of the scope, or lower the sparsity."
                )
        empty = emptied(chosen)
        if empty and self.structure not in ("tensor", "layer"):
            raise ValueError(
                f"sparsity {sparsity:.4f} would prune all of {empty[0]}, and no gradient passes such a layer; lower it, take "
                "the weight out of the scope, or choose allocation='uniform'."
            )
        return MaskSet({name: own(mask) for name, mask in chosen.items()})

    def recipe(self) -> dict[str, Any]:
        """Return the recipe as plain values that JSON can hold."""
        scope = [self.scope] if isinstance(self.scope, str) else self.scope
        plain = {"score": criteria.name_of(self.score), "scope": None if scope is None else list(scope)}
        return {**self.__dict__, **plain}
