"""G8: the callbacks compose, in any order and number; an entry is active where every one of them lets it be."""

from itertools import permutations
from typing import Any

import pytest
import torch
from mask_nets import Net, Watch, changed, fit, moved, names, weights
from torch import nn

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport

WHICH = [n for n, p in Net().named_parameters() if p.ndim == 2]


def four() -> list[Any]:
    return [
        FreezeMask(["head", "blocks"]),
        FreezeMask("stem", score="random", density=0.8, scope=["blocks", "head"], seed=3),
        PruneMask(0.4, scope="blocks.*.lin.weight", start="2 steps", end="8 steps", every="2 steps"),
        PruneMask(0.25, scope=["head.weight", "blocks.1.lin.weight"], start="1 steps", schedule="constant"),
    ]


ORDERS = list(permutations(range(4)))[::5]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_an_entry_is_active_where_all_let_it_be(order: tuple[int, ...], norm: str) -> None:
    callbacks = four()
    net = Net(norm, dropout=0.1)
    before = weights(net)
    torch.manual_seed(0)
    fit(net, *(callbacks[i] for i in order))
    both = callbacks[0].masks & callbacks[1].masks
    alive = {n: torch.ones_like(p, dtype=torch.bool) for n, p in net.named_parameters()}
    for pruner in callbacks[2:]:
        for name, mask in pruner.masks.items():
            alive[name] = alive[name] & mask
    for name, p in net.named_parameters():
        pruned = ~alive[name]
        held = ~both[name] & ~pruned
        assert torch.equal(p[held].view(torch.int32), before[name][held].view(torch.int32)), name
        assert torch.equal(p[pruned].view(torch.int32), torch.zeros_like(p[pruned]).view(torch.int32)), name
        free = both[name] & alive[name]
        if name.startswith(("blocks", "head")) and bool(free.any()) and p.ndim == 2:
            assert bool((p[free] != before[name][free]).any()), f"{name} was to train and did not"


def test_every_order_gives_the_same_weights() -> None:
    ends = []
    for order in ORDERS:
        net = Net()
        callbacks = four()
        fit(net, *(callbacks[i] for i in order))
        ends.append(weights(net))
    for end in ends[1:]:
        assert not changed(ends[0], end)


def test_a_selecting_phase_replaces_the_freeze_masks_and_one_that_names_none_leaves_them_in_force() -> None:
    for first in (True, False):
        net, watch = Net(), Watch()
        freeze = FreezeMask("stem")
        phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase("6 steps"), Phase(train="blocks.1")])
        callbacks = [freeze, phases] if first else [phases, freeze]
        fit(net, *callbacks, watch)
        for step in range(16):
            wanted = "head" if step < 3 else "stem" if step < 6 else "blocks.1"
            assert watch.moved_at(step) == names(net, wanted), step
        assert freeze.masks["stem.weight"].all()  # its own mask is its own whatever is in force
        assert not freeze.masks["head.weight"].any()


def test_prune_mask_is_in_force_in_every_phase_and_no_phase_revives_what_is_pruned() -> None:
    net, watch = Net(), Watch()
    prune = PruneMask(0.6, scope="blocks.*.lin.weight", start="0%", end="4 steps", every="1 steps")
    phases = PhaseUnfreeze(
        [Phase("6 steps"), Phase("9 steps", train="head"), Phase("12 steps", train=["blocks.*.lin.weight"]), Phase()]
    )
    fit(net, phases, prune, watch)
    name = "blocks.0.lin.weight"
    zero = ~prune.masks[name]
    for step in range(5, 17):
        assert torch.equal(watch.weights[step][name][zero], torch.zeros(int(zero.sum()))), step
    total = sum(int((watch.weights[-1][f"blocks.{i}.lin.weight"] == 0).sum()) for i in (0, 1))
    assert total == int(0.6 * 288 + 0.5)
    assert watch.moved_at(7) == names(net, "head")  # zeros do not move either
    assert watch.moved_at(10) == {"blocks.0.lin.weight", "blocks.1.lin.weight"}


def test_a_held_entry_that_is_not_zero_is_never_pruned() -> None:
    net = Net()
    before = weights(net)
    freeze = FreezeMask(score="random", density=0.7, scope="blocks.*.lin.weight", seed=1)
    prune = PruneMask(0.5, scope="blocks.*.lin.weight", start="0%", schedule="constant")
    fit(net, prune, freeze)
    zeros = 0
    for i in (0, 1):
        name = f"blocks.{i}.lin.weight"
        held = ~freeze.masks[name]
        assert torch.equal(net.get_parameter(name)[held], before[name][held])
        assert not bool((held & ~prune.masks[name]).any())
        zeros += int((net.get_parameter(name) == 0).sum())
    assert zeros == 144


@pytest.mark.parametrize("count", [3, 5])
def test_any_number_of_freeze_masks(count: int) -> None:
    net = Net()
    before = weights(net)
    freezers = [FreezeMask(score="random", density=0.8, seed=s) for s in range(count)]
    fit(net, *freezers)
    masks = freezers[0].masks
    for freezer in freezers[1:]:
        masks = masks & freezer.masks
    where = moved(before, weights(net))
    for name, mask in masks.items():
        assert not bool((where[name] & ~mask).any())
    assert 0.2 < masks.density() < 0.8


@pytest.mark.parametrize("kind", ["freeze", "prune", "phases"])
def test_a_mask_of_ones_changes_nothing(kind: str) -> None:
    """Every entry active: bit-equal to no callback at all."""
    plain, ours = Net(dropout=0.2), Net(dropout=0.2)
    callback = {
        "freeze": lambda: FreezeMask("*"),
        "prune": lambda: PruneMask(0.0),
        "phases": lambda: PhaseUnfreeze([Phase("4 steps", train="*"), Phase(train="*")]),
    }[kind]()
    torch.manual_seed(1)
    fit(plain)
    torch.manual_seed(1)
    fit(ours, callback)
    assert not changed(weights(plain), weights(ours))


def test_the_model_is_left_alone_afterwards() -> None:
    net = Net("batch", dropout=0.1)
    net.stem.bias.requires_grad_(False)
    keys, classes = list(net.state_dict()), [type(m) for m in net.modules()]
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}
    callbacks = [
        FreezeMask("head", score="magnitude", density=0.3),
        PruneMask(0.5, scope="head.weight", start="1 steps", schedule="constant"),
        PhaseUnfreeze([Phase("3 steps", train="head", lr_scale=0.5), Phase("6 steps"), Phase(train="blocks.1")]),
    ]
    run = fit(net, *callbacks)
    assert list(net.state_dict()) == keys
    assert [type(m) for m in net.modules()] == classes
    for name, module in net.named_modules():
        extra = set(vars(module)) - attributes[name] - {"_trainer", "_log_hyperparams"}
        assert not {a for a in extra if "mask" in a}
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for p in net.parameters():
        assert not p._backward_hooks
    optimizer = run.optimizers[0]
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["stem.bias"]
    assert all(m.training for m in net.modules() if isinstance(m, nn.BatchNorm1d))


def test_batch_norm_statistics_of_held_modules_stand_still_and_come_alive_with_their_phase() -> None:
    class Stats(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            seen.append([b.norm.running_mean.clone() for b in pl_module.blocks])

    seen: list[list[torch.Tensor]] = []
    net = Net("batch")
    start = [b.norm.running_mean.clone() for b in net.blocks]
    fit(
        net,
        PhaseUnfreeze([Phase("4 steps", train="head"), Phase("8 steps", train=["blocks.1", "head"]), Phase()]),
        Stats(),
    )
    for step, (first, second) in enumerate(seen):
        assert torch.equal(first, start[0]) == (step < 8), step
        assert torch.equal(second, start[1]) == (step < 4), step


def test_masks_may_be_given_as_a_set_and_as_a_file(tmp_path: Any) -> None:
    net = Net()
    generator = torch.Generator().manual_seed(4)
    given = MaskSet({n: torch.rand(p.shape, generator=generator) < 0.3 for n, p in net.named_parameters()})
    given.save(tmp_path / "m.safetensors")
    ends = []
    for mask in (given, str(tmp_path / "m.safetensors"), tmp_path / "m.safetensors"):
        net, before = Net(), weights(Net())
        freeze = FreezeMask(mask=mask)
        fit(net, freeze)
        assert freeze.masks == given
        where = moved(before, weights(net))
        assert not any(bool((where[n] & ~given[n]).any()) for n in where)
        ends.append(weights(net))
        phased = Net()
        phases = PhaseUnfreeze([Phase("3 steps", mask=mask), Phase("5 steps", train="head"), Phase(mask=mask)])
        fit(phased, phases)
        assert phases.masks == given
    assert not changed(ends[0], ends[1])
    assert not changed(ends[0], ends[2])


def test_summary_and_report_say_what_is_held() -> None:
    freeze = FreezeMask("head", score="magnitude", density=0.25, scope="blocks.0.lin.weight")
    report = RunReport()
    rows: list[list[dict[str, Any]]] = []

    class Look(Watch):
        def on_train_batch_end(self, *_: Any) -> None:
            rows.append(freeze.summary())

    net = Net()
    fit(net, freeze, report, Look())
    by_name = {row["name"]: row for row in rows[-1]}
    assert list(by_name) == [n for n, _ in net.named_parameters()]
    assert by_name["blocks.0.lin.weight"] == {
        "name": "blocks.0.lin.weight",
        "shape": (12, 12),
        "active": 36,
        "density": 0.25,
        "held by": "compact",
    }
    assert (by_name["head.weight"]["held by"], by_name["head.weight"]["density"]) == ("-", 1.0)
    assert (by_name["stem.weight"]["held by"], by_name["stem.weight"]["active"]) == ("requires_grad", 0)
    facts = report.results()
    total = sum(p.numel() for p in net.parameters())
    assert facts["total"] == total
    assert facts["active"] == 36 + 26
    assert facts["held_checked"] == total - 62
    assert facts["held_changed"] == 0
    assert facts["steps"] == 16


def test_a_criterion_of_the_user_finds_the_weights_from_the_start_in_a_mask_in_a_phase_and_in_a_ramp() -> None:
    seen: list[float] = []

    def farthest(params: Any, context: Any) -> Any:
        scores = {name: (p - context.reference[name]).abs() for name, p in params.items()}
        seen.append(max(float(score.max()) for score in scores.values()))
        return scores

    with pytest.warns(
        UserWarning, match="'farthest' scored every entry 0"
    ):  # chosen at the start, when nothing has moved
        fit(Net(), FreezeMask("head", score=farthest, density=0.5))
    assert seen == [0.0]
    fit(Net(), PhaseUnfreeze([Phase("2 steps", train="*"), Phase(score=farthest, density=0.5)]))
    assert seen[1] > 0
    fit(Net(), PruneMask(0.5, score=farthest, start="2 steps", schedule="constant", scope="*weight"))
    assert seen[2] > 0


def test_n_of_m_lies_along_the_inputs_of_transformers_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    net = Net()
    linear = net.blocks[0].lin
    net.blocks[0].lin = Conv1D(12, 12)
    net.blocks[0].lin.weight.data.copy_(linear.weight.T)
    net.blocks[0].lin.bias.data.copy_(linear.bias)
    other = Net()
    for module in (net, other):
        fit(module, PruneMask("2:4", scope="blocks.*.lin.weight", start="0 steps"), max_steps=1)
    assert torch.equal(net.blocks[0].lin.weight.T == 0, other.blocks[0].lin.weight == 0)
    assert bool(((other.blocks[0].lin.weight == 0).view(12, 3, 4).sum(2) == 2).all())
