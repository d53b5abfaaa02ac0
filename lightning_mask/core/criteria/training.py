"""Criteria from where training has gone: they read the weights from its start."""

from collections.abc import Mapping

from torch import Tensor

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion
from lightning_mask.core.sharding import shard


@criterion("change")
def change(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w - w_0|``, w_0 being the weights at the start of training.

    At the start itself all are 0, which warns: for a later phase, or with ``refresh``. An entry that is exactly 0 now
    scores 0: it was pruned, which is no change of training's.

    Source: Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer" (LT-SFT, 2021), section 3; the
    rewinding is ``Phase(restart=True)``.

    Raises:
        ValueError: If the weights from the start were not kept.
    """
    return {
        n: (p.detach().float() - _start(context, n, p).float()).abs_().masked_fill_(p.detach() == 0, 0)
        for n, p in params.items()
    }


@criterion("magnitude_increase")
def magnitude_increase(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w| - |w_0|``, w_0 being the weights at the start of training: what training moved away from zero comes first.

    At the start itself all are 0, as for ``change``. Along gradient flow ``d(w^2)/dt = -2 g w``, so movement pruning's sum
    of ``-g w`` over the steps of a phase (Sanh et al. 2020) is ``(w^2 - w_0^2) / 2``, which has the same sign.

    Source: Zhou et al., "Deconstructing Lottery Tickets: Zeros, Signs, and the Supermask" (2019), the mask criterion
    "magnitude increase".

    Raises:
        ValueError: If the weights from the start were not kept.
    """
    return {n: p.detach().float().abs() - _start(context, n, p).float().abs() for n, p in params.items()}


def _start(context: Context, name: str, parameter: Tensor) -> Tensor:
    reference = context.reference[name].to(parameter.device)
    return shard(reference, parameter)
