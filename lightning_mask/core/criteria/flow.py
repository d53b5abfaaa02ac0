"""Criteria from how a signal flows through the network, with neither labels nor a loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from lightning_mask.core.criteria.context import Context, eval_mode
from lightning_mask.core.criteria.registry import Scores, criterion, not_of_shards


@criterion(
    "synflow",
    check=not_of_shards(
        "synflow runs the network with other weights, which sharded parameters do not allow; take score=snip."
    ),
)
def synflow(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w| * dR/d|w|``, R being the sum of the outputs for an input of ones when every parameter is its absolute value.

    Of the data only the shape of one example counts: the first of the first batch, its floating tensors filled with ones
    and the others (token ids, masks) as they are. The module's ``forward`` is called with it: with the first part of a
    batch that is a tuple or list, else with the batch. The source prunes in about 100 rounds of fewer and fewer entries,
    which ``PruneMask`` does along its schedule; at once, whole layers may go.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow" (SynFlow,
    2020), section 6; the saliency is its equation (1).

    Raises:
        ValueError: If there is no batch, what comes out is no tensor or too large a number, or parameters are sharded.
    """
    batch = next(iter(context.batches), None)
    if batch is None:
        raise ValueError("synflow needs the shape of an example, and the training data gave no batch.")
    inputs = _ones(batch[0] if isinstance(batch, tuple | list) else batch)
    every = dict(context.model.named_parameters())
    sizes = {name: p.detach().abs() for name, p in every.items()}
    wanted = [sizes[name].requires_grad_(True) for name in params]
    with eval_mode(context.model), torch.enable_grad():
        output = functional_call(context.model, sizes, (inputs,))
        if not isinstance(output, Tensor):
            raise ValueError(
                f"synflow needs a forward that returns a tensor, and that of {type(context.model).__name__} returned "
                f"{type(output).__name__}; take another criterion, or a module whose forward maps a batch to logits."
            )
        found = torch.autograd.grad(output.sum(), wanted, allow_unused=True)
    pairs = zip(params, wanted, found, strict=True)
    scores = {
        n: torch.zeros_like(w, dtype=torch.float32) if g is None else (g * w.detach()).float() for n, w, g in pairs
    }
    odd = next((name for name, value in scores.items() if not value.isfinite().all()), None)
    if odd is not None:
        raise ValueError(
            f"synflow: with every weight positive, what flows through the network is beyond {output.dtype} at {odd}; take "
            "score=snip, or train in a higher precision."
        )
    return scores


def _ones(part: Any) -> Any:
    """The first example of what a batch holds, with ones where it holds real numbers."""
    if isinstance(part, Tensor):
        first = part[:1]
        return torch.ones_like(first) if first.is_floating_point() else first
    if isinstance(part, Mapping):
        return {key: _ones(value) for key, value in part.items()}
    if isinstance(part, tuple | list):
        return type(part)(_ones(value) for value in part)
    return part
