"""Classifies images."""

from torch import Tensor

from lightning_mask.tasks.classifier import Batch, Classifier, MakeOptimizer, MakeScheduler
from lightning_mask.tasks.resnet import ResNet


class ImageClassifier(Classifier):
    """A small ResNet from random weights; see :class:`~lightning_mask.tasks.resnet.ResNet` and :class:`Classifier`.

    Args:
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        channels: Channels of the images: 1 or 3.
        width: Channels of the first stage.
        depth: Blocks in each of the three stages.
        class_names: Names of the classes, in the order of their indices.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        channels: int = 1,
        width: int = 16,
        depth: int = 2,
        class_names: list[str] | None = None,
    ) -> None:
        class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(num_classes, optimizer, scheduler, class_names)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = ResNet(num_classes, channels=channels, width=width, depth=depth)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of ``pixel_values``, [batch, classes]."""
        logits: Tensor = self.net(batch["pixel_values"])
        return logits
