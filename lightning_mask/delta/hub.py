"""Deltas on the Hugging Face hub, or in a folder that stands for it."""

from pathlib import Path

from lightning_mask.core.files import PathLike


def push_delta(path: PathLike, repo: str, *, name: str = "delta.safetensors") -> str:
    """Put a delta file into a repository of the hub, or into a folder, with a ``README.md`` where there is none.

    Args:
        path: A file of :func:`~lightning_mask.delta.save_delta`.
        repo: ``"user/name"`` on the hub (made if need be, private), or a folder's path, which begins with ``/``, ``.`` or ``~``
            or exists.
        name: Name of the file there.

    Returns:
        Where it is now: an address or a path.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        ValueError: If the file is damaged or no delta, or the hub refuses it.
    """
    raise NotImplementedError


def pull_delta(
    repo: str, out: PathLike | None = None, *, name: str = "delta.safetensors", revision: str | None = None
) -> Path:
    """Fetch a delta file that :func:`push_delta` put there, and check it.

    Args:
        repo: As for :func:`push_delta`.
        out: Where to write it; None: it stays in the hub's cache (or the folder).
        name: Name of the file there.
        revision: Branch, tag or commit of the hub.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: If there is no such repository, folder or file.
        ModuleNotFoundError: If huggingface_hub is not installed.
        ValueError: If the file is damaged or no delta.
    """
    raise NotImplementedError
