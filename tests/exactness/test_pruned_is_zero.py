import copy
import math
from typing import Any

import lightning as L
import pytest
import torch
from optimizer_cases import OptimizerCase, optimizer_cases
from plain_and_ours import (
    ENGINES,
    Setting,
    Task,
    adamw,
    bits,
    fit,
    inject,
    make_batches,
    make_net,
    prefixed,
    same,
    trained,
)
from torch import Tensor, nn

from lightning_mask import FreezeMask, MaskSet, PruneMask

SCOPE = ["net.conv.weight", "net.few.weight", "net.most.weight", "net.some.weight"]
N = 108 + 256 + 256 + 128
STEPS = 12


class Watch(L.Callback):
    """After each step: pruned entries are +0.0 to the sign bit and their number is exact."""

    def __init__(self, pruner: PruneMask) -> None:
        self.pruner, self.zeros, self.masks = pruner, [], []  # type: ignore[var-annotated]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        masks = self.pruner.masks
        for name, mask in masks.items():
            assert not bits(pl_module.get_parameter(name))[~mask].any(), name
        self.masks.append(masks)
        self.zeros.append(masks.numel() - masks.count())
        entries = torch.cat([bits(pl_module.get_parameter(n)).view(-1) for n in masks])
        assert int((entries == 0).sum()) == self.zeros[-1]


def zeros_by_hand(sparsity: float, schedule: str, start: int, end: int, every: int, n: int = N) -> list[int]:
    counts, now = [], 0
    for step in range(STEPS):
        if step >= start and (step >= end or (step - start) % every == 0):
            t = 1.0 if step >= end else (step - start) / (end - start)
            share = {"linear": t, "cubic": 1 - (1 - t) ** 3, "constant": 1.0}[schedule]
            now = math.floor(sparsity * share * n + 0.5)
        counts.append(now)
    return counts


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-mixed"])
@pytest.mark.parametrize(
    ("sparsity", "schedule", "start", "end", "every"),
    [
        (0.9, "cubic", 2, 8, 1),
        (0.5, "linear", 0, 10, 3),
        (0.77, "linear", 1, 6, 4),
        (0.3, "constant", 3, 6, 1),
        (0.99, "cubic", 0, 11, 2),
    ],
)
def test_exactly_that_many_entries_are_zero_at_every_step(
    precision: str, sparsity: float, schedule: str, start: int, end: int, every: int
):
    when = {"start": f"{start} steps", "end": f"{end} steps", "every": f"{every} steps"}
    pruner = PruneMask(sparsity, scope=SCOPE, schedule=schedule, allow_whole_layers=True, **when)
    watch = Watch(pruner)
    fit(Task(make_net()), [pruner, watch], make_batches(STEPS), Setting(precision))
    assert watch.zeros == zeros_by_hand(sparsity, schedule, start, end, every)
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert after & before == after, "what is pruned stays pruned"


def test_ties_are_broken_by_position():
    net = make_net()
    with torch.no_grad():
        for name in ("few.weight", "most.weight"):
            net.get_parameter(name).fill_(-0.5)
    scope = ["net.few.weight", "net.most.weight"]
    pruner = PruneMask(0.75, scope=scope, schedule="constant", start="0 steps", allow_whole_layers=True)
    fit(Task(net), [pruner], make_batches(2))
    masks = pruner.masks
    assert masks["net.few.weight"].view(-1).tolist() == [True] * 128 + [False] * 128
    assert not masks["net.most.weight"].any()


def reference(net: nn.Module, scope: list[str], sparsity: float, at: int, batches: list[Any]) -> None:
    """Magnitude pruning once, between backward and step, in plain torch."""
    optimizer, masks = adamw(net.parameters()), {}
    for step, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        if step == at:
            every = torch.cat([net.get_parameter(n).detach().abs().reshape(-1) for n in scope])
            keep = torch.zeros(len(every), dtype=torch.bool)
            count = len(every) - math.floor(sparsity * len(every) + 0.5)
            keep[torch.argsort(every, descending=True, stable=True)[:count]] = True
            parts = keep.split([net.get_parameter(n).numel() for n in scope])
            masks = {n: p.view(net.get_parameter(n).shape) for n, p in zip(scope, parts, strict=True)}
        for name, mask in masks.items():
            net.get_parameter(name).grad.masked_fill_(~mask, 0)
        with torch.no_grad():
            for name, mask in masks.items():
                net.get_parameter(name).masked_fill_(~mask, 0)
            optimizer.step()
            for name, mask in masks.items():
                net.get_parameter(name).masked_fill_(~mask, 0)


def test_what_is_alive_trains_as_if_the_rest_were_zero():
    net, scope = make_net(), ["few.weight", "most.weight", "some.weight"]
    plain = copy.deepcopy(net)
    reference(plain, scope, 0.6, 3, make_batches(8))
    pruner = PruneMask(0.6, scope=[f"net.{n}" for n in scope], schedule="constant", start="3 steps")
    fit(Task(net), [pruner], make_batches(8))
    assert same(net, plain) == []


@pytest.mark.parametrize("clip", [None, 0.1])
def test_bad_gradients_of_pruned_entries_reach_nothing(clip: float | None):
    nets = []
    for spoil in (False, True):
        net = make_net()
        pruner = PruneMask(0.5, scope=SCOPE, schedule="constant", start="0 steps")
        if spoil:
            dead = {n: ~m for n, m in nets[0][1].items()}
            inject(net, {n.removeprefix("net."): m for n, m in dead.items()}, float("nan"))
        fit(Task(net), [pruner], make_batches(5), Setting(clip=clip))
        nets.append((net, pruner.masks))
    assert nets[0][1] == nets[1][1]
    assert same(nets[0][0], nets[1][0]) == []


def test_held_and_pruned_together():
    """A FreezeMask holds half of a tensor; what it holds is not pruned, what is pruned is among what it lets train."""
    net = make_net()
    start = copy.deepcopy(net)
    lets = {"few.weight": torch.arange(256).view(16, 16) % 2 == 0}
    freeze = FreezeMask(train="net.head", mask=MaskSet(prefixed(lets)))
    pruner = PruneMask(0.4, scope="net.few.weight", schedule="linear", start="0 steps", end="6 steps", every="1 steps")
    watch = Watch(pruner)
    fit(Task(net), [freeze, pruner, watch], make_batches(STEPS))
    alive: Tensor = pruner.masks["net.few.weight"]
    assert int((~alive).sum()) == 102
    assert bool((alive | lets["few.weight"]).all())
    held = alive & ~lets["few.weight"]
    assert torch.equal(bits(net.few.weight)[held], bits(start.few.weight)[held])
    assert bool((bits(net.few.weight) != bits(start.few.weight))[alive & lets["few.weight"]].all())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", optimizer_cases(), ids=lambda case: case.name)
def test_pruned_is_zero_and_the_count_exact_under_every_optimizer(case: OptimizerCase, engine: str):
    """Three updates of a ramp, each over the moments of the steps before; the alive half trains on."""
    net, scope = make_net(), ["net.few.weight", "net.most.weight", "net.some.weight"]
    if case.cls is torch.optim.LBFGS:  # it flattens gradients in a way that an odd layout does not allow
        net.conv.to(memory_format=torch.contiguous_format)
    for parameter in net.parameters():
        parameter.requires_grad_(case.takes(parameter))
    ramp = {"start": "2 steps", "end": "6 steps", "every": "2 steps"}
    pruner = PruneMask(0.7, scope=scope, **ramp)
    watch = Watch(pruner)
    fit(Task(net, case.make), [pruner, watch], make_batches(9), Setting(engine=engine))
    assert watch.zeros == zeros_by_hand(0.7, "cubic", 2, 6, 2, n=640)[:9]
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    alive = {name.removeprefix("net."): mask for name, mask in pruner.masks.items()}
    assert trained(net, make_net(), alive) > 0.9 * pruner.masks.count()
