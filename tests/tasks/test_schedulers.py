"""Learning rates over a run."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_mask.tasks import linear_warmup_decay, warmup_constant


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def rates(scheduler: LambdaLR, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_rise_and_fall() -> None:
    seen = rates(linear_warmup_decay(optimizer(), 10, warmup=0.4, final=0.1), 13)
    assert seen == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 1.7, 1.4, 1.1, 0.8, 0.5, 0.2, 0.2, 0.2])
    assert rates(linear_warmup_decay(optimizer(), 4, warmup=0), 5) == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.0])


def test_rise_and_stay() -> None:
    assert rates(warmup_constant(optimizer(), 10, warmup=0.1), 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_shares_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"warmup is a share of the run, in \[0, 1\), got 100"):
        warmup_constant(optimizer(), 10, warmup=100)
    with pytest.raises(ValueError, match="final is a share"):
        linear_warmup_decay(optimizer(), 10, final=-1)
