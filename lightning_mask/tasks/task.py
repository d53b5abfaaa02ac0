"""What all tasks share: how figures of an epoch are logged, and the optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import Optimizer
from torchmetrics import Metric

from lightning_mask.callbacks.calibration import take_places
from lightning_mask.core.patterns import repeated_blocks
from lightning_mask.core.sharding import reshard

Batch = dict[str, Tensor]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[..., Any]


class Task(LightningModule):
    """A Lightning module that is given its optimizer and scheduler, and keeps its figures in ``metrics``.

    Args:
        optimizer: Called with all parameters, held ones too, returns the optimizer; may be left out where nothing is trained.
        scheduler: Called with the optimizer and ``num_training_steps=``, returns a learning-rate scheduler that is stepped
            once per optimizer step; None: the rate stays.

    Attributes:
        net: The network.
        metrics: Figures of an epoch by name, each a :class:`torchmetrics.Metric`.
    """

    net: nn.Module

    def __init__(self, optimizer: MakeOptimizer | None = None, scheduler: MakeScheduler | None = None) -> None:
        super().__init__()
        self._make_optimizer = optimizer
        self._make_scheduler = scheduler
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        """Deal the parameters out over the ranks, block by block, where ModelParallelStrategy runs; else do nothing."""
        mesh = getattr(self, "_device_mesh", None)  # Lightning sets it under that strategy
        if isinstance(
            self.net, FSDPModule
        ):  # a validation may have left gathered parameters, which no optimizer may get
            reshard(self.net)
        if mesh is None or isinstance(self.net, FSDPModule):
            return
        for name in repeated_blocks(self.net):
            fully_shard(self.net.get_submodule(name), mesh=mesh["data_parallel"])
        fully_shard(self.net, mesh=mesh["data_parallel"])

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def _add(self, name: str, metric_name: str, *what: Any) -> None:
        """Add a batch to a figure of the epoch.

        Losses too are metrics: Lightning's own mean over ranks rounds the number of examples per rank down, and so is off
        where it is odd.
        """
        metric = self._metric(metric_name)
        metric.update(*what)
        self.log(name, metric, on_step=False, on_epoch=True, prog_bar=name.startswith("val/"))

    def on_train_start(self) -> None:
        """Let the data go on where a checkpoint left it, also without any mask."""
        take_places(self.trainer)

    def configure_optimizers(self) -> Any:
        """Return the optimizer over all parameters, with the scheduler if there is one.

        Raises:
            ValueError: If no optimizer was given, or a scheduler is to span a run without an end.
        """
        if self._make_optimizer is None:
            raise ValueError(
                f"{type(self).__name__} has no optimizer: give it optimizer=, for example a partial of torch.optim.AdamW."
            )
        optimizer = self._make_optimizer(list(self.parameters()))
        if self._make_scheduler is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError(
                "A scheduler needs a run with an end: give the trainer max_epochs or max_steps, or set scheduler to null."
            )
        scheduler = self._make_scheduler(optimizer, num_training_steps=int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
