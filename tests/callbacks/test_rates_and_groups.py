"""The user's optimizer, groups and schedulers are undisturbed; a phase's rate is a factor on its tensors."""

from typing import Any

import pytest
import torch
from mask_nets import Net, Watch, changed, fit, loader, names, trainer, weights
from torch import optim
from torch.optim import lr_scheduler as sched

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask


def phases(**arguments: Any) -> PhaseUnfreeze:
    return PhaseUnfreeze(
        [
            Phase("3 steps", train="head"),
            Phase("7 steps", train=["head", "blocks.1"], lr_scale={"head": 0.25, "blocks": 4.0}, warmup="2 steps"),
            Phase("1 epochs", train="*", lr_scale=0.5),
            Phase(train="blocks"),
        ]
    )


def two_groups(module: Any) -> list[dict[str, Any]]:
    """As users write it: no decay on vectors, only what requires a gradient."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": 0.1, "lr": 0.02},
        {"params": [p for p in trainable if p.ndim == 1], "weight_decay": 0.0, "lr": 0.01},
    ]


def step_wise(make: Any) -> Any:
    def configure(module: Any) -> Any:
        optimizer = optim.AdamW(two_groups(module))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}

    return configure


def plateau(module: Any) -> Any:
    optimizer = optim.AdamW(two_groups(module))
    scheduler = sched.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "monitor": "train/loss_step", "interval": "step", "strict": False},
    }


SCHEDULERS = {
    "OneCycleLR": step_wise(lambda o: sched.OneCycleLR(o, max_lr=[0.1, 0.05], total_steps=20)),
    "LambdaLR": step_wise(lambda o: sched.LambdaLR(o, [lambda s: 1 / (s + 1), lambda s: 0.9**s])),
    "CosineAnnealingLR": step_wise(lambda o: sched.CosineAnnealingLR(o, T_max=16)),
    "SequentialLR": step_wise(
        lambda o: sched.SequentialLR(o, [sched.LinearLR(o, 0.1, total_iters=4), sched.StepLR(o, 3, 0.5)], [4])
    ),
    "CyclicLR": step_wise(lambda o: sched.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=False)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_the_same_rates_as_without_us(name: str) -> None:
    series, groups = [], []
    for callbacks in (
        [],
        [phases(), PruneMask(0.5, scope="blocks.*.lin.weight", start="12 steps", end="14 steps", every="1 steps")],
    ):
        watch = Watch()
        run = fit(Net(make=SCHEDULERS[name]), *callbacks, watch)
        rates = [g["lr"] for g in run.optimizers[0].param_groups]
        momentum = [g["betas"] for g in run.optimizers[0].param_groups]
        series.append((watch.rates, rates, momentum))
        assert all(g == watch.groups[0] for g in watch.groups)
        groups.append([len(g["params"]) for g in run.optimizers[0].param_groups])
    assert len(series[0][0]) == 16
    assert series[0] == series[1]
    assert groups == [[4, 8]] * 2 == groups


def test_reduce_on_plateau_keeps_working_through_phases() -> None:
    """Its rates depend on the loss, so they are compared with a scheduler of its own fed the same losses."""
    watch, losses = Watch(), []

    class Losses(Watch):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss_step"]))

    run = fit(Net(make=plateau), phases(), watch, Losses())
    twin = optim.SGD([{"params": [torch.zeros(1)], "lr": lr} for lr in (0.02, 0.01)])
    scheduler, wanted = sched.ReduceLROnPlateau(twin, factor=0.5, patience=0), []
    for loss in losses:
        wanted.append([g["lr"] for g in twin.param_groups])
        scheduler.step(loss)
    assert watch.rates == wanted
    assert wanted[0] != wanted[-1]
    assert run.lr_scheduler_configs[0].scheduler.optimizer is run.optimizers[0]


@pytest.mark.parametrize("kind", ["number", "dict"])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW", "AdamW foreach", "RMSprop"])
def test_a_phase_rate_is_what_real_param_groups_of_that_rate_give(kind: str, optimizer: str) -> None:
    def build(params: Any) -> Any:
        if optimizer == "SGD":
            return optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.05, nesterov=True)
        if optimizer == "RMSprop":
            return optim.RMSprop(params, lr=0.01, momentum=0.9, centered=True)
        return optim.AdamW(params, lr=0.02, weight_decay=0.1, foreach="foreach" in optimizer)

    base = {"SGD": 0.1, "RMSprop": 0.01}.get(optimizer, 0.02)
    scale: Any = 0.3 if kind == "number" else {"head.bias": 0.25, "head": 2.0, "blocks.1": 0.5}

    def factor(name: str) -> float:
        if kind == "number":
            return 0.3
        return 0.25 if name == "head.bias" else 2.0 if name.startswith("head") else 0.5 if "blocks.1" in name else 1.0

    ours, reference = Net(make=lambda m: build(m.parameters())), Net()
    groups = [{"params": [p], "lr": base * factor(n)} for n, p in reference.named_parameters()]
    reference.make = lambda m: build(groups)
    fit(ours, PhaseUnfreeze([Phase(train="*", lr_scale=scale)]))
    fit(reference)
    assert not changed(weights(ours), weights(reference))


def test_warm_up_rises_linearly_from_the_start_of_its_phase() -> None:
    """SGD without momentum: a step is exactly lr * factor * gradient."""
    moves: list[float] = []

    class Line(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.head.bias.sum() + 0 * self.stem.bias.sum()

    watch = Watch()
    net = Line(make=lambda m: optim.SGD(m.parameters(), lr=1.0))
    with torch.no_grad():
        net.head.bias.zero_()
    two = [
        Phase("2 steps", train=["head", "stem"]),
        Phase(train=["head", "stem"], lr_scale=0.5, warmup="4 steps"),
    ]
    fit(net, PhaseUnfreeze(two), watch, max_steps=8)
    for before, after in zip(watch.weights, watch.weights[1:], strict=False):
        moves.append(float(before["head.bias"][0] - after["head.bias"][0]))
    assert moves == [1.0, 1.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_a_filter_by_requires_grad_in_configure_optimizers_sees_every_tensor() -> None:
    net, held = Net(make=lambda m: optim.AdamW(two_groups(m))), []

    class Look(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            held.append(sum(len(g["params"]) for g in trainer.optimizers[0].param_groups))

    watch = Watch()
    fit(net, phases(), FreezeMask("head"), Look(), watch)
    assert set(held) == {12}
    assert watch.moved_at(2) == names(net, "head")
    assert watch.moved_at(9) == names(net, "blocks")
    assert watch.moved_at(7) == names(net, "")


def test_the_decay_of_each_group_stays_its_own() -> None:
    """Zero gradient everywhere: only the decay of the matrices' group moves anything, and only what trains."""

    class Still(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 0 * self.loss(batch)

    net, watch = Still(make=lambda m: optim.SGD(two_groups(m))), Watch()
    fit(net, PhaseUnfreeze([Phase("4 steps", train="head"), Phase(train=["stem", "head"], lr_scale=0.5)]), watch)
    assert [watch.moved_at(i) for i in (0, 4)] == [{"head.weight"}, {"head.weight", "stem.weight"}]
    after, before = watch.weights[5]["head.weight"], watch.weights[4]["head.weight"]
    torch.testing.assert_close(after, before * (1 - 0.02 * 0.5 * 0.1), rtol=1e-6, atol=0)


def test_the_rate_stays_in_force_when_something_saves_a_checkpoint_inside_the_step(tmp_path: Any) -> None:
    """A callback that saves after backward does so inside ``optimizer.step``, before the update."""

    class Save(Watch):
        def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    plain, saving = Net(), Net()
    for net, extra in ((plain, []), (saving, [Save()])):
        fit(net, PhaseUnfreeze([Phase(train="*", lr_scale={"head": 0.1})]), *extra, max_steps=4)
    assert not changed(weights(plain), weights(saving))
    saved = torch.load(tmp_path / "inside.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
    assert [len(g["params"]) for g in saved] == [12]
    assert saved[0]["lr"] == 0.02


def test_the_training_step_sees_the_users_own_groups() -> None:
    """A rate set or read in ``training_step`` is that of the user's groups, phases or not."""
    seen: list[Any] = []

    class Sets(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            groups = self.optimizers().param_groups
            for group in groups:
                group["lr"] = 0.01 * (1 + self.global_step)
            seen.append([(len(g["params"]), g["lr"]) for g in groups])
            return super().training_step(batch, batch_idx)

    ours = Sets()
    run = fit(ours, PhaseUnfreeze([Phase(train="*", lr_scale={"head": 0.1})]), max_steps=4)
    assert seen == [[(12, 0.01 * (1 + s))] for s in range(4)]
    assert run.optimizers[0].param_groups[0]["lr"] == 0.04
    reference = Net()
    optimizer = optim.AdamW(
        [{"params": [p], "f": 0.1 if n.startswith("head") else 1.0} for n, p in reference.named_parameters()],
        weight_decay=0.1,
    )
    for step, batch in zip(range(4), loader(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + step) * group["f"]
        optimizer.zero_grad()
        reference.loss(batch).backward()
        optimizer.step()
    assert not changed(weights(ours), weights(reference))


def test_two_optimizers_by_hand_keep_their_groups_and_phases() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            for optimizer in (first, second):
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            first.step()
            second.step()

        def configure_optimizers(self) -> Any:
            body = [p for n, p in self.named_parameters() if not n.startswith("head")]
            return optim.AdamW(body, lr=0.02), optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)

    net, watch = Manual(), Watch()
    run = trainer(
        PhaseUnfreeze([Phase("8 steps", train=["head", "stem"]), Phase(train="blocks.1")]), watch, max_epochs=1
    )
    seen: list[set[str]] = []

    class Each(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.weights.append(weights(pl_module))

        def on_train_batch_end(self, *_: Any) -> None:
            return None

    each = Each()
    run.callbacks.append(each)
    run.fit(net, loader())
    seen = [changed(a, b) for a, b in zip(each.weights[1:], each.weights[2:], strict=False)]
    assert seen[:4] == [names(net, "head", "stem")] * 4
    assert seen[4:] == [names(net, "blocks.1")] * len(seen[4:])
    assert len(seen) >= 6
