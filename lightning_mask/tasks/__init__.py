"""Tasks: Lightning modules that train a real network. They know nothing of masks."""

from lightning_mask.tasks.classifier import Classifier
from lightning_mask.tasks.image import ImageClassifier
from lightning_mask.tasks.resnet import ResNet
from lightning_mask.tasks.schedulers import linear_warmup_decay, warmup_constant
from lightning_mask.tasks.text import TextClassifier

__all__ = ["Classifier", "ImageClassifier", "ResNet", "TextClassifier", "linear_warmup_decay", "warmup_constant"]
