"""Two processes that train together (gloo, one thread each): on this machine, or each as a host with a wire between them."""

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from typing import Any

import torch
import torch.distributed as dist

from benchmark.memory import quiet

RANKS = 2
LIMIT = 900
"""Seconds after which two ranks are taken to hang."""

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG
_QUEUE = ["burst", "1mb", "latency", "50ms"]
"""What a limited link lets through at once, and how long a packet may wait in it."""


def in_pair(measure: Callable[..., Any], *arguments: Any, hosts: bool = False) -> Any:
    """Call a function in two fresh processes that make a process group when they first train; return what rank 0 gets.

    Args:
        measure: A function of a module.
        arguments: For it, in both processes.
        hosts: Whether each process has a network of its own, with a wire to the other's as the only way out. The networks
            end with the processes, and these with the caller, however it ends: nothing is left behind.

    Raises:
        RuntimeError: If a rank fails or hangs.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a host of such a network has no name, and that is no matter
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results, to = context.Pipe(duplex=False)
    plugged = context.Event() if hosts else None
    ranks = [
        context.Process(target=_rank, args=(rank, port, to, plugged, measure, arguments), daemon=True)
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    to.close()

    def receive() -> Any:
        if not results.poll(LIMIT):
            raise RuntimeError(f"Two ranks did not finish in {LIMIT} s; take fewer rounds.")
        return results.recv()

    try:
        if plugged is not None:
            for _ in ranks:
                receive()  # it has a network of its own
            one, other = (str(process.pid) for process in ranks)
            _run("ip", "link", "add", "v0", "netns", one, "type", "veth", "peer", "name", "v1", "netns", other)
            plugged.set()
        return receive()
    except EOFError:
        raise RuntimeError("A rank failed; its error stands above.") from None
    finally:
        for process in ranks:
            process.join(10)
            process.kill()


def _rank(
    rank: int,
    port: int,
    to: Connection,
    plugged: Event | None,
    measure: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    quiet()
    torch.set_num_threads(1)
    try:
        if plugged is not None:
            _become_host(rank, to, plugged)
        result = measure(*arguments)
        if rank == 0:
            to.send(result)
    finally:
        to.close()
        if plugged is not None:
            plugged.set()  # else the other rank would wait for a wire
        if dist.is_initialized():
            dist.destroy_process_group()


def _become_host(rank: int, to: Connection, plugged: Event) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_END_WITH_PARENT, signal.SIGKILL)
    if libc.unshare(_NEW_NETWORK):  # the threads that this one starts later are in it too
        raise OSError(ctypes.get_errno(), "a network of its own was refused")
    to.send(None)
    plugged.wait(LIMIT)
    _run("ip", "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"v{rank}")
    for device in ("lo", f"v{rank}"):
        _run("ip", "link", "set", device, "up")
    os.environ |= {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": f"v{rank}"}


def why_no_hosts() -> str:
    """Say why this user cannot have processes as hosts with a limited link between them; empty where that can be had."""
    for program, package in (("ip", "iproute2"), ("tc", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(program) is None:
            return f"there is no {program} (package {package})"
    if os.geteuid() != 0:
        return "only root can make networks"
    limit = f"tc qdisc add dev v0 root tbf rate 1gbit {' '.join(_QUEUE)}"
    tried = subprocess.run(
        ["unshare", "--net", "sh", "-c", f"ip link add v0 type veth peer name v1 && {limit}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return tried.stderr.strip().partition("\n")[0] if tried.returncode else ""


def limit_link(bits_per_second: float | None) -> None:
    """Let a host send so much from now on, or as much as it can."""
    device = os.environ["GLOO_SOCKET_IFNAME"]
    if bits_per_second is None:
        with contextlib.suppress(RuntimeError):  # there was no limit
            _run("tc", "qdisc", "del", "dev", device, "root")
    else:
        _run("tc", "qdisc", "replace", "dev", device, "root", "tbf", "rate", f"{bits_per_second:.0f}bit", *_QUEUE)


def bytes_on_link() -> int:
    """Bytes that a host has put on the wire so far, with the headers of the packets."""
    device = os.environ["GLOO_SOCKET_IFNAME"]
    with open("/proc/self/net/dev") as file:
        return next(int(line.split()[9]) for line in file if line.strip().startswith(f"{device}:"))


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
