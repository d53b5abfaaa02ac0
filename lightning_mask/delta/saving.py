"""Making a delta from a base and what training made of it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_mask.core.files import PathLike
from lightning_mask.core.maskset import MaskSet

Source = PathLike | Mapping[str, Tensor] | nn.Module


def save_delta(
    path: PathLike,
    base: Source,
    tuned: Source,
    masks: MaskSet | PathLike | None = None,
    *,
    originals: bool = False,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> None:
    """Write to ``path`` what ``tuned`` has other than ``base``.

    Args:
        path: The file to write, usually ``*.safetensors``.
        base: What training started from: a checkpoint's path, a state dict, or a module.
        tuned: What came of it, likewise.
        masks: Which entries were active; the delta then has exactly these. Tensors that the masks do not name (buffers)
            go by what differs. None: all goes by what differs, bit for bit.
        originals: Keep the base's values beside the tuned ones, so that the base is not needed for :func:`revert`.
        recipe: How the masks came about, as plain values; default: that of ``masks``.
        metrics: Figures of the tuned model, to be read by :func:`inspect`.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the two are not of one model (a tensor's shape or dtype differs), a held entry differs, or a
            checkpoint is damaged.
    """
    raise NotImplementedError
