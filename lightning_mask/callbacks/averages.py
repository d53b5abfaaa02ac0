"""Averages of the weights that Lightning's callbacks keep."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_mask.callbacks.packages import twins


def averages_of(trainer: Trainer) -> list[nn.Module]:
    """Return the modules in which weight averaging callbacks keep their averages."""
    kinds = twins(StochasticWeightAveraging, WeightAveraging)
    kept = [c._average_model for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]
    return [
        average.module if isinstance(average, AveragedModel) else average for average in kept if average is not None
    ]
