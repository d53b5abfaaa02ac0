"""Entries that begin to train later move as if the optimizer had been made for them then."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam, Adamax, AdamW, Optimizer

from lightning_mask.core import MaskEngine

N, JOIN, STEPS = 60, 40, 90
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "Adam": (Adam, {}),
    "Adam foreach": (Adam, {"foreach": True, "weight_decay": 0.1}),
    "Adam amsgrad": (Adam, {"amsgrad": True}),
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW fused": (AdamW, {"weight_decay": 0.1, "fused": True}),
    "AdamW maximize": (AdamW, {"weight_decay": 0.1, "maximize": True}),
    "Adamax": (Adamax, {"weight_decay": 0.1}),
}


def gradients(step: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(step))


def alone(cls: type[Optimizer], arguments: dict[str, Any], first: int, last: int, start: Tensor) -> Tensor:
    """What a tensor becomes that an optimizer of its own trains from step ``first`` on."""
    parameter = nn.Parameter(start.clone())
    optimizer = cls([parameter], lr=0.01, **arguments)
    for step in range(first, last):
        parameter.grad = gradients(step)
        optimizer.step()
    return parameter.detach()


@pytest.mark.parametrize("layout", ["few join", "most join"])
@pytest.mark.parametrize("engine", ["compact", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_who_joins_moves_like_one_with_an_optimizer_of_its_own(kind: str, engine: str, layout: str) -> None:
    cls, arguments = KINDS[kind]
    model = nn.Module()
    model.w = nn.Parameter(torch.linspace(-1, 1, N))
    start = model.w.detach().clone()
    optimizer = cls([model.w], lr=0.01, **arguments)
    place = torch.arange(N)
    first, then = (place < 20, place < 26) if layout == "few join" else (place < 4, place < 28)
    held = MaskEngine(model, optimizer, {"w": first}, engine=engine)
    for step in range(STEPS):
        if step == JOIN:
            held.update({"w": then})
        if step == JOIN + 10:
            held.update({"w": then & (place != 1)})  # nobody joins; the ages stay
        model.w.grad = gradients(step)
        held.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    joined = then & ~first
    old = first & (place != 1)
    torch.testing.assert_close(
        model.w.detach()[joined], alone(cls, arguments, JOIN, STEPS, start)[joined], rtol=2e-6, atol=2e-6
    )
    torch.testing.assert_close(model.w.detach()[old], alone(cls, arguments, 0, STEPS, start)[old], rtol=2e-6, atol=2e-6)
    assert torch.equal(model.w.detach()[~then], start[~then])


def test_several_cohorts_and_a_lift() -> None:
    model = nn.Module()
    model.w = nn.Parameter(torch.linspace(-1, 1, N))
    start = model.w.detach().clone()
    optimizer = AdamW([model.w], lr=0.01)
    place = torch.arange(N)
    sizes = {0: 10, 7: 14, 15: 17, 30: N}
    held = MaskEngine(model, optimizer, {"w": place < 10})
    for step in range(50):
        if step in sizes and step:
            held.update({"w": place < sizes[step]})
        model.w.grad = gradients(step)
        held.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    edges = [0, *sizes.values()]
    for born, low, high in zip(sizes, edges, edges[1:], strict=False):
        expected = alone(AdamW, {}, born, 50, start)[low:high]
        torch.testing.assert_close(model.w.detach()[low:high], expected, rtol=2e-6, atol=2e-6)


def test_a_skipped_step_moves_nobody() -> None:
    """A fused optimizer under a gradient scaler runs its step and changes nothing."""
    model = nn.Module()
    model.w = nn.Parameter(torch.linspace(-1, 1, N))
    optimizer = AdamW([model.w], lr=0.01, weight_decay=0.5, fused=True)
    place = torch.arange(N)
    held = MaskEngine(model, optimizer, {"w": place < 20})
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(12):
        if step == 4:
            held.update({"w": place < 25})
        before = model.w.detach().clone()
        bad = step == 8
        scaler.scale((model.w * (gradients(step) * (float("inf") if bad else 1.0))).sum()).backward()
        held.after_backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(model.w.detach(), before) == bad
