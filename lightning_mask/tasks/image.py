"""Classifies images: a small network from random weights, and one that ImageNet has taught."""

from torch import Tensor

from lightning_mask.tasks.classifier import Classifier
from lightning_mask.tasks.efficientnet import EfficientNetLite0
from lightning_mask.tasks.resnet import ResNet
from lightning_mask.tasks.task import Batch, MakeOptimizer, MakeScheduler


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


class EfficientNetClassifier(Classifier):
    """EfficientNet-Lite0 with its ImageNet weights and a new head; see :class:`EfficientNetLite0` and :class:`Classifier`.

    Which normalisations keep their ImageNet statistics is for the masks to say: one that is held whole does.

    Args:
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        size: Images are scaled to a square of so many pixels; None: as they come. ImageNet's were 224.
        dropout: Rate of the dropout before the head.
        pretrained: Start from the checkpoint's weights; else all weights are random.
        class_names: Names of the classes, in the order of their indices.

    Raises:
        ModuleNotFoundError: If the package with the checkpoint is not installed.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        size: int | None = 64,
        dropout: float = 0.2,
        pretrained: bool = True,
        class_names: list[str] | None = None,
    ) -> None:
        class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(num_classes, optimizer, scheduler, class_names)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = EfficientNetLite0(num_classes, size=size, dropout=dropout, pretrained=pretrained)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of ``pixel_values``, [batch, classes]."""
        logits: Tensor = self.net(batch["pixel_values"])
        return logits
