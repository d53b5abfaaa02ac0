"""A linear unit whose gradients are known by hand, and what a criterion is given of it."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_mask.core import Context
from lightning_mask.core.criteria import compute

# One linear unit y = w.x + b without activation; loss = mean over the batch of (y - t)^2, so
# dL/dw_j = mean of 2 (y - t) x_j and dL/db = mean of 2 (y - t), which is done by hand below.
WEIGHT, BIAS = [[2.0, -1.0]], [0.5]
BATCHES = [
    (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5], [0.5]])),  # y = 2.5, -0.5; y - t = 2, -1
    (torch.tensor([[1.0, 1.0], [-1.0, 2.0]]), torch.tensor([[2.5], [-3.5]])),  # y = 1.5, -3.5; y - t = -1, 0
]
# batch 1: dw = (2*2*1 + 0)/2, (0 - 2*1*1)/2 = 2, -1; db = (4 - 2)/2 = 1
# batch 2: dw = (2*-1*1 + 0)/2, (2*-1*1 + 0)/2 = -1, -1; db = -1
GRADIENTS = [([[2.0, -1.0]], [1.0]), ([[-1.0, -1.0]], [-1.0])]


def unit() -> nn.Linear:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(WEIGHT))
        model.bias.copy_(torch.tensor(BIAS))
    return model


REFERENCE = {"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.tensor([0.0])}


def context(model: nn.Module, batches: Iterable[object] = BATCHES, **more: object) -> Context:
    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return Context(model, loss=loss, batches=lambda: batches, **more)  # type: ignore[arg-type]


def run(score: str, model: nn.Module, **more: object) -> dict[str, Tensor]:
    return compute(score, dict(model.named_parameters()), context(model, **more))  # type: ignore[arg-type]
