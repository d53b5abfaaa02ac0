"""Two processes under DDP (gloo, one thread each): step time, bytes on the wire, and whether the replicas stay equal."""

import statistics
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch import Callback

from benchmark.model import DENSITY, load, random_masks
from benchmark.pair import RANKS, in_pair
from benchmark.turns import WARM, Clock, Way, interleave, ratio, size
from benchmark.ways import by_hand, ours, phase_ways

DENSE, OURS = "dense DDP", "ours"


class ReplicasEqual(Callback):
    """Looks at the end whether all ranks hold the same weights."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sums = torch.stack([p.detach().double().sum() for p in pl_module.parameters()])
        of_all = [torch.empty_like(sums) for _ in range(RANKS)]
        dist.all_gather(of_all, sums)
        self.equal = all(torch.equal(of_one, sums) for of_one in of_all)


def step_ways() -> dict[str, Way]:
    return {DENSE: Way(), "by hand: bit-and + restore": by_hand("bits"), OURS: ours()}


def two_processes(rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of two tables, of a step at density 1 % and of a run in two phases.

    Both processes train in every way, in the same turns; rank 0's clock counts. Bytes on the wire are what one rank
    sends: with two ranks, an all-reduce sends as many bytes as it reduces.

    Raises:
        RuntimeError: If a rank fails.
    """
    rows: dict[str, list[dict[str, Any]]] = in_pair(_measure, rounds, steps)
    return rows


def _measure(rounds: int, steps: int) -> dict[str, list[dict[str, Any]]]:
    base = load()
    arguments: dict[str, Any] = {"threads": 1, "devices": RANKS, "strategy": "ddp"}
    ways, looks = _watched(step_ways())
    clocks = interleave(ways, base, rounds, steps, **arguments)
    dense = sum(size(p) for p in base.parameters())
    density = random_masks(base, DENSITY).density()
    step_rows = [
        {
            "way": name,
            "ms": statistics.median(clock.turns_ms()),
            "over dense": ratio(clock.turns_ms(), clocks[DENSE].turns_ms()),
            "sent MB": clock.sent_per_step() / 1e6,
            "sent over density * dense": clock.sent_per_step() / dense / (density if name == OURS else 1),
            "replicas equal": looks[name].equal,
        }
        for name, clock in clocks.items()
    ]
    ways, looks = _watched(phase_ways((rounds + WARM) * steps))
    clocks = interleave(ways, base, rounds, steps, phases=2, **arguments)
    return {"ddp": step_rows, "ddp phases": [_phase_row(name, clocks[name], looks[name]) for name in clocks]}


def _watched(ways: dict[str, Way]) -> tuple[dict[str, Way], dict[str, ReplicasEqual]]:
    """The same ways, each with a look at the replicas when it ends."""
    looks = {name: ReplicasEqual() for name in ways}

    def watch(name: str, way: Way) -> Way:
        return Way(lambda m: [*way.callbacks(m), looks[name]], way.prepare, way.optimizer, way.only_trainable)

    return {name: watch(name, way) for name, way in ways.items()}, looks


def _phase_row(name: str, clock: Clock, look: ReplicasEqual) -> dict[str, Any]:
    return {
        "way": name,
        "last layer + head ms": statistics.median(clock.turns_ms(0, 2)),
        "sent MB": clock.sent_per_step(0, 2) / 1e6,
        "everything ms": statistics.median(clock.turns_ms(1, 2)),
        "then sent MB": clock.sent_per_step(1, 2) / 1e6,
        "replicas equal": look.equal,
    }
