"""Script: little trainings of a model that ``fully_shard`` deals out over two processes.

``python fsdp_cases.py FOLDER`` forks two ranks that do everything; each writes ``rank<r>.json``: case -> what it saw. What
one process trains alone is trained first.
"""

import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import run_ranks
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from little import Data, Little, differences, trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_mask import FreezeMask, GradientMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks.report import RunReport
from lightning_mask.core import MaskEngine, Selection
from lightning_mask.core.criteria import Context
from lightning_mask.core.ranking import top_k
from lightning_mask.core.selection import select
from lightning_mask.tasks.task import Task

STEPS = 12
PLANS: dict[str, Callable[[], list[Any]]] = {
    "phases": lambda: [
        PhaseUnfreeze(
            [Phase("3 steps", train="head"), Phase("6 steps", train=["head", "blocks.1"]), Phase(lr_scale=0.5)]
        )
    ],
    "magnitude": lambda: [FreezeMask("head", score="magnitude", density=0.3)],
    "random, drawn anew": lambda: [FreezeMask("head", score="random", density=0.1, refresh="4 steps")],
    "fisher": lambda: [FreezeMask("head", score="fisher", density=0.3, batches=2)],
    "one entry": lambda: [FreezeMask(score="magnitude", density=1)],
    "uniform rows": lambda: [FreezeMask(score="magnitude", density=0.3, structure="row", allocation="uniform")],
    "rows": lambda: [FreezeMask(score="magnitude", density=0.3, structure="row")],
    "columns": lambda: [FreezeMask(score="magnitude", density=0.3, structure="column", scope="blocks.*.lin.weight")],
    "tensors": lambda: [FreezeMask(score="magnitude", density=0.3, structure="tensor")],
    "ramp": lambda: [
        PruneMask(0.6, scope="blocks.*.lin.weight", start="1 steps", end="9 steps", every="2 steps"),
        PhaseUnfreeze([Phase("10 steps", train=["head", "blocks"]), Phase(train="head")]),
    ],
    "2:4": lambda: [PruneMask("2:4", scope="blocks.*.lin.weight", schedule="constant", start="2 steps")],
    "set": lambda: [PruneMask(0.6, scope="blocks.*.lin.weight", regrow="random", every="2 steps", end="12 steps")],
    "rig": lambda: [PruneMask(0.6, scope="blocks.*.lin.weight", regrow="gradient", every="2 steps", end="12 steps")],
    "rewind": lambda: [
        PruneMask(0.7, scope="blocks.1.lin.weight", rewind="2 steps", start="2 steps", end="8 steps", every="3 steps")
    ],
    "behind": lambda: [
        PruneMask(0.5, scope="blocks.0.lin.weight", regrow="ste", start="1 steps", end="9 steps", every="2 steps"),
        PruneMask(0.6, score="movement", scope="blocks.1.lin.weight", start="2 steps", end="11 steps", every="3 steps"),
    ],
    "lottery": lambda: [
        PhaseUnfreeze([Phase("5 steps"), Phase(train="head", score="change", density=60, restart=True, lr_scale=0.5)])
    ],
    "gradient mask": lambda: [FreezeMask("head", score="magnitude", density=0.3), GradientMask(0.5)],
    "all together": lambda: [
        FreezeMask(["head", "blocks.1"], score="gradient", density=0.3, scope=["stem", "blocks.0"], batches=2),
        PruneMask(0.5, scope="blocks.1.lin.weight", start="2 steps", end="8 steps", every="2 steps"),
        PhaseUnfreeze(
            [Phase("5 steps"), Phase("9 steps", train="blocks.1", score="magnitude", density=60), Phase(train="blocks")]
        ),
    ],
}
SAME_AS_DDP = [
    "phases",
    "lottery",
    "magnitude",
    "random, drawn anew",
    "one entry",
    "uniform rows",
    "rows",
    "columns",
    "tensors",
    "2:4",
]


class Dealt(Little):
    """The little network with rows that two ranks cannot share equally, and a vector of one entry.

    Args:
        shards: Whether it is dealt out; the same network otherwise.
    """

    def __init__(self, shards: bool = True, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.shards = shards
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.head = nn.Linear(12, 3)
            self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale

    def configure_model(self) -> None:
        if self.shards and not isinstance(self.scale, DTensor):
            mesh = self.device_mesh["data_parallel"]
            for layer in (*self.blocks, self.head):
                fully_shard(layer, mesh=mesh)
            fully_shard(self, mesh=mesh)


class Wide(Dealt):
    """With a vector of 24 entries: a rank's 12 fill one vector of the optimizer's kernels, also where one of them trains."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.stem = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12))

    masks = MaskSet(
        {
            "stem.0.bias": torch.arange(24) == 3,
            "stem.0.weight": torch.arange(24 * 8).view(24, 8) % 7 == 0,
            "head.weight": torch.ones(3, 12, dtype=torch.bool),
        }
    )


class Numbers(torch.optim.Optimizer):
    """One that counts its steps in an int, and is held dense."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                kept = self.state[parameter]
                kept["step"] = kept.get("step", 0) + 1
                kept["mean"] = 0.9 * kept.get("mean", torch.zeros_like(parameter)) + parameter.grad
                parameter.sub_(kept["mean"], alpha=0.1 / kept["step"] ** 0.5)
        return loss


class AsTask(Dealt):
    """Dealt out as the application's tasks are; its validation runs a forward, after which the root stays gathered."""

    configure_model = Task.configure_model

    @property
    def net(self) -> nn.Module:
        return self

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self(batch["x"]).sum())


class ByHand(Dealt):
    """Two optimizers, stepped by the module itself."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        parameters = list(self.parameters())
        adam = torch.optim.AdamW(parameters[::2], lr=0.02, weight_decay=0.1)
        return [adam, torch.optim.SGD(parameters[1::2], lr=0.1, momentum=0.9)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(nn.functional.cross_entropy(self(batch["x"]), batch["y"]))
        for optimizer in optimizers:
            optimizer.step()


class WithoutScale(Dealt):
    """Its optimizer does not hold the vector of one entry, of which the second rank has none."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p is not self.scale], lr=0.1)


class Tested(Dealt):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("out", self(batch["x"]).sum())


class TestData(Data):
    __test__ = False

    def test_dataloader(self) -> Any:
        return self.val_dataloader()


def sgd(params: Any) -> torch.optim.Optimizer:
    """Linear in the gradient, so that a rounding difference stays one."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01)


def two_groups(params: Any) -> torch.optim.Optimizer:
    """Matrices decay and vectors do not, so the optimizer's order is not the model's."""
    params = list(params)
    groups = [
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        {"params": [p for p in params if p.dim() > 1]},
    ]
    return torch.optim.AdamW(groups, lr=0.02, weight_decay=0.1)


def train(
    callbacks: list[Any], net: Dealt, ckpt: Any = None, folder: bool = False, ranks: int = 2, **arguments: Any
) -> Any:
    strategy: Any = "ddp" if ranks > 1 else "auto"
    if net.shards:
        strategy = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=folder)
    run = trainer(*callbacks, ranks=ranks, strategy=strategy, **{"max_steps": STEPS, **arguments})
    run.fit(net, datamodule=Data(), ckpt_path=ckpt, weights_only=True)
    return run


def whole(module: nn.Module) -> dict[str, Tensor]:
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in module.named_parameters()
    }


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


class Alive(Callback):
    """By tensor, whether its dense gradient is still there when backward has just made it and we have seen it."""

    def __init__(self) -> None:
        self.seen: dict[str, list[bool]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not self.seen:  # hooks run in the order in which they came: the engine's are there since training began
            for name, parameter in ((n, p) for n, p in pl_module.named_parameters() if p.requires_grad):
                note = self.seen.setdefault(name, [])
                parameter.register_post_accumulate_grad_hook(lambda p, note=note: note.append(p.grad is not None))


def freed() -> dict[str, Any]:
    """Gradients of tensors of which some entries train are let go of while backward goes on; those of whole ones stay."""
    alive, freeze, net = (
        Alive(),
        FreezeMask("head", score="magnitude", density=0.1, scope="blocks.*.lin.weight"),
        Dealt(),
    )
    train([freeze, alive], net)
    partly = [n for n in alive.seen if n.endswith("lin.weight")]
    return {
        "partly": [alive.seen[name] for name in partly],
        "whole": [alive.seen[f"head.{name}"] for name in ("weight", "bias")],
    }


class Watch(Callback):
    """What each rank holds after each step."""

    def __init__(self) -> None:
        self.states: list[int] = []
        self.hashes: list[str] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        callback = next(c for c in trainer.callbacks if getattr(c, "_session", None) is not None)
        engine = callback._session.engine
        self.hashes.append(engine.masks.hash())
        state = trainer.optimizers[0].state.values()
        self.states.append(sum(local(v).numel() for s in state for v in s.values() if torch.is_tensor(v) and v.dim()))


def local(tensor: Tensor) -> Tensor:
    with torch.no_grad():
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def plan(name: str, **arguments: Any) -> dict[str, Any]:
    """The same plan held compact and dense, and by DDP; what was held, and how the masks lie."""
    seen: dict[str, Any] = {}
    for engine in ("auto", "dense"):
        callbacks, net, watch = PLANS[name](), Dealt(make=two_groups), Watch()
        for callback in callbacks:
            callback.engine = engine
        report = RunReport()
        train([*callbacks, watch, report], net, **arguments)
        seen[engine] = whole(net), watch, callbacks, report.results()
    ours, watch, callbacks, facts = seen["auto"]
    replica, by_ddp = Dealt(shards=False, make=sgd), Dealt(make=sgd)
    of_ddp = PLANS[name]()
    train(of_ddp, replica, **arguments)
    mine = PLANS[name]()
    train(mine, by_ddp, **arguments)
    masks = callbacks[0].masks
    parts = [(m, net.get_parameter(n)) for n, m in masks.items()]
    return {
        "equal": [n for n in ours if not torch.equal(ours[n], seen["dense"][0][n])],
        "same masks": watch.hashes == seen["dense"][1].hashes,
        "changed": facts["held_changed"],
        "checked": facts["held_checked"],
        "as ddp": far(whole(by_ddp), whole(replica)),
        "masks as ddp": [c.masks.hash() for c in mine] == [c.masks.hash() for c in of_ddp],
        "zeros": [int((block["lin.weight"] == 0).sum()) for block in blocks(ours)],
        "laid out": all(isinstance(m, DTensor) and local(m).shape == local(p).shape for m, p in parts),
        "states": [watch.states[-1], seen["dense"][1].states[-1]],
        "counts": [c.masks.count() for c in callbacks],
    }


def blocks(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [
        {n.removeprefix(f"blocks.{i}."): w for n, w in weights.items() if n.startswith(f"blocks.{i}.")} for i in (0, 1)
    ]


class Save(Callback):
    def __init__(self, folder: Path, steps: list[int]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def state(run: Any, net: nn.Module, callbacks: list[Any]) -> dict[str, Any]:
    """Weights, optimizer state by name, masks and history; this rank's parts as they are."""
    names = {id(p): n for n, p in net.named_parameters()}
    return {
        "model": whole(net),
        "optimizers": [
            {
                names[id(p)]: {k: local(v).clone() if torch.is_tensor(v) else v for k, v in values.items()}
                for p, values in optimizer.state.items()
            }
            for optimizer in run.optimizers
        ],
        "rates": [[group["lr"] for group in optimizer.param_groups] for optimizer in run.optimizers],
        "masks": [c.masks.hash() for c in callbacks],
        "history": [getattr(c, "history", None) for c in callbacks],
    }


def resume(name: str, folder: Path, shards: bool) -> dict[str, Any]:
    """Checkpoints of one run, resumed from at each step; into a folder, or into one file."""
    steps, found = [3, 6, 10], {}
    callbacks, net = PLANS[name](), Dealt(make=two_groups)
    run = train([*callbacks, Save(folder, steps)], net, folder=shards)
    reference = state(run, net, callbacks)
    for step in steps:
        again, other = PLANS[name](), Dealt(make=two_groups)
        with torch.no_grad():
            for p in other.parameters():
                p.fill_(7.0)
        run = train(again, other, ckpt=folder / f"{step}.ckpt", folder=shards)
        found[str(step)] = differences(reference, state(run, other, again))
    return found


def resume_others(folder: Path, shards: bool) -> dict[str, Any]:
    """The same for models that are not like the others: net, callbacks, and the step, which is one or two epochs."""
    compact = {"score": "magnitude", "density": 0.3, "engine": "compact"}
    models: dict[str, tuple[Callable[[], Dealt], Callable[[], list[Any]], int]] = {
        "full vectors": (lambda: Wide(make=two_groups), lambda: [FreezeMask(mask=Wide.masks)], 4),
        "two optimizers": (ByHand, lambda: [FreezeMask("head", **compact)], 8),
        "numbers": (lambda: Dealt(make=Numbers), PLANS["magnitude"], 4),
        "a schedule": (lambda: Dealt(scheduled=True), PLANS["phases"], 4),
    }
    found: dict[str, Any] = {}
    for name, (make, callbacks, step) in models.items():
        net, mine = make(), callbacks()
        run = train([*mine, Save(folder / name, [step])], net, folder=shards)
        again, other = callbacks(), make()
        resumed = train(again, other, ckpt=folder / name / f"{step}.ckpt", folder=shards)
        found[name] = differences(state(run, net, mine), state(resumed, other, again))
        found[f"{name} trained"] = far(whole(net), whole(make()))
    return found


def after(folder: Path, shards: bool) -> dict[str, Any]:
    """A checkpoint that is written when training is over, or has failed: what is loaded from it, before a further step."""
    found: dict[str, Any] = {}
    for way in ("ended", "failed"):
        net, callbacks, path = Dealt(make=two_groups), PLANS["magnitude"](), folder / f"{way}.ckpt"
        fail = Fail(5 if way == "failed" else STEPS, path)
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=shards)
        run = trainer(*callbacks, fail, ranks=2, strategy=strategy, max_steps=6)
        with suppress(ZeroDivisionError):
            run.fit(net, datamodule=Data())
            run.save_checkpoint(path)
        other, again = Dealt(make=two_groups), PLANS["magnitude"]()
        resumed = train(again, other, ckpt=path, folder=shards, max_steps=run.global_step)
        found[way] = differences(state(run, net, callbacks), state(resumed, other, again))
        found[f"{way} at"] = run.global_step
    return found


class Fail(Callback):
    """Ends training with an error, and writes a checkpoint as ModelCheckpoint(save_on_exception=True) does."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def tested(folder: Path, shards: bool) -> dict[str, Any]:
    """The weights of a run's checkpoint, seen in the same Trainer, and in others with and without masks."""
    path, seen = folder / "6.ckpt", []
    run = train([*PLANS["magnitude"](), Save(folder, [6])], net := Tested(make=two_groups), folder=shards, max_steps=6)
    for callbacks in (None, PLANS["magnitude"](), []):
        if callbacks is not None:
            strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=shards)
            run, net = trainer(*callbacks, ranks=2, strategy=strategy), Tested(make=two_groups)
        seen += run.test(net, datamodule=TestData(), ckpt_path=path, verbose=False, weights_only=True)
    return {"same": all(each == seen[0] for each in seen), "runs": len(seen), "out": seen[0]["out"]}


class Dump(Callback):
    """How many numbers a rank has in its hands when a checkpoint is written, but for the model's."""

    def __init__(self) -> None:
        self.numbers = 0

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == STEPS - 1:
            found = trainer._checkpoint_connector.dump_checkpoint(False)
            self.numbers = numbers({"o": found["optimizer_states"], "c": found["callbacks"]})


def numbers(value: Any) -> int:
    """Floating-point numbers in all tensors of a nested structure."""
    if isinstance(value, dict | list):
        return sum(numbers(each) for each in (value.values() if isinstance(value, dict) else value))
    return value.numel() if torch.is_tensor(value) and value.is_floating_point() and value.dim() else 0


def written() -> dict[str, int]:
    """Weights to go back to, at a plateau, after pruning and to compare with, in the hands of each rank."""
    dump = Dump()
    until = {"monitor": "train/loss", "patience": 5}
    phases = PhaseUnfreeze([Phase(until, restore_best=True), Phase(score="change", density=0.3, refresh="2 steps")])
    prune = PruneMask(0.5, rewind="1 steps", start="2 steps", end="4 steps", every="2 steps")
    train([prune, phases, dump], Dealt(make=two_groups))
    return {"numbers": dump.numbers}


def sharded_masks(folder: Path) -> dict[str, Any]:
    """Masks of one run compared with the same read from a file, and given to the phases of another that writes them."""
    first = FreezeMask("head", score="magnitude", density=0.3)
    train([first], Dealt(), max_steps=2)
    read = MaskSet.from_state(first.masks.to_state())
    phases = PhaseUnfreeze([Phase("2 steps", mask=first.masks), Phase(train="head")])
    train([phases], Dealt(), max_steps=4, logger=CSVLogger(folder))
    saved = next(iter(Path(folder).rglob("phases.0.safetensors")))
    return {
        "equal": [first.masks == read, read == first.masks, first.masks == ~read, ~read == first.masks],
        "saved": MaskSet.load(saved).hash() == first.masks.hash(),
    }


def owned_by_nobody() -> dict[str, str]:
    """An error about a tensor of which this rank has no row is raised on all ranks."""
    try:
        train([FreezeMask(["scale", "head"])], WithoutScale(), max_steps=1)
    except ValueError as error:
        return {"error": str(error)} if dist.is_initialized() else {}
    return {}


def validated() -> dict[str, Any]:
    """Training after a validation of the same model, with a sanity check and a validation each epoch; and without."""
    nets = [AsTask(make=two_groups), AsTask(make=two_groups)]
    for net, checks in zip(nets, (2, 0), strict=True):
        strategy, callbacks = ModelParallelStrategy(2, 1), PLANS["magnitude"]()
        arguments = {"limit_val_batches": checks, "num_sanity_val_steps": checks}
        run = trainer(*callbacks, ranks=2, strategy=strategy, max_steps=STEPS, **arguments)
        if checks:
            run.validate(net, datamodule=Data(), verbose=False)
        run.fit(net, datamodule=Data())
    return {"equal": differences(whole(nets[0]), whole(nets[1])), "trained": far(whole(nets[0]), whole(AsTask()))}


def across(name: str, folder: Path) -> dict[str, Any]:
    """From DDP or one process to shards and back; the continued runs differ by rounding alone, the masks not at all."""
    found: dict[str, Any] = {}
    replica = Dealt(shards=False, make=two_groups)
    of_ddp = PLANS[name]()
    train([*of_ddp, Save(folder, [5])], replica)
    dealt, again = Dealt(make=two_groups), PLANS[name]()
    train(again, dealt, ckpt=folder / "5.ckpt")
    found["ddp to shards"] = far(whole(dealt), whole(replica))
    found["masks"] = [c.masks.hash() for c in again] == [c.masks.hash() for c in of_ddp]
    one_file = folder / "file"
    dealt, mine = Dealt(make=two_groups), PLANS[name]()
    train([*mine, Save(one_file, [5])], dealt)
    replica, again = Dealt(shards=False, make=two_groups), PLANS[name]()
    train(again, replica, ckpt=one_file / "5.ckpt")
    found["shards to ddp"] = far(whole(dealt), whole(replica))
    dense, again = Dealt(make=two_groups), PLANS[name]()
    for callback in again:
        callback.engine = "dense"
    train(again, dense, ckpt=one_file / "5.ckpt")
    found["compact to dense"] = far(whole(dense), whole(dealt))
    keys = torch.load(one_file / "5.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    found["numbers in the file"] = sum(
        v.numel() for s in keys.values() for v in s.values() if torch.is_tensor(v) and v.dim()
    )
    return found


def alone(folder: Path) -> None:
    """One process that holds the model whole, its checkpoint, and what it ends with."""
    quiet()
    net, callbacks = Dealt(shards=False, make=two_groups), PLANS["phases"]()
    train([*callbacks, Save(folder, [6])], net, ranks=1)
    torch.save({"weights": whole(net), "masks": [c.masks.hash() for c in callbacks]}, folder / "end.pt")


def other_number(ranks: int, starts: dict[str, tuple[Path, bool]], folder: Path) -> dict[str, Any]:
    """Runs that go on on another number of ranks than wrote their checkpoints, dealt out or not, against one process alone."""
    end, found = torch.load(folder / "end.pt"), {}
    for name, (start, into_folder) in starts.items():
        for shards in (True, False):
            if into_folder and not shards:
                continue
            net, callbacks = Dealt(shards=shards, make=two_groups), PLANS["phases"]()
            with torch.no_grad():
                for p in net.parameters():
                    p.fill_(7.0)
            train(callbacks, net, ckpt=start, folder=into_folder, ranks=ranks)
            same = [c.masks.hash() for c in callbacks] == end["masks"]
            found[f"{name}, {'shards' if shards else 'whole'}"] = far(whole(net), end["weights"]) if same else "masks"
    return found


def back_to_one(folder: Path) -> None:
    """Checkpoints of two ranks' shards on one."""
    quiet()
    starts = {into: (folder / f"0{into == 'folder'}" / "6.ckpt", into == "folder") for into in ("file", "folder")}
    (folder / "one.json").write_text(json.dumps(other_number(1, starts, folder / "alone")))


def clipped() -> dict[str, Any]:
    """Clipping by the norm over all ranks' active entries, which is that of DDP."""
    found = {}
    for algorithm in ("norm", "value"):
        nets = [Dealt(make=sgd), Dealt(shards=False, make=sgd)]
        for net in nets:
            train(PLANS["magnitude"](), net, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)
        found[algorithm] = far(whole(nets[0]), whole(nets[1]))
    return found


def saved_file(folder: Path) -> dict[str, Any]:
    """The run's mask file, written by ranks that each hold a part."""
    freeze, report = FreezeMask("head", score="magnitude", density=0.3), RunReport(str(folder))
    train([freeze, report], Dealt())
    loaded = MaskSet.load(folder / "masks.safetensors")
    again = FreezeMask(mask=str(folder / "masks.safetensors"))
    train([again], Dealt())
    return {"same": [loaded.hash() == freeze.masks.hash(), again.masks.hash() == freeze.masks.hash()]}


def plateau() -> dict[str, Any]:
    """A phase that a metric ends goes back to its best weights."""
    scores = [3.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0]
    found = []
    for shards in (True, False):
        net = Dealt(shards, make=sgd, score=lambda epoch, rank: scores[epoch])
        until = {"monitor": "val/score", "patience": 2}
        phases = PhaseUnfreeze([Phase(until, train=["head", "stem"], restore_best=True), Phase(train="blocks")])
        train([phases], net, max_steps=24)
        found.append((whole(net), phases.history))
    return {
        "far": far(found[0][0], found[1][0]),
        "same history": found[0][1] == found[1][1],
        "phases": len(found[0][1]),
    }


def refused() -> dict[str, str]:
    """A tensor-parallel layer, and a mask of another shape."""
    mesh = init_device_mesh("cpu", (2,))
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    parallelize_module(net, mesh, {"0": ColwiseParallel()})
    net[0].weight = nn.Parameter(net[0].weight.redistribute(placements=[Shard(1)]))
    try:
        MaskEngine(net, torch.optim.SGD(net.parameters(), lr=0.1), {})
    except ValueError as error:
        return {"columns": str(error)}
    return {}


def ranked() -> dict[str, Any]:
    """Scores that all ranks have beside scores that are dealt out, full of ties: ranked as the same scores whole."""
    drawn = torch.Generator().manual_seed(0)
    first, second, third = (torch.randint(0, 3, shape, generator=drawn).float() for shape in ((6,), (5, 3), (4,)))
    dealt = distribute_tensor(second, init_device_mesh("cpu", (2,)), [Shard(0)])
    wrong = []
    for k in range(26):
        ours, expected = top_k([first, dealt, third], k), top_k([first, second, third], k)
        full = [m.full_tensor() if isinstance(m, DTensor) else m for m in ours]
        wrong += [] if all(torch.equal(a, b) for a, b in zip(full, expected, strict=True)) else [k]
    return {"wrong": wrong}


def turned() -> dict[str, Any]:
    """Units of weights that lie as (in, out, ...), of which each rank has rows: chosen as those of the same weights whole."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ConvTranspose1d(5, 6, 2), nn.ConvTranspose1d(6, 4, 3, groups=2), nn.Linear(4, 3))

    dealt = net()
    for layer in dealt:
        fully_shard(layer)
    fully_shard(dealt)
    wrong, densities = [], []
    for structure, allocation in (("row", "global"), ("column", "uniform"), ("block:2x1", "global"), ("entry", "row")):
        for score in ("magnitude", "random", "spectral"):
            scope = ["0.weight", "1.weight", *([] if structure.startswith("block") else ["2"])]
            selection = Selection(None, score, 0.4, scope=scope, structure=structure, allocation=allocation)
            expected, ours = (select(selection, each, Context(each)) for each in (net(), dealt))
            wrong += [] if expected.hash() == ours.hash() else [f"{structure} {allocation} {score}"]
            densities.append(expected.density())
    return {"wrong": wrong, "densities": densities}


def criterion_leaves_gradients() -> dict[str, Any]:
    """A criterion between backward and step: the step's own gradients stand where they stood."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 3))
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    net(x).sum().backward()
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    before = {name: local(p.grad).clone() for name, p in parameters.items()}
    context = Context(net, loss=lambda batch: net(batch).square().sum(), batches=lambda: [x, 2 * x])
    found = list(context.gradients(parameters))
    return {
        "batches": len(found),
        "kept": [n for n, p in parameters.items() if not torch.equal(local(p.grad), before[n])],
        "others": [n for n in before if before[n].numel() and torch.equal(local(found[0][n]), before[n])],
    }


def plain_loop() -> dict[str, Any]:
    """MaskEngine without Lightning: compact against dense, to the bit, with the optimizers that torch itself can shard."""
    odd: list[str] = []
    classes = ["SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop"]
    for name in classes:
        for kind in ("foreach", "fused") if name in ("Adam", "AdamW") else ("foreach",):
            ends = [loop(getattr(torch.optim, name), kind, engine) for engine in ("compact", "dense")]
            odd += [f"{name} {kind} {n}" for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])]
    return {"odd": odd, "runs": len(classes)}


def loop(cls: Any, kind: str, engine: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 13), nn.ReLU(), nn.Linear(13, 3))
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    masks = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(3)) < 0.3 for n, p in net.named_parameters()
    }
    optimizer = cls(net.parameters(), lr=0.05, weight_decay=0.1, **{kind: True})
    holds = MaskEngine(net, optimizer, masks, engine=engine, early=engine == "compact")
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for step in range(5):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        holds.after_backward()
        nn.utils.clip_grad_value_([p for group in optimizer.param_groups for p in group["params"]], 0.5)
        optimizer.step()
        if step == 2:
            holds.update({**masks, "0.weight": ~masks["0.weight"]})
    holds.release()
    return {
        **whole(net),
        **{
            f"{i} {k}": local(v)
            for i, p in enumerate(net.parameters())
            for k, v in optimizer.state[p].items()
            if torch.is_tensor(v)
        },
    }


def quiet() -> None:
    """No logs, and one thread."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main(folder: Path) -> None:
    quiet()
    cases: dict[str, Callable[[], Any]] = {name: lambda n=name: plan(n) for name in PLANS}
    cases["accumulating"] = lambda: plan("magnitude", accumulate_grad_batches=2)
    resumed = ("phases", "all together", "random, drawn anew", "rewind", "lottery", "gradient mask", "behind")
    for i, name in enumerate(resumed):
        cases |= {
            f"{name}, {into}": lambda n=name, s=into == "folder", i=i: resume(n, folder / f"{i}{s}", s)
            for into in ("file", "folder")
        }
    cases |= {
        f"across, {name}": lambda n=name, i=i: across(n, folder / f"across{i}")
        for i, name in enumerate(("magnitude", "phases"))
    }
    cases |= {
        "from one": lambda: other_number(2, {"file": (folder / "alone/6.ckpt", False)}, folder / "alone"),
        "clipped": clipped,
        "freed": freed,
        "saved file": lambda: saved_file(folder / "report"),
        "plateau": plateau,
        "refused": refused,
        "ranked": ranked,
        "turned": turned,
        "criterion leaves gradients": criterion_leaves_gradients,
        "written": written,
        "validated": validated,
        "sharded masks": lambda: sharded_masks(folder / "masks"),
        "owned by nobody": lambda: {"said": owned_by_nobody()},
    }
    for way in (resume_others, after, tested):
        for into in ("file", "folder"):
            cases[f"{way.__name__}, {into}"] = lambda w=way, s=into: w(folder / f"{w.__name__} {s}", s == "folder")
    cases["plain loop"] = plain_loop
    only = os.environ.get("ONLY")
    results: dict[str, Any] = {}
    for name, case in cases.items():
        if only and not any(part in name for part in only.split("|")):
            continue
        try:
            results[name] = case()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
            break  # the other rank may wait for this one
    (folder / f"rank{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    codes = [*run_ranks(1, alone, root / "alone"), *run_ranks(2, main, root), *run_ranks(1, back_to_one, root)]
    sys.exit(max(map(abs, codes)))
