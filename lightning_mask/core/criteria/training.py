"""Criteria from where training has gone: they read the weights from its start."""

from collections.abc import Mapping

from torch import Tensor

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion
from lightning_mask.core.sharding import shard


@criterion("change")
def change(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w - w_0|``, w_0 being the weights at the start of training.

    At the start itself all are 0: for a later phase, or with ``refresh``.

    Source: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (LT-SFT, 2021), section 3, without
    its rewinding.

    Raises:
        ValueError: If the weights from the start were not kept.
    """
    return {n: (p.detach().float() - _start(context, n, p).float()).abs() for n, p in params.items()}


def _start(context: Context, name: str, parameter: Tensor) -> Tensor:
    reference = context.reference[name].to(parameter.device)
    return shard(reference, parameter)
