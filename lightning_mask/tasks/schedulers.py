"""Learning rates over a run: each takes an optimizer and the number of optimizer steps that the run will make."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear_warmup_decay(
    optimizer: Optimizer, num_training_steps: int, warmup: float = 0.06, final: float = 0.0
) -> LambdaLR:
    """Rise linearly from near zero over the warm-up, then fall linearly to ``final``; stay there if the run goes on.

    Args:
        optimizer: Its rates are the highest ones.
        num_training_steps: Optimizer steps of the whole run.
        warmup: Share of the steps that the rise takes, in [0, 1).
        final: Where the fall ends, as a share of the highest rate.

    Raises:
        ValueError: If a share is out of range.
    """
    return _schedule(optimizer, num_training_steps, warmup, final)


def warmup_constant(optimizer: Optimizer, num_training_steps: int, warmup: float = 0.06) -> LambdaLR:
    """Rise linearly from near zero over the warm-up, then stay.

    Args:
        optimizer: Its rates are the highest ones.
        num_training_steps: Optimizer steps of the whole run.
        warmup: Share of the steps that the rise takes, in [0, 1).

    Raises:
        ValueError: If the share is out of range.
    """
    return _schedule(optimizer, num_training_steps, warmup, 1.0)


def _schedule(optimizer: Optimizer, steps: int, warmup: float, final: float) -> LambdaLR:
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup is a share of the run, in [0, 1), got {warmup}.")
    if not 0 <= final <= 1:
        raise ValueError(f"final is a share of the highest rate, in [0, 1], got {final}.")
    rise = int(warmup * steps + 0.5)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        done = min(1.0, (step - rise) / max(1, steps - rise))
        return 1.0 - (1.0 - final) * done

    return LambdaLR(optimizer, factor)
