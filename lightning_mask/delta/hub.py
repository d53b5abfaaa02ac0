"""Deltas on the Hugging Face hub, or in a folder that stands for it."""

import shutil
from pathlib import Path
from typing import Any

from lightning_mask.core.files import PathLike, whole_file
from lightning_mask.delta.file import inspect

_NAME = "delta.safetensors"


def push_delta(path: PathLike, repo: str, *, name: str = _NAME) -> str:
    """Put a delta file into a repository of the hub, or into a folder, with a ``README.md`` where there is none.

    Args:
        path: A file of :func:`~lightning_mask.delta.save_delta`.
        repo: ``"user/name"`` on the hub (made if need be, private), or the path of a folder: one that exists, or that begins
            with ``/``, ``.`` or ``~``.
        name: Name of the file there.

    Returns:
        Where it is now: an address or a path.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If it is for the hub and huggingface_hub is not installed.
        ValueError: If the file is damaged or no delta, or the hub refuses it.
    """
    card = _card(inspect(path), name)
    folder = _folder(repo)
    if folder is not None:
        with whole_file(folder / name) as temporary:
            shutil.copyfile(path, temporary)
        if not (folder / "README.md").exists():
            with whole_file(folder / "README.md") as temporary:
                temporary.write_text(card)
        return str(folder / name)
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=True, exist_ok=True)
        if not api.file_exists(repo, "README.md"):
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo)
        return str(api.upload_file(path_or_fileobj=str(path), path_in_repo=name, repo_id=repo))
    except Exception as error:
        raise ValueError(
            f"{repo!r} could not be written to on the hub ({_first_line(error)}): check the name, the network and "
            "`hf auth login`."
        ) from error


def pull_delta(repo: str, out: PathLike | None = None, *, name: str = _NAME, revision: str | None = None) -> Path:
    """Fetch a delta file that :func:`push_delta` put there, and check it.

    Args:
        repo: As for :func:`push_delta`.
        out: Where to write it; None: it stays in the hub's cache (or the folder).
        name: Name of the file there.
        revision: Branch, tag or commit of the hub.

    Returns:
        The file's path.

    Raises:
        FileNotFoundError: If there is no such folder or file, or it cannot be fetched.
        ModuleNotFoundError: If it is on the hub and huggingface_hub is not installed.
        ValueError: If the file is damaged or no delta.
    """
    folder = _folder(repo)
    if folder is not None:
        found = folder / name
    else:
        hub = _hub()
        try:
            found = Path(hub.hf_hub_download(repo, name, revision=revision))
        except Exception as error:
            raise FileNotFoundError(
                f"There is no {name} in {repo!r} on the hub, or it cannot be fetched ({_first_line(error)})."
            ) from error
    inspect(found)
    if out is None:
        return found
    with whole_file(out) as temporary:
        shutil.copyfile(found, temporary)
    return Path(out)


def _folder(repo: str) -> Path | None:
    """The folder that a word names, or None where it names a repository of the hub."""
    path = Path(repo).expanduser()
    return path if path.is_dir() or repo.startswith(("/", ".", "~")) else None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ModuleNotFoundError(
            "The hub takes huggingface_hub: pip install 'lightning-mask[demo]', or name a folder."
        ) from error
    return huggingface_hub


def _card(facts: dict[str, Any], name: str) -> str:
    metrics = "".join(f"| {key} | {value:.4f} |\n" for key, value in facts["metrics"].items())
    return (
        "---\nlibrary_name: lightning-mask\ntags:\n- lightning-mask\n- delta\n---\n\n"
        f"# A delta\n\n{facts['active']:,} of {facts['total']:,} entries ({facts['density']:.2%}) of a network that were "
        f"trained, to be put onto the base they came from (content hash `{facts['base'][:16]}`):\n\n"
        f"```python\nfrom lightning_mask.delta import apply, pull_delta\n\n"
        f'apply("base/", pull_delta("<this repository>", name="{name}"), "tuned/")\n```\n'
        + (f"\n| metric | value |\n|---|---|\n{metrics}" if metrics else "")
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
