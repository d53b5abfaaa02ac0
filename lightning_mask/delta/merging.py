"""Several deltas of one base as one."""

from collections.abc import Sequence
from typing import Literal

from lightning_mask.core.files import PathLike


def merge(
    deltas: Sequence[PathLike],
    out: PathLike,
    *,
    how: Literal["error", "sum", "mean", "ties"] = "error",
    base: PathLike | None = None,
    density: float = 0.2,
) -> None:
    """Write one delta that does what several do.

    Deltas with no entry in common are united exactly, whatever ``how``. Where an entry is active in several, differences
    from the base are combined: base + f(value_1 - base, value_2 - base, ...), in float64, rounded once.

    Args:
        deltas: Two or more files of :func:`save_delta`, all of one base.
        out: The file to write.
        how: What to do about an entry that is active in several. ``"error"``: refuse; ``"sum"``: add the differences;
            ``"mean"``: their mean over the deltas that have the entry; ``"ties"``: TIES-merging (Yadav et al. 2023): of each
            delta the largest differences are kept, each entry's sign is that of their sum, and the mean is over those that
            agree with it.
        base: The base; needed where entries are in common and the deltas have no originals.
        density: For ``"ties"``: the share of each delta's entries that are kept.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the deltas are of several bases, entries are in common and ``how`` is ``"error"``, the base's values are
            needed and nowhere to be had, or a file is damaged; ``out`` is as it was then.
    """
    raise NotImplementedError
