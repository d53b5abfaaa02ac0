"""Criteria: functions that give every entry in scope a number; higher = more worth keeping active.

A criterion takes the parameters in scope and a :class:`Context` and returns one real tensor of the same shape for each.
Gradients and activations are taken in eval mode (no dropout noise, batch statistics do not move), which leaves ``.grad``
alone; scores that were made from data are averaged over ranks before they are ranked.
"""

from lightning_mask.core.criteria import activations, flow, gradients, training, weights
from lightning_mask.core.criteria.context import NO_SAMPLED_LOSS, Context
from lightning_mask.core.criteria.registry import (
    CRITERIA,
    Criterion,
    Scores,
    accumulates,
    compute,
    criterion,
    from_weights,
    get,
    is_own,
    may_need_reference,
    name_of,
    needs_loss,
    needs_sampled_loss,
    require,
)
from lightning_mask.core.criteria.seeds import named_seed
from lightning_mask.core.criteria.weights import random_scores

__all__ = [
    "CRITERIA",
    "NO_SAMPLED_LOSS",
    "Context",
    "Criterion",
    "Scores",
    "accumulates",
    "activations",
    "compute",
    "criterion",
    "flow",
    "from_weights",
    "get",
    "gradients",
    "is_own",
    "may_need_reference",
    "name_of",
    "named_seed",
    "needs_loss",
    "needs_sampled_loss",
    "random_scores",
    "require",
    "training",
    "weights",
]
