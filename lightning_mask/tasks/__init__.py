"""Tasks: Lightning modules that train a real network. They know nothing of masks."""

from lightning_mask.tasks.causal_lm import CausalLM
from lightning_mask.tasks.classifier import Classifier
from lightning_mask.tasks.efficientnet import EfficientNetLite0
from lightning_mask.tasks.image import EfficientNetClassifier, ImageClassifier
from lightning_mask.tasks.pretrained_image import HFImageClassifier, TimmClassifier
from lightning_mask.tasks.resnet import ResNet
from lightning_mask.tasks.schedulers import linear_warmup_decay, warmup_constant
from lightning_mask.tasks.task import Task
from lightning_mask.tasks.text import TextClassifier

__all__ = [
    "CausalLM",
    "Classifier",
    "EfficientNetClassifier",
    "EfficientNetLite0",
    "HFImageClassifier",
    "ImageClassifier",
    "ResNet",
    "Task",
    "TextClassifier",
    "TimmClassifier",
    "linear_warmup_decay",
    "warmup_constant",
]
