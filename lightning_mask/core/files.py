"""Files and folders that appear whole or not at all, and are on the disk before they have their name."""

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PathLike = str | os.PathLike[str]


@contextmanager
def whole_file(path: PathLike) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; what was written there is renamed to ``path`` when the block ends well.

    A file that is replaced hands its mode on; a new one has that of the umask, whatever wrote it. Where ``path`` is a symbolic
    link, what it leads to is replaced, and the link stays.

    Raises:
        IsADirectoryError: If ``path`` is a folder; before the block begins.
        FileExistsError: If ``path`` is a device or a pipe; likewise.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{str(path)!r} is a folder; give the name of a file.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise FileExistsError(f"{str(path)!r} is no regular file; give the name of a file.")
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        _to_disk(temporary)
        temporary.chmod(stat.S_IMODE(mode))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _to_disk(path.parent)


@contextmanager
def whole_folder(path: PathLike) -> Iterator[Path]:
    """Yield an empty temporary folder beside ``path`` that takes its place when the block ends well; modes, links: as above."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    mode = (path if path.is_dir() else temporary).stat().st_mode
    try:
        yield temporary
        temporary.chmod(stat.S_IMODE(mode))
        for folder, _, names in os.walk(temporary):
            for each in (*names, ""):
                _to_disk(Path(folder, each))
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():  # stopped between the two
            os.replace(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk; Windows is left to itself."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        opened = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # a link, or what may be written and not read
        return
    try:
        os.fsync(opened)
    except OSError:
        if not path.is_dir():  # not every file system does this for folders
            raise
    finally:
        os.close(opened)
