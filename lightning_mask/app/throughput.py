"""How fast all ranks of a run train together."""

import math
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_mask.core.distributed import gather


class Throughput(Callback):
    """Count the examples that training sees, and the time from the first batch to the last, without validations."""

    def __init__(self) -> None:
        self.examples_per_second: float | None = None
        """Of all ranks together, once training has ended; None where a batch shows no size."""
        self._examples, self._seconds, self._since = 0, 0.0, math.nan

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock, unless it runs since the batch before: waiting for data counts."""
        if math.isnan(self._since):
            self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock."""
        now = time.perf_counter()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._examples += _size(batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of a validation out of account."""
        self._since = math.nan

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up what the ranks counted; the slowest says how long it took."""
        ranks = gather((self._examples, self._seconds))
        examples, seconds = sum(each for each, _ in ranks), max(each for _, each in ranks)
        self.examples_per_second = examples / seconds if examples and seconds else None


def _size(batch: Any) -> int:
    """Number of examples in a batch: the length of its first tensor; 0 where it has none."""
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)
