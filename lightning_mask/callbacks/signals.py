"""Signals that ask a process to stop soon: they are noted, and whoever runs a loop looks at the note between two steps."""

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

_told: list[str] = []
"""Names of the signals that came, in their order."""
_previous: dict[int, Any] = {}
"""What a signal did before."""


def numbers(names: Sequence[str]) -> list[signal.Signals]:
    """Return signals by their names, e.g. ``"SIGUSR1"``.

    Raises:
        ValueError: If there is no such signal, or it cannot be caught.
    """
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            raise ValueError(f"{name!r} is no signal that a process can catch: give names like SIGUSR1 or SIGTERM.")
    return [signal.Signals[name] for name in names]


@contextmanager
def listening(names: Sequence[str]) -> Iterator[None]:
    """Note these signals, in place of what they would do; afterwards they do again what they did before.

    Within another such block the outer one keeps those signals that both name. Outside the main thread, where Python lets
    nobody change what signals do, nothing is noted.

    Args:
        names: E.g. ``["SIGUSR1"]``.

    Raises:
        ValueError: If there is no such signal.
    """
    wanted = numbers(names)
    mine: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        mine = {number: signal.signal(number, _note) for number in wanted if signal.getsignal(number) is not _note}
    _previous.update(mine)
    try:
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
            _previous.pop(number)
        if mine:
            _told.clear()


def listen_again() -> None:
    """Note the signals of the block that this is in again, after somebody else has changed what they do."""
    if threading.current_thread() is threading.main_thread():
        for number in _previous:
            signal.signal(number, _note)


def told() -> list[str]:
    """Return the names of the signals that were noted, in the order in which they came."""
    return list(_told)


def request_requeue() -> str:
    """Ask the cluster to start this job again; return in words what came of it. Call it on one rank, after all is saved.

    Under submitit this is left to submitit's own handler, which ends the process.
    """
    own = _of_submitit()
    if own is not None:
        own(signal.SIGUSR2, None)
        return "submitit was asked to requeue the job"
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return "start it again with ckpt_path=auto"
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False)
        why = "" if done.returncode == 0 else (done.stderr or done.stdout or f"exit code {done.returncode}")
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        return f"job {job} could not be requeued ({' '.join(why.split())}): start it again with ckpt_path=auto"
    return f"job {job} was requeued"


def _of_submitit() -> Callable[[int, Any], None] | None:
    """What submitit does on its signal; None outside submitit."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    handler = _previous.get(number, signal.getsignal(number))
    return handler if callable(handler) else None


def _note(number: int, _: Any) -> None:
    _told.append(signal.Signals(number).name)
