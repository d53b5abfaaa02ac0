"""Classifies images with any model of transformers or timm."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from lightning_mask.data.packaged import need
from lightning_mask.data.pretrained import labels, load
from lightning_mask.tasks.classifier import Classifier
from lightning_mask.tasks.task import Batch, MakeOptimizer, MakeScheduler


class HFImageClassifier(Classifier):
    """Any image-classification model of Hugging Face transformers, with a new head where the checkpoint has none that fits.

    The model is ``net``, so its parameters have the names that transformers gives them behind ``net.``: for ViT
    ``net.vit.layers...`` and ``net.classifier...``. Grey images become as many equal channels as the model has, and all
    are scaled to the size that its configuration names. See :class:`Classifier` for what is logged.

    Args:
        model: A folder, or a name on the Hugging Face hub.
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        class_names: Names of the classes, in the order of their indices; kept in the model's configuration.
        pretrained: Start from the checkpoint's weights; else only its configuration is used, and all weights are random.
        gradient_checkpointing: Compute activations anew in the backward pass instead of storing them.

    Raises:
        ModuleNotFoundError: If transformers is not installed.
        FileNotFoundError: If there is no such model, or its folder is incomplete.
        ValueError: If a number is out of range.
    """

    net: Any

    def __init__(
        self,
        model: str,
        *,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        class_names: list[str] | None = None,
        pretrained: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(num_classes, optimizer, scheduler, class_names)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        settings = labels(num_classes, class_names)

        def weights(source: str) -> Any:
            from transformers import AutoModelForImageClassification

            return AutoModelForImageClassification.from_pretrained(source, ignore_mismatched_sizes=True, **settings)

        def random(source: str) -> Any:
            from transformers import AutoConfig, AutoModelForImageClassification

            return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(source, **settings))

        net = load(model, weights, "model") if pretrained else load(model, random, "configuration")
        self.net = net.float().train()
        if gradient_checkpointing:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of ``pixel_values``, [batch, classes]."""
        config = self.net.config
        images = fitted(batch["pixel_values"], getattr(config, "num_channels", 3), getattr(config, "image_size", None))
        logits: Tensor = self.net(pixel_values=images).logits
        return logits


class TimmClassifier(Classifier):
    """Any model of timm by its name; see :class:`Classifier` for what is logged.

    The model is ``net``, so its parameters have timm's names behind ``net.``: ``net.blocks...`` and ``net.head...`` of a vision
    transformer. Grey images become three equal channels.

    Args:
        model: Its name in timm, for example ``"vit_tiny_patch16_224"``.
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        size: Images are scaled to a square of so many pixels; None: as they come.
        pretrained: Start from timm's weights, which it fetches from the hub; else all weights are random.
        class_names: Names of the classes, in the order of their indices.
        arguments: Further keyword arguments of ``timm.create_model``.

    Raises:
        ModuleNotFoundError: If timm, or torchvision, which it needs, is not installed.
        ValueError: If timm has no such model, or a number is out of range.
    """

    net: Any

    def __init__(
        self,
        model: str,
        *,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        size: int | None = None,
        pretrained: bool = True,
        class_names: list[str] | None = None,
        arguments: dict[str, Any] | None = None,
    ) -> None:
        class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(num_classes, optimizer, scheduler, class_names)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        for package in ("timm", "torchvision"):
            need(package, f"Model {model!r}")
        import timm

        if model.partition(".")[0] not in timm.list_models():
            close = timm.list_models(f"{model.partition('_')[0]}*")[:5]
            raise ValueError(
                f"timm has no model {model!r}; among its models are {', '.join(close) or 'vit_tiny_patch16_224'}."
            )
        self.net = timm.create_model(model, pretrained=pretrained, num_classes=num_classes, **(arguments or {}))
        self.size = size

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of ``pixel_values``, [batch, classes]."""
        logits: Tensor = self.net(fitted(batch["pixel_values"], 3, self.size))
        return logits


def fitted(images: Tensor, channels: int, size: int | list[int] | tuple[int, ...] | None) -> Tensor:
    """Return images [batch, 1 or channels, height, width] with ``channels`` and scaled to ``size``; None: as they are."""
    images = images.expand(-1, channels, -1, -1)
    if size is None:
        return images
    square = (size, size) if isinstance(size, int) else tuple(size)
    if images.shape[-2:] == torch.Size(square):
        return images
    return interpolate(images, square, mode="bilinear", align_corners=False, antialias=True)
