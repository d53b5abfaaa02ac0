"""What differs between two checkpoints."""

from dataclasses import dataclass

from lightning_mask.core.files import PathLike


@dataclass(frozen=True)
class Difference:
    """How one tensor differs: a row of :func:`diff`."""

    name: str
    """As the first checkpoint has it, or the second where that alone has it."""
    status: str
    """``"equal"``, ``"changed"``, ``"shape"``, ``"dtype"`` (these differ), ``"only in a"`` or ``"only in b"``."""
    shape: tuple[int, ...]
    dtype: str
    entries: int
    changed: int
    """Entries whose bits differ; all of them where shapes or dtypes do, or one side lacks the tensor."""
    largest: float
    """Largest absolute difference; nan where there is none to be had."""
    norm: float
    """Euclidean norm of the difference, likewise."""


def diff(a: PathLike, b: PathLike) -> list[Difference]:
    """Compare two checkpoints, tensor by tensor and bit for bit.

    Args:
        a: A checkpoint: ``.safetensors``, ``.ckpt`` or ``.pt``, or a folder as ``save_pretrained`` writes it.
        b: Another, in whatever form; its names may have a prefix that those of ``a`` lack, or the other way round.

    Returns:
        One row for each tensor of either, in the order of ``a``; also those that are equal.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If a checkpoint is damaged or none, or they have no tensor's name in common.
    """
    raise NotImplementedError
