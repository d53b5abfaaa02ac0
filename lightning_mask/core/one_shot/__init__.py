"""Pruning without training, from a few batches: magnitude, Wanda, and OBS with weight update (SparseGPT).

    from lightning_mask.core.one_shot import OneShot, prune

    pruned = prune(OneShot("obs", 0.5), model, lambda batch: model(**batch), batches)

The network is gone through one block at a time. The memory that it takes beside the model: the batches; the inputs of one
block for all batches (``batches x positions x width`` numbers); and, of the layers of one block, a Gram matrix each
(``groups x inputs^2`` numbers), of ``obs`` three more of one layer in 64 bits.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.criteria.context import eval_mode
from lightning_mask.core.maskset import MaskSet, own
from lightning_mask.core.one_shot.layers import Weight, gram
from lightning_mask.core.one_shot.methods import METHODS, Quota
from lightning_mask.core.one_shot.recipe import OneShot
from lightning_mask.core.one_shot.walk import Args, Forward, Unit, Walk

__all__ = ["LayerReport", "OneShot", "Pruned", "prune"]


@dataclass(frozen=True)
class LayerReport:
    """What became of one weight.

    Attributes:
        name: Of the weight.
        entries: How many it has.
        zeros: How many of these were pruned, each +0.0 now.
        error: ``||X W - X W'|| / ||X W||``, W the weight before and W' after, X what it meets on the batches behind the
            pruned layers of the blocks before.
        seconds: That choosing and updating took.
    """

    name: str
    entries: int
    zeros: int
    error: float
    seconds: float


@dataclass(frozen=True)
class Pruned:
    """The result of :func:`prune`.

    Attributes:
        masks: Of the weights in scope, True = alive, with the recipe.
        layers: What became of each of these, in the order in which they were pruned.
    """

    masks: MaskSet
    layers: list[LayerReport]


def prune(
    recipe: OneShot,
    model: nn.Module,
    forward: Forward,
    batches: Iterable[Any],
    told: Callable[[LayerReport], None] | None = None,
) -> Pruned:
    """Prune ``model`` in place, as the recipe says, from what its layers meet on ``batches``.

    Block by block (:mod:`lightning_mask.core.one_shot.walk`), so that each is pruned for the inputs that it will get behind
    the pruned blocks before it; layers of one block are all seen before any is pruned. The model is in eval mode meanwhile;
    what is not in scope keeps every bit. A weight that several layers share is pruned once, in the first block that uses it.

    Args:
        recipe: What to prune, and how.
        model: The network, on one device; not sharded.
        forward: Runs the model on a batch; what it returns is not looked at.
        batches: Whatever ``forward`` takes, on the model's device.
        told: Called with each layer's report.

    Raises:
        ValueError: If the recipe does not fit the model (:meth:`OneShot.quotas`), there is no batch, or no batch runs a layer
            in scope: before anything is changed. Or if a layer meets inputs that are not finite.
    """
    weights, quotas, batches = recipe.weights(model), recipe.quotas(model), list(batches)
    if not batches:
        raise ValueError("There is no batch to prune from: give at least one.")
    masks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    with eval_mode(model):
        walk = Walk(model, forward, batches, [path for weight in weights for path, _ in weight.layers])
        for weight in weights:
            if all(path in walk.idle for path, _ in weight.layers):
                raise ValueError(
                    f"The layer of {weight.name} was not run on the batches (a fused kernel may read its weight without calling "
                    f"it), so there is nothing to prune it by; take it out of scope with '!{weight.name}'."
                )
        for unit in walk.units:
            mine = [w for w in weights if w.name not in masks and _layers(w, unit)]
            grams = _grams(walk, unit, mine)
            for weight in mine:
                mask, report = _prune_one(weight, grams.pop(weight.name), quotas[weight.name], recipe)
                masks[weight.name] = own(mask)
                reports.append(report)
                if told is not None:
                    told(report)
            torch.clear_autocast_cache()  # which has the weights as they were
            walk.leave(unit)
    return Pruned(MaskSet({weight.name: masks[weight.name] for weight in weights}, recipe.as_dict()), reports)


def _layers(weight: Weight, unit: Unit) -> list[nn.Module]:
    return [layer for path, layer in weight.layers if path in unit.layers]


def _grams(walk: Walk, unit: Unit, weights: list[Weight]) -> dict[str, Tensor]:
    """The Gram matrix of what each weight meets in the unit, over all batches."""
    sums: dict[str, Tensor] = {}

    def add(weight: Weight, layer: nn.Module, args: Args) -> None:
        square = gram(layer, args, weight.dtype)
        sums[weight.name] = sums[weight.name].add_(square) if weight.name in sums else square

    see = {layer: partial(add, weight, layer) for weight in weights for layer in _layers(weight, unit)}
    walk.observe(unit, see)
    return sums


@torch.no_grad()
def _prune_one(weight: Weight, square: Tensor, quota: Quota, recipe: OneShot) -> tuple[Tensor, LayerReport]:
    started = time.perf_counter()
    if not square.isfinite().all():
        raise ValueError(f"What {weight.name} meets on the batches is not finite; look at the model and the batches.")
    with torch.autocast(square.device.type, enabled=False):
        before = weight.rows().clone()
        try:
            after, alive = METHODS[recipe.method](before, square, quota, recipe.settings)
        except ValueError as error:
            raise ValueError(f"{weight.name}: {error}") from None
        mask = weight.as_weight(alive)
        weight.parameter.copy_(weight.as_weight(after))
        relative = _relative(weight.rows() - before, before, square)
    seconds = time.perf_counter() - started
    return mask, LayerReport(weight.name, mask.numel(), int((~mask).sum()), relative, seconds)


def _relative(change: Tensor, rows: Tensor, square: Tensor) -> float:
    """``||X change|| / ||X rows||`` of rows [groups, units, inputs] and ``X^T X``; 0 where neither makes an output."""
    of_change, of_rows = (float(((r @ square) * r).sum().clamp(min=0)) for r in (change, rows))
    return (of_change / of_rows) ** 0.5 if of_rows else 0.0
