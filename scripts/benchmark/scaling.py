"""One process, two, and two hosts with a limited link: do steps follow the bytes? And what that comes to on many GPUs."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmark.ddp import DENSE, OURS
from benchmark.model import DENSITY, Classifier, load, random_masks
from benchmark.pair import RANKS, bytes_on_link, in_pair, limit_link
from benchmark.steps import goal
from benchmark.turns import Clock, Way, interleave, ratio
from benchmark.ways import ours

Rows = list[dict[str, Any]]
BATCH = 1
"""Sequences in a batch: few, so that a slow core is soon done and the link is what a step waits for."""
LINKS = {"no limit": None, "1 Gbit/s": 1e9, "100 Mbit/s": 1e8}
"""Bits per second of the link between two hosts."""

GPUS = (8, 32, 128, 512, 1024)
NETWORKS = {"1 Gbit/s": 1e9, "10 Gbit/s": 1e10, "100 Gbit/s": 1e11, "400 Gbit/s": 4e11}
"""Bits per second that each GPU can send, for the projection."""
LATENCY_MS = 0.01
"""Time from one GPU of the ring to the next, for the projection."""
BUCKET = 25 * 2**20
"""Bytes of dense gradients that DDP reduces at once, its ``bucket_cap_mb``."""


def scaling(base: Classifier, rounds: int, steps: int, hosts: bool) -> tuple[Rows, Rows]:
    """Train everything, and 1 % of the entries, in turn: in one process of one thread, in two, and over each link.

    Bytes are those that one rank sends in a step: of a host what its interface counts, with the headers of packets and
    what is sent again; else what it writes into sockets. "ms by bytes" is a step without a limit and the time that its
    bytes take on the link; a step is shorter where bytes are sent while backward goes on.

    Args:
        base: What is trained.
        rounds: How often each run takes its turn.
        steps: Steps of one turn.
        hosts: Whether the two processes are hosts with a link that can be limited.

    Returns:
        The rows, and the goals with what was measured.
    """
    clocks = interleave({DENSE: Way(), OURS: ours()}, base, rounds, steps, threads=1, batch=BATCH)
    rows = _rows(1, "none", clocks)
    rows += in_pair(_two, rounds, steps, hosts, hosts=hosts)
    density = random_masks(base, DENSITY).density()
    dense, sparse = sent_bytes(rows)
    goals = [goal("bytes on the link over density * dense", 1.05, sparse / dense / density)]
    goals += [
        goal(f"two hosts, {row['link']}: step at 1 % over dense DDP", 0.2, row["over dense"])
        for row in rows
        if LINKS.get(row["link"]) and row["way"] == OURS
    ]
    return rows, goals


def _two(rounds: int, steps: int, hosts: bool) -> Rows:
    """What one of the two processes does."""
    base, ways = load(), {DENSE: Way(), OURS: ours()}
    arguments: dict[str, Any] = {"threads": 1, "devices": RANKS, "strategy": "ddp", "batch": BATCH}
    if not hosts:
        return _rows(RANKS, "this machine", interleave(ways, base, rounds, steps, **arguments))
    rows: Rows = []
    for link, bits_per_second in LINKS.items():
        limit_link(bits_per_second)
        clocks = interleave(ways, base, rounds, steps, sent_bytes=bytes_on_link, **arguments)
        rows += _rows(RANKS, link, clocks)
        if bits_per_second:
            for row, free in zip(rows[-2:], rows[:2], strict=True):
                row["ms by bytes"] = free["ms"] + row["sent MB"] * 8e9 / bits_per_second
    return rows


def _rows(processes: int, link: str, clocks: Mapping[str, Clock]) -> Rows:
    return [
        {
            "processes": processes,
            "link": link,
            "way": name,
            "ms": (ms := statistics.median(clock.turns_ms())),
            "over dense": ratio(clock.turns_ms(), clocks[DENSE].turns_ms()),
            "sequences a second": processes * BATCH / ms * 1e3,
            "sent MB": clock.sent_per_step() / 1e6 if processes > 1 else None,
            "ms by bytes": None,
        }
        for name, clock in clocks.items()
    ]


def sent_bytes(rows: Rows) -> tuple[float, float]:
    """The bytes that one of two ranks sent in a step, of dense DDP and of ours: what an all-reduce of two reduces."""
    first = {row["way"]: row["sent MB"] * 1e6 for row in reversed(rows) if row["processes"] == RANKS}
    return first[DENSE], first[OURS]


def wire_ms(reduced: float, reductions: int, gpus: int, bits_per_second: float) -> float:
    """Milliseconds of the all-reduces of a step in a ring of GPUs.

    Each of ``reductions`` all-reduces takes ``2 (n - 1)`` hops one after the other, and all of them together send
    ``2 (n - 1) / n`` times the reduced bytes from each GPU (Patarasuk and Yuan 2009, section 3)::

        reductions * 2 (n - 1) * latency + 2 (n - 1) / n * reduced * 8 / bits_per_second
    """
    hops = 2 * (gpus - 1)
    return reductions * hops * LATENCY_MS + hops / gpus * reduced * 8e3 / bits_per_second


def projection(dense: float, sparse: float, compute_ms: float) -> Rows:
    """What a step would take on many GPUs, from the bytes that a step reduces; nothing of it is measured but the bytes.

    Nothing is sent while a GPU computes, so that a step is ``compute_ms`` and the time of its all-reduces.

    Args:
        dense: Bytes reduced by dense DDP.
        sparse: Bytes reduced by ours, in as many all-reduces.
        compute_ms: Forward, backward and optimizer on one GPU, the same for both.
    """
    rows = []
    reductions = math.ceil(dense / BUCKET)
    for gpus in GPUS:
        for network, bits_per_second in NETWORKS.items():
            wires = [wire_ms(reduced, reductions, gpus, bits_per_second) for reduced in (dense, sparse)]
            steps = [compute_ms + wire for wire in wires]
            rows.append(
                {
                    "GPUs": gpus,
                    "network": network,
                    "dense: wire ms": wires[0],
                    "ours: wire ms": wires[1],
                    "dense: step ms": steps[0],
                    "ours: step ms": steps[1],
                    "times faster": steps[0] / steps[1],
                }
            )
    return rows


def assumptions(compute_ms: float) -> str:
    """What the projection rests on, for its heading."""
    return (
        f"bytes of a step as measured, {compute_ms:g} ms of computing on each GPU, nothing sent meanwhile\n"
        f"wire = all-reduces * 2 (n - 1) * {LATENCY_MS:g} ms + 2 (n - 1) / n * bytes * 8 / (bits a second)\n"
        f"all-reduces = dense bytes over DDP's buckets of {BUCKET >> 20} MiB"
    )
