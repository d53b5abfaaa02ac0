import copy

import pytest
import torch
from optimizer_cases import OptimizerCase, optimizer_cases
from plain_and_ours import (
    ENGINES,
    Net,
    Setting,
    Task,
    fit,
    make_batches,
    make_masks,
    make_net,
    moved,
    prefixed,
    reference,
    same,
    trained,
)
from torch import Tensor

from lightning_mask import MaskSet, Phase, PhaseUnfreeze
from lightning_mask.core import MaskEngine
from lightning_mask.core.holders import _Bits, _FewActive, _FewHeld, _Where

CASES = optimizer_cases()
FREE = 3


def setup(case: OptimizerCase) -> tuple[Net, dict[str, Tensor], list[str]]:
    """A network of which only what the optimizer takes trains, its masks, and the names of what trains."""
    net, masks = make_net(), make_masks()
    if case.cls is torch.optim.LBFGS:  # it flattens gradients in a way that an odd layout does not allow
        net.conv.to(memory_format=torch.contiguous_format)
    for name, parameter in net.named_parameters():
        if not case.takes(parameter):
            parameter.requires_grad_(False)
            masks[name] = torch.zeros_like(masks[name])
    return net, masks, [name for name, p in net.named_parameters() if p.requires_grad]


def test_the_masks_use_every_way_of_holding():
    net = make_net()
    engine = MaskEngine(net, torch.optim.SGD(net.parameters()), MaskSet(make_masks()))
    assert {type(h) for h in engine._holders.values()} == {_Bits, _FewActive, _FewHeld, _Where}
    held_by = {row.name: row.held_by for row in engine.summary()}
    assert held_by["norm.weight"] == "requires_grad"
    assert held_by["head.weight"] == "-"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_held_is_held_and_active_trains_as_if_the_rest_were_constants(case: OptimizerCase, engine: str):
    """Three free steps give the optimizer momentum, then the mask comes into force."""
    net, masks, names = setup(case)
    plain, batches = copy.deepcopy(net), make_batches()
    start, _ = reference(plain, case.make, batches, masks, free=FREE)
    own = prefixed(masks)
    phases = [Phase(f"{FREE} steps", train=[f"net.{name}" for name in names]), Phase(mask=MaskSet(own))]
    fit(Task(net, case.make), [PhaseUnfreeze(phases)], batches, Setting(engine=engine))
    assert moved(net, start, masks) == []
    assert same(net, plain) == []
    assert trained(net, start, masks) >= sum(int(m.sum()) for m in masks.values()) // 2
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


DRIFTING = [c for c in CASES if c.name in ("SGD", "Adam", "AdamW", "RMSprop", "NAdam", "Adagrad", "Muon")]


@pytest.mark.parametrize("case", DRIFTING, ids=lambda case: case.name)
def test_a_mask_on_the_gradient_alone_fails_the_same_assertion(case: OptimizerCase):
    net, masks, _ = setup(case)
    optimizer = case.make([p for p in net.parameters() if p.requires_grad])
    start = net
    for step, (x, y) in enumerate(make_batches()):
        if step == FREE:
            start = copy.deepcopy(net)
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        for name, p in net.named_parameters():
            if p.grad is not None and step >= FREE:
                p.grad *= masks[name]
        optimizer.step()
    assert moved(net, start, masks) != []
