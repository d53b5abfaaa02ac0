"""Fine-tune, prune and unfreeze a network by mask in PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_mask.callbacks import FreezeMask, GradientMask, Phase, PhaseUnfreeze, PruneMask
    from lightning_mask.core import MaskSet, criterion

    __version__: str

__all__ = ["FreezeMask", "GradientMask", "MaskSet", "Phase", "PhaseUnfreeze", "PruneMask", "criterion"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, no sooner: the command line says ``--help`` without waiting for torch."""
    if name == "__version__":
        return _version()
    if name in ("callbacks", "core"):
        return import_module(f"lightning_mask.{name}")
    if name in __all__:
        package = "core" if name in ("MaskSet", "criterion") else "callbacks"
        return getattr(import_module(f"lightning_mask.{package}"), name)
    raise AttributeError(f"module 'lightning_mask' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-mask")
    except PackageNotFoundError:  # imported from a checkout that is not installed
        return "0.0.0"
