"""regrow="ste": the pruned network is what everybody sees, and dense weights learn behind it, as in a loop by hand."""

import math
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from optimizer_cases import OptimizerCase, optimizer_cases
from plain_and_ours import Setting, Task, adamw, bits, fit, make_batches, make_net, prefixed, same
from torch import Tensor

from lightning_mask import FreezeMask, MaskSet, PruneMask
from lightning_mask.core.choosing import n_of_m

SCOPE = ["few.weight", "most.weight", "some.weight"]
STEPS = 10
START, END, EVERY = 2, 7, 2
OPTIMIZERS = [
    c
    for c in optimizer_cases()
    if not any(word in c.name for word in ("LBFGS", "foreach", "maximize"))
    and all(map(c.takes, make_net().parameters()))
]


def largest(dense: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The largest magnitudes of all, ties by position."""
    flat = torch.cat([dense[n].abs().float().view(-1) for n in SCOPE])
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:keep]] = True
    parts = kept.split([dense[n].numel() for n in SCOPE])
    return {n: part.view(dense[n].shape) for n, part in zip(SCOPE, parts, strict=True)}


def by_hand(
    choose: Callable[[dict[str, Tensor], float], dict[str, Tensor]],
    make: Callable[[Any], Any] = adamw,
    hold: dict[str, Tensor] | None = None,
) -> tuple[Any, list[dict[str, Tensor]]]:
    """Forward with W * M, the gradient of W * M given to W; from END on the mask stays and W is W * M."""
    net = make_net()
    named = dict(net.named_parameters())
    optimizer = make(list(net.parameters()))
    dense = {n: named[n].detach().clone() for n in SCOPE}
    masks = {n: torch.ones_like(named[n], dtype=torch.bool) for n in SCOPE}
    shown = []
    for step, (x, y) in enumerate(make_batches(STEPS)):
        optimizer.zero_grad()
        (net(x) - y).float().square().mean().backward()
        if step >= START and (step == END or (step < END and (step - START) % EVERY == 0)):
            t = min((step - START) / (END - START), 1.0)
            masks = choose(dense, 1 - (1 - t) ** 3)
        behind = step < END
        kept = {n: p.detach().clone() for n, p in named.items()}
        for name, p in named.items():
            free = torch.ones_like(p, dtype=torch.bool) if hold is None else hold[name]
            if name in masks:
                p.data.copy_(dense[name])
                if not behind:
                    free = free & masks[name]
                    p.data.masked_fill_(~masks[name], 0)
                    dense[name] = p.detach().clone()
            kept[name] = p.detach().clone()
            p.grad = torch.where(free, p.grad, torch.zeros_like(p.grad))
        if step == END:  # what is pruned for good starts afresh, if it ever came back
            for name in SCOPE:
                for value in optimizer.state.get(named[name], {}).values():
                    if isinstance(value, Tensor) and value.shape == masks[name].shape:
                        value.masked_fill_(~masks[name], 0)
        optimizer.step()
        for name, p in named.items():
            free = torch.ones_like(p, dtype=torch.bool) if hold is None else hold[name]
            if name in masks and not behind:
                free = free & masks[name]
            p.data.copy_(torch.where(free, p.data, kept[name]))
            if name in masks:
                dense[name] = p.detach().clone()
                p.data.masked_fill_(~masks[name], 0)
        shown.append({n: named[n].detach().clone() for n in SCOPE})
    return net, shown


class Watch(L.Callback):
    def __init__(self) -> None:
        self.shown: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.shown.append({n: pl_module.net.get_parameter(n).detach().clone() for n in SCOPE})


def pruner(sparsity: Any = 0.8, **more: Any) -> PruneMask:
    when = {"start": f"{START} steps", "end": f"{END} steps", "every": f"{EVERY} steps"}
    return PruneMask(sparsity, scope=[f"net.{n}" for n in SCOPE], regrow="ste", **{**when, **more})


def global_top(dense: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    n = sum(dense[name].numel() for name in SCOPE)
    return largest(dense, n - math.floor(0.8 * n + 0.5))


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda c: c.name)
def test_every_optimizer_updates_the_dense_weights_behind_the_mask(case: OptimizerCase) -> None:
    watch = Watch()
    module = Task(make_net(), case.make)
    fit(module, [pruner(schedule="constant"), watch], make_batches(STEPS))
    _, shown = by_hand(global_top, case.make)
    assert len(shown) == STEPS
    for step in range(END):  # afterwards it is ordinary pruning, which has its own tests
        for name in SCOPE:
            assert torch.equal(bits(watch.shown[step][name]), bits(shown[step][name])), (step, name)
    assert not case.name.startswith("Adam") or any(
        bool(((a[n] == 0) & (b[n] != 0)).any())
        for a, b in zip(watch.shown[START:END], watch.shown[START + 1 : END], strict=False)
        for n in SCOPE
    ), "nothing ever came back"


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_the_whole_run_with_adamw_and_what_a_freeze_mask_holds(engine: str) -> None:
    hold = {n: torch.ones_like(p, dtype=torch.bool) for n, p in make_net().named_parameters()}
    hold["few.weight"] = torch.rand(hold["few.weight"].shape, generator=torch.Generator().manual_seed(3)) < 0.3
    hold["conv.weight"][:] = False

    def choose(dense: dict[str, Tensor], share: float) -> dict[str, Tensor]:
        n = sum(dense[name].numel() for name in SCOPE)
        worth = {k: v.abs() for k, v in dense.items()}
        worth["few.weight"] = worth["few.weight"].masked_fill(~hold["few.weight"], math.inf)
        return largest(worth, n - math.floor(0.5 * share * n + 0.5))

    watch, mask = Watch(), pruner(0.5)
    module = Task(make_net())
    freeze = FreezeMask(mask=MaskSet(prefixed(hold)))
    fit(module, [freeze, mask, watch], make_batches(STEPS), Setting(engine=engine))
    net, shown = by_hand(choose, hold=hold)
    for step in range(STEPS):
        for name in SCOPE:
            assert torch.equal(bits(watch.shown[step][name]), bits(shown[step][name])), (step, name)
    assert same(module.net, net) == []
    assert mask.masks.numel() - mask.masks.count() == math.floor(0.5 * mask.masks.numel() + 0.5)


def test_two_of_four_behind_a_mask() -> None:
    watch, mask = Watch(), pruner("2:4")
    module = Task(make_net())
    fit(module, [mask, watch], make_batches(STEPS))
    net, _ = by_hand(lambda dense, share: n_of_m({n: dense[n].abs() for n in SCOPE}, 2, 4))
    assert same(module.net, net) == []
    for name in SCOPE:
        weight = module.net.get_parameter(name).detach()
        assert torch.equal((weight.view(-1, 4) != 0).sum(1), torch.full((weight.numel() // 4,), 2))
