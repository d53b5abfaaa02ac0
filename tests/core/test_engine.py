import copy
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_mask.core import MaskEngine, MaskSet


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.scale = nn.Linear(20, 20), nn.Linear(20, 20), nn.Parameter(torch.tensor(0.5))
        self.tied = nn.Linear(20, 20, bias=False)
        self.tied.weight = self.a.weight
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.register_parameter("fixed", nn.Parameter(torch.ones(2), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(torch.tanh(self.b(torch.tanh(self.a(x))))) * self.scale


def draw(shape: tuple[int, ...], density: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def masks_of(density: float, seed: int = 0) -> dict[str, Tensor]:
    masks = {"a.weight": draw((20, 20), density, seed), "b.weight": draw((20, 20), density, seed + 1)}
    for mask in masks.values():
        mask[3, 5] = True
    return masks


def backward(net: nn.Module, optimizer: Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 20, generator=torch.Generator().manual_seed(seed))).square().mean().backward()


def train(net: nn.Module, engine: MaskEngine, steps: int = 3, first: int = 0) -> None:
    for step in range(first, first + steps):
        backward(net, engine.optimizers[0], step)
        engine.after_backward()
        engine.optimizers[0].step()


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def assert_held(before: Mapping[str, Tensor], net: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, mask in masks.items():
        now = net.get_parameter(name).detach()
        assert torch.equal(now[~mask], before[name][~mask]), name
        if mask.any():
            assert not torch.equal(now[mask], before[name][mask]), name


@pytest.mark.parametrize("density", [0.004, 0.3, 0.97])
def test_a_plain_loop_in_the_docstrings_three_lines(density: float):
    net, plain, masks = Net(), Net(), masks_of(density)
    optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.1)
    reference = AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    start = weights(net)
    train(net, MaskEngine(net, optimizer, MaskSet(masks)))
    for step in range(3):
        backward(plain, reference, step)
        for name, mask in masks.items():
            plain.get_parameter(name).grad.masked_fill_(~mask, 0)
        reference.step()
        with torch.no_grad():
            for name, mask in masks.items():
                plain.get_parameter(name).copy_(torch.where(mask, plain.get_parameter(name), start[name]))
    assert_held(start, net, masks)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("density", [0.004, 0.3, 0.97])
def test_held_gradients_become_positive_zero_and_active_ones_stay(density: float):
    net, masks = Net(), masks_of(density)
    optimizer = SGD(net.parameters())
    engine = MaskEngine(net, optimizer, masks)
    for layout in ("contiguous", "transposed"):
        backward(net, optimizer, 0)
        for name, mask in masks.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None
            if layout == "transposed":
                gradient = gradient.t().contiguous().t()
            gradient[~mask] = -float("nan")
            net.get_parameter(name).grad = gradient
        before = {name: net.get_parameter(name).grad.clone() for name in masks}  # type: ignore[union-attr]
        engine.after_backward()
        for name, mask in masks.items():
            gradient = net.get_parameter(name).grad
            assert gradient is not None
            assert torch.equal(gradient[mask], before[name][mask]), (layout, name)
            assert not gradient.contiguous().view(torch.int32)[~mask].any(), (layout, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
@pytest.mark.parametrize("density", [0.004, 0.3, 0.97])
def test_every_dtype(dtype: torch.dtype, density: float):
    torch.manual_seed(0)
    model = nn.Module()
    model.w = nn.Parameter(torch.randn(20, 20).to(dtype))
    mask = draw((20, 20), density)
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    engine, start = MaskEngine(model, optimizer, {"w": mask}), model.w.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (model.w * model.w.conj()).real.float().sum().backward()
        engine.after_backward()
        optimizer.step()
    assert_held({"w": start}, model, {"w": mask})


def test_whole_tensors():
    net = Net()
    masks = {n: torch.full(p.shape, n in ("b.weight", "scale")) for n, p in net.named_parameters()}
    optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.5)
    engine, start = MaskEngine(net, optimizer, masks), weights(net)
    assert engine.trainable == ["scale", "empty", "b.weight"]
    train(net, engine)
    assert_held(start, net, {n: m for n, m in masks.items() if n != "empty"})
    held = [p for n, p in net.named_parameters() if n not in ("b.weight", "scale", "empty")]
    assert all(p.grad is None and p not in optimizer.state for p in held), "no gradient, no state"
    assert len(optimizer.param_groups[0]["params"]) == len(list(net.parameters()))


def test_gradients_at_hand_when_a_tensor_becomes_held_are_not_used():
    """Between backward and step, with zero_grad(set_to_none=False) afterwards: weight decay must not see it."""
    net = Net()
    optimizer = AdamW(net.parameters(), lr=0.01, weight_decay=0.5)
    engine = MaskEngine(net, optimizer, {"a.weight": torch.ones(20, 20)})
    train(net, engine)
    backward(net, optimizer, 9)
    start = weights(net)
    engine.update({"a.weight": torch.zeros(20, 20)})
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert_held(start, net, {"a.weight": torch.zeros(20, 20, dtype=torch.bool)})


def test_what_stays_active_keeps_its_moments_and_what_joins_starts_from_zero():
    net, first, second = Net(), masks_of(0.5), masks_of(0.5, seed=7)
    optimizer = Adam(net.parameters(), lr=0.01)
    engine = MaskEngine(net, optimizer, {})
    train(net, engine, steps=2)  # momentum from before the mask
    engine.update(first)
    train(net, engine, steps=1, first=2)
    before = copy.deepcopy({n: optimizer.state[p] for n, p in net.named_parameters() if p in optimizer.state})
    engine.update(second)
    for name in first:
        joins, stays = second[name] & ~first[name], second[name] & first[name]
        state = optimizer.state[net.get_parameter(name)]
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[key][stays], before[name][key][stays])
            assert before[name][key][stays].abs().sum() > 0
            assert before[name][key][joins].abs().sum() > 0
            assert not state[key][joins].any()
        if joins.any():
            age = torch.full_like(joins, int(state["step"]), dtype=torch.int)
            for offset, index in engine.ages().get(name, []):
                age.view(-1)[index] += offset
            assert set(age[joins].tolist()) == {0}
            assert set(age[stays].tolist()) == {3}
    untouched = optimizer.state[net.b.bias]
    assert torch.equal(untouched["exp_avg"], before["b.bias"]["exp_avg"])
    start = weights(net)
    train(net, engine, first=3)
    assert_held(start, net, second)


def test_a_tensor_that_was_held_whole_joins_with_a_new_state():
    net = Net()
    optimizer = Adam(net.parameters(), lr=0.01)
    none, all_ = torch.zeros(20, 20, dtype=torch.bool), torch.ones(20, 20, dtype=torch.bool)
    engine = MaskEngine(net, optimizer, {"b.weight": all_})
    train(net, engine)
    engine.update({"b.weight": none})
    assert net.b.weight not in optimizer.state
    train(net, engine, first=3)
    engine.update({"b.weight": draw((20, 20))})
    train(net, engine, first=6, steps=2)
    assert optimizer.state[net.b.weight]["step"] == 2
    assert optimizer.state[net.b.bias]["step"] == 8
    engine.update({})
    assert engine.masks.density() == 1.0, "what is named no more is active whole"
    start = weights(net)
    train(net, engine, first=8)
    assert_held(start, net, {"b.weight": all_})


def test_a_lifted_mask_holds_nothing_any_more():
    net, masks = Net(), masks_of(0.1)
    optimizer = AdamW(net.parameters(), lr=0.01)
    engine = MaskEngine(net, optimizer, masks)
    train(net, engine)
    start = weights(net)
    engine.update({n: torch.ones_like(m) for n, m in masks.items()})
    train(net, engine, first=3)
    assert_held(start, net, {n: ~m for n, m in masks.items()} | {n: torch.ones_like(m) for n, m in masks.items()})


def test_zero_means_positive_zero():
    net, masks = Net(), masks_of(0.3)
    optimizer = SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1, maximize=True)
    engine = MaskEngine(net, optimizer, {})
    train(net, engine)
    backward(net, optimizer, 3)
    with torch.no_grad():
        net.a.weight.copy_(-net.a.weight.abs())
    engine.update(masks, zero={n: ~m for n, m in masks.items()})
    for step in range(3):
        engine.after_backward()
        optimizer.step()
        for name, mask in masks.items():
            assert not net.get_parameter(name).detach().view(torch.int32)[~mask].any(), "to the sign bit"
            assert net.get_parameter(name).detach()[mask].all()
        backward(net, optimizer, step)


# Saving at any moment.


def test_a_state_dict_taken_between_update_and_restore_is_made_exact():
    net, masks = Net(), masks_of(0.5)
    masks["b.bias"] = torch.zeros(20, dtype=torch.bool)
    optimizer = AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    taken: list[dict[str, Tensor]] = []
    live: list[dict[str, Tensor]] = []

    def signal(*_: object) -> None:
        state = {f"model.{k}": v for k, v in net.state_dict().items()}
        half = {k: v.to(torch.bfloat16) for k, v in net.state_dict().items()}
        live.append(weights(net))
        engine.correct(state, prefix="model.")
        engine.correct(half)
        taken.append(state)
        halves.append(half)
        assert all(torch.equal(a, b) for a, b in zip(live[-1].values(), weights(net).values(), strict=True))

    halves: list[dict[str, Tensor]] = []
    optimizer.register_step_post_hook(signal)
    engine, start = MaskEngine(net, optimizer, masks), weights(net)
    train(net, engine, steps=1)
    drifted = live[0]["a.weight"]
    assert not torch.equal(drifted[~masks["a.weight"]], start["a.weight"][~masks["a.weight"]]), (
        "the moment was mid-step"
    )
    state = taken[0]
    assert list(state) == [f"model.{k}" for k in net.state_dict()]
    for name, mask in masks.items():
        saved = state[f"model.{name}"]
        assert torch.equal(saved[~mask], start[name][~mask]), name
        assert torch.equal(saved[mask], live[0][name][mask]), name
        half = halves[0][name]
        assert half.dtype == torch.bfloat16
        assert torch.equal(half[~mask], start[name][~mask].to(torch.bfloat16)), name
        assert torch.equal(half[mask], live[0][name][mask].to(torch.bfloat16)), name
    assert torch.equal(state["model.tied.weight"], state["model.a.weight"]), "each name of a tied tensor"


def test_rewind_goes_back_where_entries_are_active():
    net, masks = Net(), masks_of(0.5)
    optimizer = Adam(net.parameters(), lr=0.01)
    engine, start = MaskEngine(net, optimizer, {}), weights(net)
    train(net, engine)
    now = weights(net)
    engine.update(masks)
    engine.rewind(start)
    for name, mask in masks.items():
        parameter = net.get_parameter(name)
        assert torch.equal(parameter.detach(), torch.where(mask, start[name], now[name]))
        assert not optimizer.state[parameter], "moments start afresh"
    assert torch.equal(net.fixed, now["fixed"])


# Leaving.


def hooks(net: nn.Module, optimizer: Optimizer) -> list[int]:
    modules = [len(getattr(m, n)) for m in net.modules() for n in vars(m) if "hooks" in n]
    return modules + [len(getattr(optimizer, n)) for n in vars(optimizer) if n.endswith("_hooks")]


def test_release_leaves_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    net[2].bias.requires_grad_(False)
    optimizer = AdamW(net.parameters())
    before, keys = hooks(net, optimizer), [sorted(vars(m)) for m in net.modules()]
    masks = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    masks["0.weight"] = draw((4, 4))
    masks["2.bias"][0] = True
    engine = MaskEngine(net, optimizer, masks)
    engine.set_rates({"0.weight": 0.5})
    assert hooks(net, optimizer) != before
    assert net[2].bias.requires_grad
    net(torch.randn(3, 4)).sum().backward()
    engine.after_backward()
    optimizer.step()
    for _ in range(2):  # once more does no harm
        engine.release()
        assert hooks(net, optimizer) == before
        assert [sorted(vars(m)) for m in net.modules()] == keys
        assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"2.bias"}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda n, o: MaskEngine(n, o, {"c.weight": torch.ones(2)}), "'c.weight', which is no parameter of Net"),
        (
            lambda n, o: MaskEngine(n, o, {"a.bias": torch.ones(3)}),
            r"a.bias: the mask has shape \(3,\), the parameter \(20,\)",
        ),
        (lambda n, o: MaskEngine(n, o, {"fixed": torch.ones(2)}), "fixed is to train, and no optimizer holds it"),
        (
            lambda n, o: MaskEngine(n, o, {"a.bias": torch.full((20,), 0.5)}),
            "a.bias: a mask must hold only zeros and ones",
        ),
        (lambda n, o: MaskEngine(n, o, {}, engine="fast"), "engine='fast' is unknown; there are auto, compact, dense"),
    ],
)
def test_what_cannot_be_held_is_refused_and_leaves_nothing(
    make: Callable[[nn.Module, Optimizer], MaskEngine], says: str
):
    net = Net()
    optimizer = SGD([p for n, p in net.named_parameters() if n != "fixed"])
    before = hooks(net, optimizer)
    with pytest.raises(ValueError, match=says):
        make(net, optimizer)
    assert hooks(net, optimizer) == before
    assert {n for n, p in net.named_parameters() if not p.requires_grad} == {"fixed"}


def test_a_sparse_gradient_of_a_partly_held_tensor_is_refused():
    net = nn.Embedding(6, 2, sparse=True)
    optimizer = SGD(net.parameters(), lr=0.1)
    engine = MaskEngine(net, optimizer, {"weight": draw((6, 2))})
    net(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"weight is held in part and has a sparse gradient"):
        engine.after_backward()


def test_summary():
    net, masks = Net(), masks_of(0.5)
    masks["b.bias"] = torch.zeros(20, dtype=torch.bool)
    engine = MaskEngine(net, SGD(net.parameters()), masks)
    rows = {row.name: row for row in engine.summary()}
    assert list(rows) == [n for n, _ in net.named_parameters()]
    n = int(masks["a.weight"].sum())
    assert vars(rows["a.weight"]) == {
        "name": "a.weight",
        "shape": (20, 20),
        "active": n,
        "density": n / 400,
        "held_by": "dense",
    }
    assert (rows["b.bias"].active, rows["b.bias"].held_by) == (0, "requires_grad")
    assert (rows["a.bias"].active, rows["a.bias"].held_by) == (20, "-")
    assert (rows["fixed"].active, rows["fixed"].held_by) == (0, "requires_grad")


def test_several_optimizers_over_one_tensor():
    net, mask = Net(), {"a.weight": draw((20, 20))}
    optimizers = [AdamW(net.parameters(), lr=0.01, weight_decay=0.1), SGD([net.a.weight], lr=0.1, weight_decay=0.1)]
    engine, start = MaskEngine(net, optimizers, mask), weights(net)
    for step in range(4):
        backward(net, optimizers[0], step)
        engine.after_backward()
        optimizers[step % 2].step()
        assert_held({"a.weight": start["a.weight"]}, net, mask)
