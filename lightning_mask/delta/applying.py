"""Putting a delta onto its base, and taking it off again."""

from lightning_mask.core.files import PathLike


def apply(base: PathLike, delta: PathLike, out: PathLike, *, force: bool = False) -> None:
    """Write ``base`` with the delta's values to ``out``: equal, bit for bit, to the model that the delta was made from.

    Args:
        base: A checkpoint: a file, or a folder as ``save_pretrained`` writes it.
        delta: A file of :func:`save_delta`.
        out: What to write, in the form of ``base``: a file or a folder; may be ``base`` itself. A folder must be new or
            empty otherwise.
        force: Also take a base whose content is not the one that the delta was made from.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the base is another one (names, shapes, content), or a file is damaged; ``out`` is as it was then.
    """
    raise NotImplementedError


def revert(
    tuned: PathLike, delta: PathLike, out: PathLike, *, base: PathLike | None = None, force: bool = False
) -> None:
    """Write the base that ``tuned`` came from to ``out``, bit for bit.

    The values come from ``base`` where it is given, else from the originals in the delta.

    Args:
        tuned: A checkpoint that :func:`apply` wrote, or that the delta was made from.
        delta: A file of :func:`save_delta`.
        out: What to write, in the form of ``tuned``, as for :func:`apply`.
        base: The base; needed where the delta has no originals.
        force: Also take off a delta that was not the last change of ``tuned``, or whose base was another one.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If ``tuned`` is not the base with this delta, there are neither originals nor a base, or a file is
            damaged; ``out`` is as it was then.
    """
    raise NotImplementedError
