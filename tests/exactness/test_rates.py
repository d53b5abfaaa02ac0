import copy
import math
from typing import Any

import pytest
import torch
from optimizer_cases import OptimizerCase, optimizer_cases
from plain_and_ours import make_batches, make_net, same
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from lightning_mask.core import MaskEngine, MaskSet
from lightning_mask.core.optimizers import RateFactors, begin_state, reset_state

CASES = [case for case in optimizer_cases() if case.cls is not torch.optim.LBFGS]
FACTORS = {"few.weight": 0.5, "some.weight": 0.125, "conv.weight": 0.5, "head.bias": 4.0}  # powers of two: exact


def named(net: nn.Module, case: OptimizerCase) -> dict[str, nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if case.takes(p)}


def train(net: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, closure: bool) -> None:
    for x, y in make_batches(5):

        def backward(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (net(x) - y).square().mean()
            loss.backward()
            return loss

        if closure:
            optimizer.step(backward)  # type: ignore[arg-type]
        else:
            backward()
            optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("closure", [False, True])
def test_equal_to_an_optimizer_with_real_groups(case: OptimizerCase, closure: bool):
    net = make_net()
    plain = copy.deepcopy(net)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    own: list[dict[str, Any]] = [{"params": []}, {"params": [], "lr": 0.02}]
    for (name, p), q in zip(named(net, case).items(), named(plain, case).values(), strict=True):
        second = name.startswith(("some", "head"))
        own[second]["params"].append(p)
        factor, lr = FACTORS.get(name, 1.0), 0.02 if second else 0.01
        groups.setdefault((factor, second), {"params": [], "lr": lr * factor})["params"].append(q)
    ours, real = case.make(own), case.make(groups.values())
    rates = RateFactors(ours, {p: FACTORS[n] for n, p in named(net, case).items() if n in FACTORS})
    before = list(ours.param_groups)
    train(net, ours, CosineAnnealingLR(ours, 8), closure)
    train(plain, real, CosineAnnealingLR(real, 8), closure)
    assert [id(g) for g in ours.param_groups] == [id(g) for g in before]
    assert [g["lr"] for g in ours.param_groups] == pytest.approx([0.01 * cosine(5), 0.02 * cosine(5)])
    assert same(net, plain) == []
    rates.remove()


def cosine(step: int) -> float:
    return (1 + math.cos(math.pi * step / 8)) / 2


def one_tensor() -> tuple[nn.Parameter, nn.Parameter, Optimizer, RateFactors]:
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    a.grad, b.grad = torch.ones(2), torch.ones(2)
    return a, b, optimizer, RateFactors(optimizer, {a: 0.5})


def assert_users_own(state: dict[str, Any]) -> None:
    assert [g["lr"] for g in state["param_groups"]] == [1.0]
    assert state["param_groups"][0]["params"] == [0, 1]
    assert "_of" not in state["param_groups"][0]


def test_a_state_dict_taken_in_mid_step_is_the_users_and_the_step_goes_on_as_it_should():
    for where in ("pre-hook", "closure", "post-hook"):
        a, b, optimizer, _ = one_tensor()
        states: list[dict[str, Any]] = []
        closure = None
        if where == "pre-hook":
            optimizer.register_step_pre_hook(lambda *_, o=optimizer, s=states: s.append(o.state_dict()))
        elif where == "post-hook":
            optimizer.register_step_post_hook(lambda *_, o=optimizer, s=states: s.append(o.state_dict()))
        else:

            def closure(optimizer: Optimizer = optimizer, states: list[dict[str, Any]] = states) -> float:
                states.append(optimizer.state_dict())
                assert [g["lr"] for g in optimizer.param_groups] == [1.0], "a training step that logs its rate"
                return 0.0

        optimizer.step(closure)  # type: ignore[arg-type]
        assert len(states) == 1
        assert_users_own(states[0])
        assert a.tolist() == [-0.5, -0.5], where
        assert b.tolist() == [-1.0, -1.0], where
        assert_users_own(optimizer.state_dict())


def test_a_step_that_fails_leaves_the_groups_right_for_the_next():
    a, b, optimizer, rates = one_tensor()

    def fail() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fail)
    assert [g["lr"] for g in optimizer.param_groups] == [1.0]
    optimizer.step()
    assert (a.tolist(), b.tolist()) == ([-0.5, -0.5], [-1.0, -1.0])
    rates.remove()
    optimizer.step()
    assert (a.tolist(), b.tolist()) == ([-1.5, -1.5], [-2.0, -2.0])


def test_lbfgs_takes_one_factor_or_is_refused():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="LBFGS takes one learning rate"):
        RateFactors(torch.optim.LBFGS([a, b]), {a: 0.5})
    RateFactors(torch.optim.LBFGS([a, b]), {a: 0.5, b: 0.5})


# State that starts afresh.


def steps(net: nn.Module, optimizer: Optimizer, count: int, only: str | None = None) -> None:
    for x, y in make_batches(count):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        for name, p in net.named_parameters():
            if only is not None and name != only:
                p.grad = None
        optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_whole_tensor_starts_afresh_as_in_a_new_optimizer(case: OptimizerCase):
    name = "some.weight"
    net = make_net()
    optimizer = case.make(named(net, case).values())
    steps(net, optimizer, 4)
    plain = copy.deepcopy(net)
    new = case.make([plain.get_parameter(name)])
    others = {n: copy.deepcopy(optimizer.state.get(p, {})) for n, p in net.named_parameters() if n != name}
    reset_state(optimizer, net.get_parameter(name))
    begin_state(optimizer, net.get_parameter(name))
    for n, p in net.named_parameters():
        if n != name:
            torch.testing.assert_close(dict(optimizer.state.get(p, {})), dict(others[n]), rtol=0, atol=0)
    steps(net, optimizer, 3, only=name)
    steps(plain, new, 3, only=name)
    assert same(net, plain) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_some_entries_start_afresh_and_the_others_keep_their_state(case: OptimizerCase):
    name = "some.weight"
    net = make_net()
    optimizer, fresh = case.make(named(net, case).values()), copy.deepcopy(net)
    steps(net, optimizer, 4)
    parameter = net.get_parameter(name)
    before = {k: v.clone() for k, v in optimizer.state[parameter].items() if torch.is_tensor(v)}
    entries = torch.arange(parameter.numel()).view(parameter.shape) % 3 == 0
    reset_state(optimizer, parameter, entries)
    initial = initial_state(case, fresh.get_parameter(name))
    for key, value in optimizer.state[parameter].items():
        if torch.is_tensor(value) and value.shape == parameter.shape:
            assert torch.equal(value[~entries], before[key][~entries]), key
            assert torch.equal(value[entries], torch.full_like(value[entries], initial.get(key, 0.0))), key
        elif torch.is_tensor(value):
            assert torch.equal(value, before[key]), key


def initial_state(case: OptimizerCase, parameter: nn.Parameter) -> dict[str, float]:
    """What a state tensor holds before the first step that has a gradient, where that is not zero."""
    return {"step_size": case.arguments["lr"]} if case.cls is torch.optim.Rprop else {}


def test_adagrad_starts_from_its_own_initial_value():
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.25)
    p.grad = torch.ones(4)
    optimizer.step()
    reset_state(optimizer, p, torch.tensor([True, False, True, False]))
    assert optimizer.state[p]["sum"].tolist() == [0.25, 1.25, 0.25, 1.25]
    reset_state(optimizer, p)
    assert optimizer.state[p]["sum"].tolist() == [0.25] * 4
    assert optimizer.state[p]["step"] == 0


class MyRprop(torch.optim.Rprop):
    """A user's subclass."""


def test_a_subclass_starts_as_its_parent_does():
    p = nn.Parameter(torch.ones(2))
    optimizer = MyRprop([p], lr=0.1)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.step()
    reset_state(optimizer, p, torch.tensor([True, False]))
    assert optimizer.state[p]["step_size"][0].item() == pytest.approx(0.1)


def test_the_engine_sets_and_takes_back_rates():
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    engine = MaskEngine(net, optimizer, MaskSet({}))
    hooks = len(optimizer._optimizer_step_pre_hooks)
    engine.set_rates({"head.weight": 0.5, "few.weight": 1.0})
    engine.set_rates({"head.weight": 0.5})
    assert len(optimizer._optimizer_step_pre_hooks) == hooks + 1
    before = net.head.weight.detach().clone()
    steps(net, optimizer, 1)
    assert torch.equal(net.head.weight, before - 0.25 * net.head.weight.grad)  # type: ignore[operator]
    engine.set_rates({"head.weight": 1.0})
    assert len(optimizer._optimizer_step_pre_hooks) == hooks
    engine.set_rates({"head.weight": 0.5})
    engine.release()
    assert not any(len(getattr(optimizer, n)) for n in vars(optimizer) if n.endswith("_hooks"))
