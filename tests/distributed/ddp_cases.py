"""Script: many small trainings in one pair of processes that Lightning's own launcher starts.

``python ddp_cases.py FOLDER`` trains each plan on one process first, then everything on two; each rank writes
``rank<r>.json``: case -> what it saw.
"""

import hashlib
import json
import logging
import os
import random
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import DDPStrategy
from little import Data, Little, save, trainer, weights
from torch import Tensor, nn

from lightning_mask import FreezeMask, GradientMask, MaskSet, Phase, PhaseUnfreeze, PruneMask

HEAD = ["head"]
PLANS: dict[str, Callable[[], list[Any]]] = {
    "grow": lambda: [
        PhaseUnfreeze([Phase("3 steps", train=HEAD), Phase("6 steps", train=["head", "blocks.1"]), Phase()])
    ],
    "freeze again": lambda: [
        PhaseUnfreeze(
            [Phase("3 steps"), Phase("5 steps", train=HEAD), Phase("8 steps", train="stem"), Phase(train="blocks.0")]
        )
    ],
    "head for good": lambda: [FreezeMask(HEAD)],
    "entries": lambda: [
        FreezeMask(score="magnitude", density=0.3, scope=["blocks.1", "head"]),
        PhaseUnfreeze([Phase("4 steps"), Phase("8 steps", train=HEAD, lr_scale=0.5), Phase(lr_scale={"stem": 0.1})]),
    ],
    "pruned": lambda: [
        PruneMask(0.6, scope="blocks.*.lin.weight", start="1 steps", end="9 steps", every="2 steps"),
        PhaseUnfreeze([Phase("10 steps", train=["head", "blocks"]), Phase(train=HEAD)]),
    ],
    "set": lambda: [
        PruneMask(0.6, scope="blocks.*.lin.weight", regrow="random", start="0 steps", every="2 steps", end="12 steps")
    ],
    "lottery": lambda: [
        PhaseUnfreeze([Phase("5 steps"), Phase(train=HEAD, score="change", density=60, restart=True, lr_scale=0.5)])
    ],
    "lisa": lambda: [
        FreezeMask(HEAD, score="random", density=0.5, scope="layers:0:", structure="layer", refresh="3 steps")
    ],
    "gradient mask": lambda: [
        GradientMask(0.5, seed=1),
        PhaseUnfreeze([Phase("5 steps"), Phase(train=HEAD, score="magnitude", density=0.3)]),
    ],
    "thin": lambda: [FreezeMask(score="random", density=0.1, refresh="5 steps")],
    "rows": lambda: [
        PruneMask(0.5, scope="blocks.0.lin.weight", structure="row", start="2 steps", schedule="constant")
    ],
}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "ddp": lambda: "ddp",
    "bucket view": lambda: DDPStrategy(gradient_as_bucket_view=True),
    "static graph": lambda: DDPStrategy(static_graph=True),
    "unused allowed": lambda: "ddp_find_unused_parameters_true",
}
STEPS = 12


def sgd(params: Any) -> torch.optim.Optimizer:
    """Linear in the gradient, so that a rounding difference stays one."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def replica_gap(module: nn.Module) -> float:
    """Largest difference of any parameter between the two ranks; 0.0 only when all bits that count are equal."""
    gap = 0.0
    for p in module.parameters():
        both = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(both, p.detach().contiguous())
        gap = max(gap, 0.0 if torch.equal(*both) else float((both[0] - both[1]).abs().max()))
    return gap


class Watch(Callback):
    """After every step: the gap between replicas, what was reduced, what trains; a comm hook of the user's own."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.reduced: list[int] = []
        self.trained: list[int] = []
        self.moved: list[list[str]] = []
        self.buckets: list[int] = []
        self.before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.gaps.append(replica_gap(pl_module))
        trainer.strategy.model.register_comm_hook(self.buckets, count)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if not self.before:
            self.before = weights(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self.gaps.append(replica_gap(pl_module))
        self.reduced.append(sum(self.buckets))
        self.buckets.clear()
        self.trained.append(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))
        now = weights(pl_module)
        self.moved.append([n for n in now if not torch.equal(now[n], self.before[n])])
        self.before = now


def count(state: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """All-reduce the mean, and note how many numbers that were."""
    state.append(bucket.buffer().numel())
    future = dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return future.then(lambda f: f.value()[0])


def train(callbacks: list[Any], net: Little, ranks: int = 2, **arguments: Any) -> Any:
    arguments = {"max_steps": STEPS, **arguments}
    run = trainer(*callbacks, ranks=ranks, **arguments)
    run.fit(net, datamodule=Data())
    return run


def plan(name: str, strategy: str, accumulate: int, folder: Path) -> dict[str, Any]:
    for first in (True, False):  # the user's callback may stand before ours or after
        watch, callbacks, net = Watch(), PLANS[name](), Little(make=sgd)
        order = [watch, *callbacks] if first else [*callbacks, watch]
        train(order, net, strategy=STRATEGIES[strategy](), accumulate_grad_batches=accumulate)
    alone = torch.load(folder / f"{name}.{accumulate}.pt", weights_only=True)
    far = max(float((p - alone[n]).abs().max()) for n, p in weights(net).items())
    return {
        "gap": max(watch.gaps),
        "reduced": watch.reduced,
        "trained": watch.trained,
        "moved": watch.moved,
        "from one process": far,
        "zeros": [int((block.lin.weight == 0).sum()) for block in net.blocks],
        "history": next((c.history for c in callbacks if isinstance(c, PhaseUnfreeze)), []),
    }


def wired(strategy: str) -> dict[str, Any]:
    """Each plan with engine and wire as they are chosen, against whole gradients held dense."""
    found: dict[str, Any] = {}
    for name in ("entries", "pruned", "rows", "thin", "set"):
        nets: list[Little] = []
        for engine in ("auto", "dense"):
            callbacks, net = PLANS[name](), Little(make=sgd)
            for callback in callbacks:
                callback.engine = engine
            laid = Wired()
            quiet = [laid] if engine == "auto" else [Watch()]  # a hook of the user's keeps gradients whole
            train([*callbacks, *quiet], net, strategy=STRATEGIES[strategy]())
            nets.append(net)
            if engine == "auto":
                seen = laid
        ours, dense = (weights(net) for net in nets)
        found[name] = {
            "equal": all(torch.equal(ours[n], dense[n]) for n in ours),
            "gap": max(seen.gaps),
            "bytes": seen.bytes,
            "active": seen.active,
        }
    return found


class Wired(Callback):
    """What went over the wire in each step, and what was active when it began."""

    def __init__(self) -> None:
        self.gaps: list[float] = []
        self.bytes: list[int] = []
        self.active: list[int] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.gaps.append(replica_gap(pl_module))
        session = next(c._session for c in trainer.callbacks if getattr(c, "_session", None) is not None)
        wire = session._reduction.wire
        self.bytes.append(-1 if wire is None else wire.bytes)
        if wire is not None:
            wire.bytes = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        engine = next(c._session for c in trainer.callbacks if getattr(c, "_session", None) is not None).engine
        by_name = {row.name: row for row in engine.summary()}
        partly = {n: r.active for n, r in by_name.items() if 0 < r.density <= 0.5}
        whole = {n: p.numel() for n, p in pl_module.named_parameters() if by_name[n].density > 0.5}
        self.active.append(sum(partly.values()) + sum(whole.values()))


def peer() -> dict[str, Any]:
    """Lightning's BackboneFinetuning: what starts to train late is never reduced."""

    class Backboned(Little):
        def __init__(self) -> None:
            super().__init__(make=sgd)
            self.backbone = nn.Sequential(self.stem, *self.blocks)
            del self.stem, self.blocks

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    watch = Watch()
    tuned = BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.1)
    train([watch, tuned], Backboned(), max_steps=-1, max_epochs=3)
    return {"gap": max(watch.gaps), "gap at the switch": max(watch.gaps[:4])}


def data_criteria() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for score in ("fisher", "gradient"):
        seen: list[float] = []

        class Sees(Little):
            def training_step(self, batch: Any, batch_idx: int, seen: list[float] = seen) -> Tensor:
                seen.append(float(batch["x"].sum()))
                return super().training_step(batch, batch_idx)

        freeze = FreezeMask(score=score, density=0.3, batches=2, refresh="5 steps")
        prune = PruneMask(0.2, score=score, scope="blocks.0.lin.weight", batches=2, end="8 steps", every="2 steps")
        phases = PhaseUnfreeze([Phase("3 steps"), Phase(score=score, density=40, batches=1, train="head")])
        watch, net = Watch(), Sees("batch", dropout=0.1)
        train([freeze, watch], net)
        first = freeze.masks.hash()
        train([phases, watch], Sees("batch", dropout=0.1))
        train([prune, watch], Sees("batch"))
        found[score] = {
            "hashes": [first, phases.masks.hash(), prune.masks.hash()],
            "count": freeze.masks.count(),
            "of": freeze.masks.numel(),
            "seen": seen[:6],
            "gap": max(watch.gaps),
            "zeros": int((~prune.masks["blocks.0.lin.weight"]).sum()),
        }
    return found


def local_randomness() -> dict[str, Any]:
    """A criterion that draws from the global generator: the ranks would mask differently."""

    def careless(params: Any, context: Any) -> Any:
        return {n: torch.rand_like(p) for n, p in params.items()}

    found: dict[str, Any] = {}
    callbacks: dict[str, Callable[[], Any]] = {
        "freeze": lambda: FreezeMask(score=careless, density=0.5, scope="stem.weight"),
        "phase": lambda: PhaseUnfreeze(
            [Phase("2 steps", train="head"), Phase(score=careless, density=0.5, scope="stem.weight")]
        ),
        "prune": lambda: PruneMask(0.5, score=careless, scope="stem.weight", start="3 steps", schedule="constant"),
        "given": lambda: FreezeMask(mask=MaskSet({"stem.weight": torch.rand(12, 8) < 0.5})),
    }
    for name, make in callbacks.items():
        different_seeds()
        net = Little()
        try:
            train([make()], net)
            found[name] = "no error"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def different_seeds() -> None:
    """Global generators of ranks that have nothing to do with each other."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    torch.manual_seed(100 + rank)
    np.random.seed(200 + rank)
    random.seed(300 + rank)


def random_masks() -> dict[str, Any]:
    different_seeds()
    freeze = FreezeMask(score="random", density=0.3, seed=5, refresh="3 steps")
    prune = PruneMask(0.5, score="random", scope="blocks.0.lin.weight", end="6 steps", every="1 steps")
    grown = PruneMask(0.5, scope="blocks.1.lin.weight", regrow="random", end="8 steps", every="2 steps", seed=3)
    watch = Watch()
    train([freeze, watch], Little())
    net = Little()
    other = Watch()
    train([prune, grown, other], net)
    drawn = int.from_bytes(hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()[:4], "big")
    return {
        "hashes": [freeze.masks.hash(), prune.masks.hash(), grown.masks.hash()],
        "zeros": [int((block.lin.weight == 0).sum()) for block in net.blocks],
        "gap": max(watch.gaps + other.gaps),
        "generator": drawn,
    }


def local_metric() -> dict[str, Any]:
    """Each rank alone would switch elsewhere: rank 0 after two epochs, rank 1 never; the mean after three."""

    def score(epoch: int, rank: int) -> float:
        return [[3.0, 4.0, 8.0, 9.0, 9.0, 9.0], [9.0, 7.0, 4.0, 3.0, 2.0, 1.0]][rank][epoch]

    until = {"monitor": "val/score", "patience": 1}
    phases = PhaseUnfreeze([Phase(until, train="head", restore_best=True), Phase()])
    watch = Watch()
    train([phases, watch], Little(score=score), max_steps=-1, max_epochs=5)
    return {"history": phases.history, "gap": max(watch.gaps)}


def held() -> dict[str, Any]:
    """Held and pruned entries of this rank, after batch norm, dropout, accumulation, clipping and three phases."""
    different_seeds()
    net = Little("batch", dropout=0.2)
    before = weights(net)
    statistics = {n: b.clone() for n, b in net.named_buffers() if n.startswith("blocks.0")}
    freeze = FreezeMask(["head", "blocks.1"], score="fisher", density=0.3, scope="stem", batches=2)
    prune = PruneMask(0.5, scope="blocks.1.lin.weight", end="5 steps", every="1 steps")
    phases = PhaseUnfreeze([Phase("6 steps"), Phase("9 steps", train="head"), Phase(lr_scale=0.1)])
    watch = Watch()
    train(
        [prune, phases, freeze, watch],
        net,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
    )
    after, masks, alive = weights(net), freeze.masks, prune.masks
    moved = 0
    for name, mask in masks.items():
        still = ~mask & alive.get(name, torch.ones_like(mask))
        moved += int((after[name] != before[name])[still].sum())
    zero = after["blocks.1.lin.weight"][~alive["blocks.1.lin.weight"]]
    return {
        "moved": moved,
        "held": int(sum((~m).sum() for m in masks.values())),
        "not zero": int(zero.view(torch.int32).count_nonzero()),
        "pruned": zero.numel(),
        "statistics moved": [
            n for n, b in net.named_buffers() if n in statistics and not torch.equal(b, statistics[n])
        ],
        "gap": max(watch.gaps),
    }


def main(folder: Path) -> None:
    if "LOCAL_RANK" not in os.environ:
        for name in PLANS:
            for accumulate in (1, 2):
                net = Little(make=sgd)
                train(PLANS[name](), net, ranks=1, accumulate_grad_batches=accumulate)
                save(folder / f"{name}.{accumulate}.pt", weights(net))
    cases: dict[str, Callable[[], Any]] = {}
    for name in PLANS:
        for strategy in STRATEGIES if name in ("grow", "freeze again", "entries") else ["ddp"]:
            cases[f"{name}, {strategy}"] = lambda n=name, s=strategy: plan(n, s, 1, folder)
        cases[f"{name}, accumulating"] = lambda n=name: plan(n, "ddp", 2, folder)
    cases |= {f"wired, {strategy}": lambda s=strategy: wired(s) for strategy in STRATEGIES}
    cases |= {
        "peer": peer,
        "data criteria": data_criteria,
        "local randomness": local_randomness,
        "random masks": random_masks,
        "local metric": local_metric,
        "held": held,
    }
    results: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            results[name] = case()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    rank = os.environ.get("LOCAL_RANK", "0")
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
