"""The newest checkpoint of a run's folder that it can go on from; damaged ones are passed over."""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mask.app.checkpoints import read, read_plain

NEWEST = ("auto", "last")
"""Words of ``ckpt_path`` for the newest usable checkpoint of the run's own folder."""
_LAST_RECORD = 22
"""Bytes of the record that ends a zip archive without a comment."""


@dataclass(frozen=True)
class _Found:
    path: Path
    written: int
    step: int


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that a run can best go on from; None where there is none.

    That is ``last.ckpt``, or what was written later, after more steps; without it ``previous.ckpt``. Neither the steps alone
    say it (an earlier run may have left some that had more of them) nor the times alone (a copy of the folder may have others).
    One that is damaged is passed over, with a warning that names it; weights without a state of training, silently.

    Args:
        folder: Of the checkpoints; it need not exist.
    """
    found = []
    for path in sorted(folder.glob("[!.]*.ckpt")):
        try:
            state, written = _state(path), path.stat().st_mtime_ns
        except (OSError, ValueError) as error:
            if path.exists():  # else it was renamed meanwhile
                _pass_over(path, error)
            continue
        if state.keys() >= {"loops", "global_step"}:
            found.append(_Found(path, written, state["global_step"]))
    while found:
        best = _best(found)
        try:
            _check_sums(best.path)
        except (OSError, ValueError) as error:
            _pass_over(best.path, error)
            found.remove(best)
        else:
            return best.path
    return None


def _best(found: list[_Found]) -> _Found:
    places = {"last.ckpt": 0, "previous.ckpt": 1}
    first = min(found, key=lambda one: (places.get(one.path.name, 2), -one.written, -one.step))
    newer = [one for one in found if one.written > first.written and one.step > first.step]
    return max(newer, key=lambda one: one.step, default=first)


def name_and_step(path: str | Path | None) -> str:
    """Return what tells a run's checkpoint from another one on any machine: its name and, where it can be read here, its step."""
    if path is None:
        return "none"
    local = Path(path)
    try:
        return f"{local.name} of step {_state(local)['global_step']}"
    except (OSError, ValueError, KeyError):  # at an address, or of a strategy that writes folders of its own
        return local.name


def _state(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, without reading its tensors; of a strategy's folder, what is not dealt out.

    Raises:
        ValueError: If it is damaged.
    """
    if path.is_file():
        return read(path, "cpu", mmap=True)
    parts = [path / ".metadata", *_shards(path)]
    if len(parts) < 2 or not all(part.is_file() and part.stat().st_size for part in parts):
        raise ValueError("parts of the folder are missing, or empty.")
    return read_plain(path / "meta.pt", "cpu")


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"))


def _check_sums(path: Path) -> None:
    """Refuse a checkpoint of which a byte was changed since it was written: torch does not look at the sums that it wrote.

    Raises:
        ValueError: If there is such a byte.
    """
    for file in [path] if path.is_file() else [path / ".metadata", path / "meta.pt", *_shards(path)]:
        try:
            odd = _odd_part(file) if file.name != ".metadata" else _odd_opcode(file)
        except Exception as error:  # what a changed byte makes of a format's fields is of any kind
            raise ValueError(f"{file.name} is not what was written: {error}.") from error
        if odd is not None:
            raise ValueError(f"{odd} in {file.name} is not what was written.")


def _odd_opcode(path: Path) -> str | None:
    """Raise where a pickle cannot be read to its end; nothing is made of it."""
    *_, (last, _, _) = pickletools.genops(path.read_bytes())
    return None if last.name == "STOP" else last.name


def _odd_part(path: Path) -> str | None:
    """The first part that is not what its sum says, in a file of archives one behind the other, as torch writes shards."""
    with path.open("rb") as file:
        end = path.stat().st_size
        while end:
            head = _Head(file, end)
            head.seek(max(end - _LAST_RECORD, 0))
            if head.read(4) != b"PK\5\6":  # else the last one that is whole would be found, before the rest
                raise zipfile.BadZipFile(f"no archive ends at byte {end}")
            with zipfile.ZipFile(head) as archive:
                odd = archive.testzip()
                begin = min((part.header_offset for part in archive.infolist()), default=end)
            if odd is not None or not 0 <= begin < end:
                return odd or f"what ends at byte {end}"
            end = begin
    return None


class _Head:
    """The first bytes of a file, as a file that can be read."""

    def __init__(self, file: IO[bytes], end: int) -> None:
        self._file, self._end = file, end

    def read(self, size: int = -1) -> bytes:
        left = max(self._end - self.tell(), 0)
        return self._file.read(left if size < 0 else min(size, left))

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset + (0, self.tell(), self._end)[whence])

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _pass_over(path: Path, error: Exception) -> None:
    rank_zero_warn(f"{path} cannot be gone on from and is passed over: {error}")
