"""Fine-tune, prune and unfreeze a network by mask in PyTorch Lightning."""

from importlib.metadata import PackageNotFoundError, version

from lightning_mask.callbacks import FreezeMask, GradientMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.core import MaskSet, criterion

try:
    __version__ = version("lightning-mask")
except PackageNotFoundError:  # imported from a checkout that is not installed
    __version__ = "0.0.0"

__all__ = ["FreezeMask", "GradientMask", "MaskSet", "Phase", "PhaseUnfreeze", "PruneMask", "criterion"]
