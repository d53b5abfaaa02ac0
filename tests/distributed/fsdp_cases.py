"""Script: little trainings of a model that ``fully_shard`` deals out over two processes.

``python fsdp_cases.py FOLDER`` forks two ranks that do everything; each writes ``rank<r>.json``: case -> what it saw. What
one process trains alone is trained first.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forks import run_ranks
from fsdp_checkpoints import across, after, alone, back_to_one, other_number, resume, resume_others, tested
from fsdp_nets import PLANS, STEPS, AsTask, Dealt, WithoutScale, far, local, quiet, sgd, train, two_groups, whole
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from little import Data, differences, trainer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks.report import RunReport
from lightning_mask.core import MaskEngine, Selection
from lightning_mask.core.criteria import Context
from lightning_mask.core.ranking import top_k
from lightning_mask.core.selection import select


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
