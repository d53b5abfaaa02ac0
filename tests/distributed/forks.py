"""Fresh processes at the price of a fork: a script imports Lightning once, and every run is a process of its own."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import SystemRandom
from typing import Any

Function = Callable[..., Any]
LEFT_BEHIND = (
    "LOCAL_RANK",
    "NODE_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
)


def clean_environment() -> dict[str, str]:
    """The environment without what Lightning left in it in other tests: a global seed there seeds all ranks alike."""
    return {k: v for k, v in os.environ.items() if k not in LEFT_BEHIND} | {"OMP_NUM_THREADS": "1"}


def free_port() -> int:
    """A port that nobody listens on, and that nobody is given by the kernel before it is used."""
    while True:
        port = SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def run_ranks(ranks: int, function: Function, *arguments: Any, seconds: float = 600) -> list[int]:
    """Run ``function(*arguments)`` in ``ranks`` forked processes at once; return their exit codes, negative: a signal.

    With two ranks or more they find each other as under torchrun. What is left after ``seconds`` is killed (code -9).
    """
    port, children = free_port(), []
    sys.stdout.flush()
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            _child(rank, ranks, port, function, arguments)
        children.append(pid)
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < ranks:
        for pid in set(children) - set(codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            for pid in set(children) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[pid] for pid in children]


def _child(rank: int, ranks: int, port: int, function: Function, arguments: tuple[Any, ...]) -> None:
    code = 1
    try:
        if ranks > 1:
            os.environ |= {
                "LOCAL_RANK": str(rank),
                "RANK": str(rank),
                "NODE_RANK": "0",
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        function(*arguments)
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def note(path: Path, value: Any) -> None:
    """Write JSON."""
    path.write_text(json.dumps(value))
