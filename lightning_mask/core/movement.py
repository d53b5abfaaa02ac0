"""Movement: which entries training has moved away from zero so far."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_mask.core.distributed import synchronised
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.optimizers import parameters_of
from lightning_mask.core.sharding import local, shard


class Movement:
    """The sum of ``-g * w`` over optimizer steps, entry by entry, g being the gradient that the step took.

    ``steps`` is 0 until there is one.

    An entry that is held or pruned has no gradient or no weight, so its sum stands still. Clipping comes later and is not
    seen.

    Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (2020), equation (3), for a step size of one.

    Args:
        model: The module.
        names: Of the parameters to sum for; each takes a float32 for an entry.
        sums: What :attr:`sums` was when a checkpoint was written, whole tensors.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], sums: Mapping[str, Tensor] | None = None) -> None:
        parameters = dict(model.named_parameters())
        self.steps = 0 if sums is None else 1
        self.sums = {
            name: torch.zeros_like(parameters[name], dtype=torch.float32, requires_grad=False) for name in names
        }
        for name, value in (sums or {}).items():
            if name in self.sums:
                self.sums[name].copy_(shard(value.to(self.sums[name].device), parameters[name]))

    @torch.no_grad()
    def add(self, engine: MaskEngine, scale: float | None = None) -> None:
        """Add one step, after backward and before the optimizer's step.

        Args:
            engine: After its ``after_backward``.
            scale: That of a gradient scaler, by which the gradients are too large. It skips a step whose gradients are not
                finite, and such a step is not added. None: there is no scaler.
        """
        if scale is not None and synchronised(not _finite(engine), next(iter(self.sums.values())).device):
            return
        self.steps += 1
        for name, total in self.sums.items():
            gradient = engine.gradient(name)
            if gradient is not None:
                local(total).addcmul_(
                    gradient.float(), local(engine.parameter(name)).float(), value=-1.0 / (scale or 1.0)
                )


def _finite(engine: MaskEngine) -> bool:
    gradients = [p.grad for optimizer in engine.optimizers for p in parameters_of(optimizer) if p.grad is not None]
    values = [g.coalesce().values() if g.is_sparse else local(g) for g in gradients]
    return all(bool(torch.isfinite(value).all()) for value in values)
