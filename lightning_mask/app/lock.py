"""A run's folder belongs to one job at a time."""

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning_mask.app.ranks import is_first

_NAME = ".lock"
_BEAT, _LOST = 60.0, 300.0
"""Seconds between two signs of life, and without one until a job on another machine counts as gone."""


@contextmanager
def kept_to_this_job(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, on the first rank; refuse a folder that another job is at work in.

    The lock is a file that only one process can create, also on a network file system; locks of the operating system, which
    not every file system has, are not used. It says who holds it, and its time is set anew every minute. One that was left
    behind is taken over: by a process of this machine that is gone, by an earlier try of this SLURM job, or without a sign of
    life for five minutes.

    Args:
        folder: It is made where it is missing.

    Raises:
        FileExistsError: If another job holds it.
        OSError: If the folder cannot be written to.
    """
    if not is_first():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path, mine = folder / _NAME, _holder()
    _take(path, mine)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(path, ended), daemon=True, name="sign-of-life").start()
    try:
        yield
    finally:
        ended.set()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _holder() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": _restarts(),
        "token": uuid.uuid4().hex,
    }


def _restarts() -> str:
    """What tells the tries of a SLURM job from its steps at one time: how often SLURM, and torchrun in it, started it again."""
    return " ".join(os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))


def _take(path: Path, mine: dict[str, Any]) -> None:
    for _ in range(10):
        try:
            opened = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            other = _read(path)
            if other is not None:
                _refuse_if_alive(path, other)
                _take_away(path, other)
            continue
        try:
            with os.fdopen(opened, "w", encoding="utf-8") as file:
                json.dump(mine, file)
        except OSError:  # the disk is full: an empty one would keep this folder from the next try, too
            path.unlink(missing_ok=True)
            raise
        return
    raise FileExistsError(
        f"{path} changes hands all the time: give this run a folder of its own with hydra.run.dir=..."
    )


def _refuse_if_alive(path: Path, other: dict[str, Any]) -> None:
    here, job = other.get("host") == socket.gethostname(), os.environ.get("SLURM_JOB_ID")
    seen = _age(path)
    earlier_try = job is not None and other.get("job") == job and other.get("restarts") != _restarts()
    if _born(other["pid"]) == other["born"] if here else seen < _LOST and not earlier_try:
        who = f"process {other['pid']} on {other['host']}" if other else "which has only just begun"
        who += f" (job {other['job']})" if other.get("job") else ""
        gone = "" if here else f", last seen {seen:.0f} s ago; if it is gone, delete {path}"
        raise FileExistsError(
            f"{path.parent} is the folder of a run that is at work, {who}{gone}: give this one another with hydra.run.dir=..."
        )


def _take_away(path: Path, stale: dict[str, Any]) -> None:
    """Remove a lock that was left behind; not one that somebody else has put in its place meanwhile."""
    aside = path.with_name(f"{_NAME}.{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        os.rename(path, aside)
        if _read(aside) != stale:
            os.rename(aside, path)
        aside.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    """Who holds a lock; None where there is none. What is not written yet, or damaged, says nothing of its holder."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _age(path: Path) -> float:
    """Seconds since a lock's last sign of life, by the clock of its file system."""
    probe = path.with_name(f"{_NAME}.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(_BEAT):
        with suppress(OSError):
            os.utime(path)  # the file system's own time


def _born(pid: int) -> str:
    """What tells a process of this machine from a later one of the same number: when it began; "gone" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:  # it is gone, or this system has no /proc
        pass
    try:
        os.kill(pid, 0)
    except OSError as error:
        return "there" if isinstance(error, PermissionError) else "gone"
    return "there"
