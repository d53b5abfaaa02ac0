"""Criteria from the gradients of the training loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion


@criterion("gradient")
def gradient(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``sum over batches of |dL_b/dw|``. Source: Song et al., "Sparse is Enough in Fine-tuning" (SIFT, 2023), on batches."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    for grads in context.gradients(params):
        for name, g in grads.items():
            total[name] += g.abs()
    return total


@criterion("fisher")
def fisher(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of (dL_b/dw)^2``: the empirical Fisher information with squared *batch* gradients.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-D, 2021), equation (6), as its code takes it;
    Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH, 2021) squares the gradients of single examples
    instead, which a batch size of 1 gives here.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    count = 0
    for grads in context.gradients(params):
        count += 1
        for name, g in grads.items():
            total[name] += g.float().square()
    return {name: value / max(count, 1) for name, value in total.items()}
