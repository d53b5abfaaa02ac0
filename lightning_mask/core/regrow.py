"""Dynamic sparse training: drop some of what is alive and grow as much elsewhere, so that the count stays."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mask.core import allocation
from lightning_mask.core.allocation import Budget
from lightning_mask.core.criteria import random_scores
from lightning_mask.core.ranking import top_k
from lightning_mask.core.sharding import count, shard


def cosine_fraction(fraction: float, progress: float) -> float:
    """Return ``fraction / 2 * (1 + cos(pi * progress))``: how much is exchanged at ``progress`` in [0, 1].

    Source: Evci et al., "Rigging the Lottery" (RigL, 2020), section 3 (2).
    """
    return fraction / 2 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def growth(kind: str, parameters: Mapping[str, Tensor], free: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return what each entry is worth growing: ``-inf`` where it is held.

    Args:
        kind: ``"random"``, or ``"gradient"``: the larger its reduced gradient, the more.
        parameters: By name, with their gradients.
        free: Name to boolean, True = no FreezeMask and no phase holds the entry.
        seed: Of a random choice.
    """
    if kind == "random":
        drawn = random_scores({name: tuple(p.shape) for name, p in parameters.items()}, seed)
        worth = {name: shard(score, parameters[name]) for name, score in drawn.items()}
    else:
        worth = {n: torch.zeros_like(p) if p.grad is None else p.grad.detach().abs() for n, p in parameters.items()}
    finite = {n: w.to(parameters[n].device, torch.float32).nan_to_num(nan=0.0) for n, w in worth.items()}
    return {name: w.masked_fill(~free[name].to(w.device), -torch.inf) for name, w in finite.items()}


def drop_and_grow(
    scores: Mapping[str, Tensor],
    growth: Mapping[str, Tensor],
    budget: Budget,
    allocation_name: str,
    fraction: float,
) -> dict[str, Tensor]:
    """Return masks of ``budget`` entries: the best by ``scores``, and in place of the worst of them the best by ``growth``.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity" (SET, 2018)
    with random growth, Evci et al. (RigL, 2020) with the gradient. An entry that was just dropped is not grown at once.

    Args:
        scores: Name to worth of the entries; ``-inf`` where an entry is not alive, ``inf`` where it must stay.
        growth: Name to worth of growing an entry; ``-inf`` where it cannot be grown.
        budget: What is alive afterwards, exactly.
        allocation_name: How the budget is shared among tensors.
        fraction: Share of what is alive that is exchanged.
    """
    masks: dict[str, Tensor] = {}
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    for names, keep in allocation.get(allocation_name)(shapes, budget):
        worth = [scores[name] for name in names]
        candidates = [growth[name].float().masked_fill(~torch.isneginf(scores[name]), -torch.inf) for name in names]
        room = sum(count(~torch.isneginf(c)) for c in candidates)
        fixed = sum(count(torch.isposinf(w)) for w in worth)
        exchanged = max(min(allocation.share(fraction, keep), room, keep - fixed), 0)
        kept, grown = top_k(worth, keep - exchanged), top_k(candidates, exchanged)
        masks |= {name: a | b for name, a, b in zip(names, kept, grown, strict=True)}
    return {name: masks[name] for name in scores}
