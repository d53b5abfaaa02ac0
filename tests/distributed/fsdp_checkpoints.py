"""Cases of fsdp_cases.py: checkpoints of shards resume, move to other numbers of ranks, and are tested."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fsdp_nets import (
    PLANS,
    STEPS,
    ByHand,
    Dealt,
    Numbers,
    TestData,
    Tested,
    Wide,
    far,
    local,
    quiet,
    train,
    two_groups,
    whole,
)
from lightning.pytorch import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from little import Data, differences, trainer
from torch import nn

from lightning_mask import FreezeMask


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
