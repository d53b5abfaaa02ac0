"""Strategies that act while training goes on, against loops written by hand: the lottery ticket of LT-SFT,
Child-Tuning-F, LISA."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from mask_nets import Net, Watch, changed, fit, loader, names, weights
from torch import Tensor

from lightning_mask import FreezeMask, GradientMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport
from lightning_mask.core import MaskEngine
from lightning_mask.core.gradient_mask import mask_gradients

LINEAR = ["type:Linear", "!*.bias", "!head"]
SIZES = {"stem.weight": 96, "blocks.0.lin.weight": 144, "blocks.1.lin.weight": 144}


def endless() -> Iterator[Any]:
    while True:
        yield from loader()


def adamw(net: Net, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.1)


def step(net: Net, optimizer: torch.optim.Optimizer, batch: Any, masks: dict[str, Tensor] | None = None) -> None:
    """One step as plain PyTorch takes it; with masks, held gradients are zero and held values put back after it."""
    optimizer.zero_grad()
    net.loss(batch).backward()
    before = weights(net)
    for name, p in net.named_parameters():
        if masks and p.grad is not None:
            p.grad.masked_fill_(~masks[name], 0)
    optimizer.step()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if masks:
                p.copy_(torch.where(masks[name], p, before[name]))


def largest(change: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    flat = torch.cat([change[name].flatten() for name in SIZES])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:k]] = True
    parts = chosen.split(list(SIZES.values()))
    return {name: part.view(change[name].shape) for name, part in zip(SIZES, parts, strict=True)}


def lottery(k: int = 40, **second: Any) -> PhaseUnfreeze:
    chosen = Phase(train="head", score="change", density=k, scope=LINEAR, restart=True, **second)
    return PhaseUnfreeze([Phase("8 steps"), chosen])


@pytest.mark.parametrize("engine", ["compact", "dense"])
@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_lottery_is_dense_training_then_the_largest_changes_alone_from_the_first_weights(
    engine: str, norm: str
) -> None:
    plain, batches = Net(norm).train(), endless()
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    dense = adamw(plain)
    for _ in range(8):
        step(plain, dense, next(batches))
    change = {name: (plain.get_parameter(name) - start[name]).detach().abs() for name in SIZES}
    masks = {
        name: torch.full_like(p, name in names(plain, "head"), dtype=torch.bool) for name, p in weights(plain).items()
    }
    masks |= largest(change, 40)
    plain.load_state_dict(start)
    for block in plain.blocks:
        block.norm.eval()  # held whole: its statistics do not move
    again = adamw(plain, lr=0.01)
    for _ in range(8):
        step(plain, again, next(batches), masks)

    net, report = Net(norm), RunReport()
    phases = lottery(lr_scale=0.5, engine=engine)
    fit(net, phases, report)
    assert all(torch.equal(phases.masks[name], mask) for name, mask in masks.items())
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    now = weights(net)
    assert not any(bool(((now[name] != start[name]) & ~mask).any()) for name, mask in masks.items())
    assert report.results()["held_changed"] == 0
    assert report.results()["held_checked"] > 300


def test_lottery_goes_back_to_the_start_from_the_best_weights_of_the_phase_before() -> None:
    """The mask is chosen from the best weights, not from the last."""
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    until = {"monitor": "val/score", "patience": 2}
    ended = PhaseUnfreeze([Phase(until, restore_best=True), Phase(score="change", density=40, scope=LINEAR)])
    again = PhaseUnfreeze(
        [Phase(until, restore_best=True), Phase(score="change", density=40, scope=LINEAR, restart=True)]
    )
    seen = []
    for phases in (ended, again):
        net, watch = Net(value=lambda epoch: scores[epoch]), Watch()
        fit(net, phases, watch, val=True, max_epochs=6, limit_train_batches=2)
        seen.append(watch.weights)
        assert [entry["step"] for entry in phases.history] == [0, 8]
    best = {name: (seen[0][4][name] - seen[0][0][name]).abs() for name in SIZES}
    for name, mask in largest(best, 40).items():
        assert torch.equal(ended.masks[name], mask)
        assert torch.equal(again.masks[name], mask)
    for name, value in seen[1][9].items():
        assert torch.equal(value[~again.masks[name]], seen[1][0][name][~again.masks[name]])


def test_restarting_revives_nothing_that_is_pruned() -> None:
    net, watch = Net(), Watch()
    start = weights(net)
    prune = PruneMask(0.5, scope="blocks.*.lin.weight", start="2 steps", end="6 steps", every="2 steps")
    phases = lottery(k=60)
    fit(net, prune, phases, watch)
    for done in range(7, 17):
        zeros = sum(int((watch.weights[done][f"blocks.{i}.lin.weight"] == 0).sum()) for i in (0, 1))
        assert zeros == 144, done
    for name, mask in prune.masks.items():
        assert not bool((phases.masks[name] & ~mask).any())  # the largest change of all is to be pruned
        held = mask & ~phases.masks[name]
        assert bool((net.get_parameter(name)[~mask].view(torch.int32) == 0).all())
        assert torch.equal(net.get_parameter(name)[held], start[name][held])


@pytest.mark.parametrize("make", ["SGD", "Adagrad", "RMSprop", "NAdam", "LBFGS"])
def test_moments_of_every_optimizer_start_afresh(make: str) -> None:
    """A restarted phase that trains everything is the first phase again, on the batches that follow."""
    made = {
        "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=True),
        "Adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.05, initial_accumulator_value=0.1),
        "RMSprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01, momentum=0.5),
        "NAdam": lambda net: torch.optim.NAdam(net.parameters(), lr=0.01),
        "LBFGS": lambda net: torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3),
    }[make]
    watch = Watch()
    phases = PhaseUnfreeze(
        [Phase("3 steps"), Phase("8 steps", train="*", lr_scale=0.5), Phase(train="*", restart=True)]
    )
    fit(Net(make=made), phases, watch)  # the second epoch has the batches of the first
    for i in range(1, 4):
        assert not changed(watch.weights[i], watch.weights[8 + i]), i


def test_statistics_that_weight_averaging_guards_go_back_too() -> None:
    """Trained in the first phase, held in the second, held again after the restart: at the value of the start."""
    net = Net("batch")
    start = {name: value.clone() for name, value in net.state_dict().items()}
    phases = PhaseUnfreeze([Phase("4 steps"), Phase("6 steps", train="head"), Phase(train="head", restart=True)])
    fit(net, EMAWeightAveraging(decay=0.5), phases)
    for name, value in net.state_dict().items():
        assert name.startswith("head") != torch.equal(value, start[name]), name


def test_the_schedule_as_yaml_and_a_run_that_goes_on_restart_too(tmp_path: Path) -> None:
    from lightning_mask.callbacks.phase import write_phases

    given = lottery(lr_scale=0.5, warmup="2 steps")
    write_phases(given.phases, tmp_path / "lottery.yaml")
    read = PhaseUnfreeze(tmp_path / "lottery.yaml")
    assert [phase.restart for phase in read.phases] == [False, True]
    whole = Net("batch")
    fit(whole, read, max_epochs=3)
    first = Net("batch")
    fit(first, lottery(lr_scale=0.5, warmup="2 steps"), max_epochs=1).save_checkpoint("first.ckpt")
    net = Net("batch")
    fit(net, lottery(lr_scale=0.5, warmup="2 steps"), max_epochs=3, ckpt="first.ckpt")
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_first_weights_are_in_checkpoints_for_as_long_as_they_are_needed() -> None:
    ticket = {"score": "change", "density": 40, "scope": LINEAR}
    wanted = {
        "lottery": (lottery(), [True, False]),
        "drawn anew": (PhaseUnfreeze([Phase("8 steps"), Phase(**ticket, refresh="2 steps")]), [True, True]),
        "neither": (PhaseUnfreeze([Phase("8 steps", **ticket), Phase(train="head")]), [False, False]),
        "freeze": (FreezeMask(**ticket), [False, False]),
        "freeze, drawn anew": (FreezeMask(**ticket, refresh="4 steps"), [True, True]),
        "prune": (PruneMask(0.5, score="change", scope=LINEAR), [True, True]),
    }
    for name, (callback, kept) in wanted.items():
        seen: list[bool] = []

        class Look(pl.Callback):
            def on_train_batch_end(self, *_: Any, callback: Any = callback, seen: list[bool] = seen) -> None:
                seen.append("reference" in callback.state_dict()["shared"])

        fit(Net(), callback, Look())
        assert [seen[7], seen[9]] == kept, name


def test_what_cannot_restart_is_refused() -> None:
    with pytest.raises(ValueError, match="phase 0 begins with training itself; leave its restart out"):
        PhaseUnfreeze([Phase("4 steps", train="head", restart=True), Phase()])
    fit(Net(), PhaseUnfreeze([Phase("12 steps"), Phase(train="head")]), max_epochs=1).save_checkpoint("plain.ckpt")
    edited = PhaseUnfreeze([Phase("12 steps"), Phase(train="head", restart=True, name="again")])
    with pytest.raises(ValueError, match=r"again has restart=True, and the checkpoint .* leave restart out, or start"):
        fit(Net(), edited, max_epochs=2, ckpt="plain.ckpt")
    late = PhaseUnfreeze([Phase("12 steps"), Phase(score="change", density=10, scope=LINEAR)])
    with pytest.raises(ValueError, match="needs the weights from the start of training, and none were kept"):
        fit(Net(), late, max_epochs=2, ckpt="plain.ckpt")


def test_freeze_masks_stay_in_force_when_a_phase_without_a_selection_restarts() -> None:
    net = Net()
    start = weights(net)
    freeze = FreezeMask("head", score="random", density=30, scope=LINEAR)
    phases = PhaseUnfreeze([Phase("8 steps", train="*"), Phase(restart=True)])
    fit(net, freeze, phases)
    for name, mask in freeze.masks.items():
        assert torch.equal(net.get_parameter(name)[~mask], start[name][~mask]), name
    assert changed(start, weights(net)) > names(net, "head")


def test_the_ticket_of_rows_has_the_gradients_of_these_rows_alone() -> None:
    net = Net()
    net.head = torch.nn.Sequential(torch.nn.Linear(12, 400), torch.nn.Linear(400, 2))
    ticket = Phase(score="change", density=600, structure="row", scope="head.0.weight", restart=True)
    phases = PhaseUnfreeze([Phase("2 steps"), ticket])
    held: dict[str, str] = {}

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            held.update({row["name"]: row["held by"] for row in phases.summary()})

    fit(net, phases, Look(), max_steps=4)
    assert held["head.0.weight"] == "rows"


class Spy(pl.Callback):
    """The gradients that the optimizer is about to take; stands behind the mask callbacks."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.seen.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_that_count_are_drawn_anew_each_step_and_the_optimizer_goes_on(accumulate: int) -> None:
    """Child-Tuning-F with AdamW: ``g * m / p``; moments and weight decay move the others too."""
    net, spy, p = Net(), Spy(), 0.3
    fit(net, GradientMask(p, seed=3), spy, accumulate_grad_batches=accumulate)
    assert len(spy.seen) == 16 // accumulate
    plain, batches = Net(), endless()
    optimizer = adamw(plain)
    for seen in spy.seen:
        optimizer.zero_grad()
        for _ in range(accumulate):
            (plain.loss(next(batches)) / accumulate).backward()
        for name, tensor in plain.named_parameters():
            counts = seen[name] != 0
            tensor.grad = torch.where(counts, tensor.grad, 0) / p  # type: ignore[arg-type]
            assert torch.equal(tensor.grad, seen[name]), name
        optimizer.step()
    assert not changed(weights(plain), weights(net))

    draws = torch.stack([torch.cat([g.flatten() for g in seen.values()]) != 0 for seen in spy.seen]).float()
    full = draws.any(0)  # some units of the network are dead
    draws = draws[:, full]
    assert abs(float(draws.mean()) - p) < 4 * (p * (1 - p) / draws.numel()) ** 0.5
    later = (draws[1:] * draws[:-1]).mean()  # of two steps
    assert abs(float(later) - p * p) < 4 * (p * p / draws[1:].numel()) ** 0.5
    one, other = (torch.stack([seen[f"blocks.{i}.lin.weight"] != 0 for seen in spy.seen]) for i in (0, 1))
    assert not torch.equal(one, other)  # of two tensors of one shape


def test_gradients_of_held_and_pruned_entries_stay_out_of_it_however_they_are_held() -> None:
    ends: list[dict[str, Tensor]] = []
    for engine in ("compact", "dense"):
        net = Net()
        start = weights(net)
        freeze = FreezeMask("head", score="random", density=0.3, scope=["stem", "blocks"], engine=engine)
        prune = PruneMask(0.2, scope="blocks.1.lin.weight", start="3 steps", end="9 steps", every="2 steps")
        clip = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"}
        fit(net, GradientMask(0.5, scope=["*", "!head"]), freeze, prune, **clip)
        now = weights(net)
        for name, mask in freeze.masks.items():
            alive = prune.masks.get(name, torch.ones_like(mask))
            assert torch.equal(now[name][~mask & alive], start[name][~mask & alive]), name
            assert bool((now[name][~alive].view(torch.int32) == 0).all())
        ends.append(now)
    assert not changed(*ends)
    plain = Net()
    fit(plain, FreezeMask("head", score="random", density=0.3, scope=["stem", "blocks"]))
    assert changed(ends[0], weights(plain)) > names(plain, "head")


def test_tensors_out_of_scope_keep_their_whole_gradients_also_in_manual_optimization() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer = self.optimizers()
            optimizer.zero_grad()  # type: ignore[union-attr]
            for _ in range(2):  # two backward passes a step
                self.manual_backward(self.loss(batch))
            optimizer.step()  # type: ignore[union-attr]
            return self.loss(batch)

    spy, twice = Spy(), Spy()
    fit(Manual(), GradientMask(0.5, scope="blocks"), spy, max_steps=4)
    fit(Manual(), twice, max_steps=4)
    for name, gradient in spy.seen[0].items():
        whole = twice.seen[0][name]
        if name.startswith("blocks"):
            counts = gradient != 0
            assert torch.equal(gradient, torch.where(counts, whole, 0) / 0.5), name
        else:
            assert torch.equal(gradient, whole), name
    assert 0.35 < float((spy.seen[0]["blocks.0.norm.bias"] != 0).float().mean()) < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_overflow_in_a_gradient_that_does_not_count_reaches_nothing(dtype: torch.dtype) -> None:
    """In every layout and precision."""
    model = torch.nn.Linear(500, 100, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = MaskEngine(model, optimizer, MaskSet({}))
    ends = []
    for gradient in (torch.full((100, 500), torch.inf), torch.full((500, 100), torch.inf).t()):
        model.weight.grad, model.bias.grad = gradient.to(dtype), torch.ones(100, dtype=dtype)
        mask_gradients(engine, optimizer, {"weight"}, 0.25, seed=0)
        values, counts = model.weight.grad.unique(return_counts=True)
        assert values.tolist() == [0.0, torch.inf]
        assert abs(int(counts[1]) - 12500) < 4 * (50000 * 0.25 * 0.75) ** 0.5
        assert bool((model.bias.grad == 1).all())
        ends.append(model.weight.grad.clone())
    assert torch.equal(*ends)
    model.bias.grad = torch.ones(100, dtype=dtype).to_sparse()
    with pytest.raises(ValueError, match="GradientMask: bias has a sparse gradient; make its layer with sparse=False"):
        mask_gradients(engine, optimizer, {"bias"}, 0.25, seed=0)


@pytest.mark.parametrize("density", [0, 0.0, 1.5, "0.3", True])
def test_a_gradient_mask_takes_a_probability(density: Any) -> None:
    with pytest.raises(ValueError, match=r"GradientMask: density=.* must be a probability in"):
        GradientMask(density)
    with pytest.raises(ValueError, match=r"GradientMask: scope.*'boddy' matches no parameter"):
        fit(Net(), GradientMask(0.3, scope="boddy"), max_steps=1)


def test_lisa_draws_its_blocks_anew_and_drops_the_moments_of_what_it_holds() -> None:
    net, watch = Net(), Watch()
    lisa = FreezeMask("head", score="random", density=0.5, scope="layers:0:", structure="layer", refresh="2 steps")
    states: list[dict[str, float]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            state = trainer.optimizers[0].state
            states.append({n: float(state[p]["step"]) for n, p in pl_module.named_parameters() if p in state})

    fit(net, lisa, watch, Look(), max_steps=24)
    drawn = []
    for i in range(0, 24, 2):
        blocks = {name.split(".")[1] for name in watch.moved_at(i) if name.startswith("blocks")}
        assert len(blocks) == 1, i
        assert watch.moved_at(i) == watch.moved_at(i + 1) == names(net, "head", f"blocks.{next(iter(blocks))}."), i
        drawn += blocks
        since = next(n for n, block in enumerate([*drawn[::-1], None]) if block != drawn[-1])  # how often in a row
        for step, ages in ((i, states[i]), (i + 1, states[i + 1])):
            assert set(ages) == watch.moved_at(i), step
            assert {ages[n] for n in ages if n.startswith("blocks")} == {2.0 * (since - 1) + 1 + step % 2}, step
            assert ages["head.weight"] == step + 1
    assert set(drawn) == {"0", "1"}
    assert any(a == b for a, b in pairwise(drawn))


def test_a_gradient_mask_draws_for_an_entry_what_it_draws_however_the_entry_is_held() -> None:
    """Also where the compact tensor is filled up to whole vectors, as 143 entries are."""
    ends = []
    for way in ("compact", "dense"):
        torch.manual_seed(0)
        model = torch.nn.Linear(13, 11, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        mask = torch.rand(11, 13) < 0.3
        engine = MaskEngine(model, optimizer, MaskSet({"weight": mask}), engine=way)
        assert engine.summary()[0].held_by == way
        for i in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 13)).square().mean().backward()
            engine.after_backward()
            mask_gradients(engine, optimizer, {"weight"}, 0.5, seed=i)
            optimizer.step()
        ends.append(model.weight.detach().clone())
    assert torch.equal(*ends)
