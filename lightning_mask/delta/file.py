"""The delta file: what is in it, and how it is read."""

from dataclasses import dataclass
from typing import Any

from lightning_mask.core.files import PathLike


@dataclass
class Delta:
    """A delta in memory, for :func:`~lightning_mask.delta.switch`."""

    @classmethod
    def load(cls, path: PathLike) -> "Delta":
        """Read a file of :func:`~lightning_mask.delta.save_delta`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, cut short, or no delta.
        """
        raise NotImplementedError


def inspect(delta: PathLike) -> dict[str, Any]:
    """Return what a delta file says about itself, after checking that it is whole.

    Returns:
        Plain values: ``hash`` (of the file's content), ``base`` (hash of the base), ``active`` and ``total`` (entries),
        ``density``, ``bytes``, ``bytes_per_entry``, ``originals`` (whether it has them), ``recipe``, ``metrics``,
        ``versions``, and ``tensors``: a list of ``{name, shape, dtype, form, active, entries}`` with the form ``"none"``
        (as in the base), ``"entries"``, ``"drawn"`` (from the recipe's seed), ``"rows"`` or ``"whole"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cut short, or no delta.
    """
    raise NotImplementedError
