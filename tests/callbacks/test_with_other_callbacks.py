"""G8: beside Lightning's own callbacks, wherever they stand in the list."""

from itertools import permutations
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from mask_nets import Net, Watch, changed, fit, loader, moved, names, trainer, weights
from torch import Tensor

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport

AVERAGING = {
    "weight averaging": lambda: WeightAveraging(),
    "exponential": lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=1),
    "stochastic": lambda: StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1, annealing_epochs=1),
}


def zeros_of(prune: PruneMask) -> dict[str, Tensor]:
    return {name: ~mask for name, mask in prune.masks.items()}


def assert_exact(
    state: dict[str, Tensor], before: dict[str, Tensor], held: dict[str, Tensor], zero: dict[str, Tensor], what: str
) -> None:
    for name, entries in held.items():
        entries = entries & ~zero.get(name, torch.zeros_like(entries))
        same = state[name].view(torch.int32) == before[name].view(torch.int32)
        assert bool(same[entries].all()), f"{what}: held entries of {name} differ"
    for name, entries in zero.items():
        assert not bool(state[name].view(torch.int32)[entries].any()), f"{what}: pruned entries of {name} are not +0.0"


@pytest.mark.parametrize("averaging", AVERAGING)
@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("order", list(permutations("ofp"))[::2], ids="".join)
def test_held_and_pruned_are_exact_with_weight_averaging(averaging: str, norm: str, order: tuple[str, ...]) -> None:
    """o: the other, f: FreezeMask, p: PruneMask."""
    net = Net(norm)
    before = weights(net)
    statistics = {n: b.clone() for n, b in net.named_buffers() if n.startswith("blocks.0")}
    freeze = FreezeMask(["head", "blocks.1"], score="random", density=0.3, scope="stem.weight")
    prune = PruneMask(0.5, scope="blocks.1.lin.weight", start="3 steps", end="20 steps", every="5 steps")
    report = RunReport()
    members = {"o": AVERAGING[averaging](), "f": freeze, "p": prune}
    save = ModelCheckpoint(dirpath="ck", every_n_epochs=1, save_top_k=-1)
    looked: list[tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]] = []

    class Look(Watch):
        def on_validation_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            looked.append((weights(pl_module), {n: ~m for n, m in freeze.masks.items()}, zeros_of(prune)))

    run = fit(
        net, *(members[k] for k in order), report, Look(), save, max_epochs=4, val=True, enable_checkpointing=True
    )
    held, zero = {n: ~m for n, m in freeze.masks.items()}, zeros_of(prune)
    assert sum(int(z.sum()) for z in zero.values()) == 72
    assert_exact(weights(net), before, held, zero, "the model after fit")
    assert int((net.blocks[1].lin.weight == 0).sum()) == 72
    assert bool((net.head.weight != before["head.weight"]).all())
    for name, value in statistics.items():
        assert torch.equal(dict(net.named_buffers())[name], value), f"{name}: statistics of a held module moved"
    files = sorted(Path("ck").glob("*.ckpt"))
    assert len(files) >= 4
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert set(saved["state_dict"]) == set(net.state_dict())
        key = next(k for k in saved["callbacks"] if k.startswith("PruneMask"))
        then = type(prune.masks).from_state(saved["callbacks"][key]["masks"])
        for state in ("state_dict", "current_model_state"):
            if state in saved:
                assert_exact(saved[state], before, held, {n: ~m for n, m in then.items()}, f"{file.name} {state}")
    for state, hold, nil in looked:
        assert_exact(state, before, hold, nil, "the model being validated")
    assert report.results()["held_changed"] == 0
    assert run.optimizers[0] is not None


@pytest.mark.parametrize("averaging", AVERAGING)
def test_what_a_later_phase_holds_whole_is_not_averaged_with_what_it_was_before(averaging: str) -> None:
    net, watch = Net(), Watch()
    phases = PhaseUnfreeze([Phase("12 steps", train=["stem", "head"]), Phase(train="head")])
    prune = PruneMask(0.5, scope="blocks.*.lin.weight", structure="tensor", start="14 steps", schedule="constant")
    before = weights(net)
    with torch.no_grad():
        net.blocks[0].lin.weight.zero_()  # held zeros may be pruned, as a whole tensor
    report = RunReport()
    fit(net, AVERAGING[averaging](), phases, prune, watch, report, max_epochs=4)
    assert not changed(watch.weights[13], weights(net)) & names(net, "stem")
    assert changed(before, watch.weights[13]) >= names(net, "stem")
    assert not bool(net.blocks[0].lin.weight.view(torch.int32).any())
    assert report.results()["held_changed"] == 0


def test_averages_of_active_entries_are_what_they_are_without_us() -> None:
    ends = []
    for callbacks in ([FreezeMask("*")], []):
        net = Net()
        fit(net, *callbacks, EMAWeightAveraging(decay=0.5, update_every_n_steps=1))
        ends.append(weights(net))
    assert not changed(*ends)


@pytest.mark.parametrize("first", [True, False])
def test_beside_early_stopping_checkpoints_and_rate_monitor(first: bool, tmp_path: Path) -> None:
    def values(epoch: int) -> float:
        return [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0][epoch]

    net, watch = Net(value=values), Watch()
    ours = [
        FreezeMask(["head", "stem"]),
        PhaseUnfreeze([Phase({"monitor": "val/score", "patience": 1}, train="head"), Phase()]),
        PruneMask(0.4, scope="stem.weight", start="24 steps", schedule="constant"),
    ]
    others: list[Any] = [
        EarlyStopping("val/score", patience=3),
        ModelCheckpoint(dirpath="ck", monitor="val/loss", save_last=True, save_top_k=2),
        LearningRateMonitor("step"),
    ]
    logger = CSVLogger(str(tmp_path))
    run = fit(
        net,
        *((ours + others) if first else (others + ours)),
        watch,
        val=True,
        max_epochs=8,
        logger=logger,
        enable_checkpointing=True,
        log_every_n_steps=1,
    )
    assert run.current_epoch == 5  # three epochs without improvement after the second
    assert [e["step"] for e in ours[1].history] == [0, 24]
    assert watch.moved_at(23) == names(net, "head")
    assert watch.moved_at(24) == names(net, "head", "stem")
    assert int((net.stem.weight == 0).sum()) == int(0.4 * 96 + 0.5)
    last = torch.load("ck/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(last[n], v) for n, v in net.state_dict().items())
    assert len(list(Path("ck").glob("*.ckpt"))) == 3


def test_gradient_accumulation_that_changes_over_epochs() -> None:
    net, watch = Net(), Watch()
    phases = PhaseUnfreeze([Phase("1 epochs", train="head"), Phase("2 epochs", train="stem"), Phase(train="blocks")])
    fit(net, phases, GradientAccumulationScheduler({0: 2, 1: 4}), watch, max_epochs=3)
    assert [e["step"] for e in phases.history] == [0, 4, 6]
    assert watch.moved_at(5) == names(net, "stem")
    assert watch.moved_at(6) == names(net, "blocks")
    fit(Net(), FreezeMask("head"), GradientAccumulationScheduler({0: 2, 1: 4}))


class Stop(pl.Callback):
    """Raise in the middle of an optimizer step: after the update, before anything else."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        original = type(optimizer).step

        def step(*args: Any, **kwargs: Any) -> Any:
            result = original.__wrapped__(optimizer, *args, **kwargs)
            if trainer.global_step == self.at:
                raise RuntimeError("stopped in the middle of a step")
            return result

        # the update happens inside, and our hook after it never comes
        optimizer.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_that_fails_in_the_middle_of_a_step_leaves_held_entries_exact(first: bool) -> None:
    net = Net()
    before = weights(net)
    freeze = FreezeMask("head", score="random", density=0.5)
    saves = OnExceptionCheckpoint("ck", "failed")
    callbacks = [freeze, saves] if first else [saves, freeze]
    with pytest.raises(RuntimeError, match="middle of a step"):
        fit(net, *callbacks, Stop(5), ModelCheckpoint("ck2", every_n_train_steps=1), enable_checkpointing=True)
    where = moved(before, weights(net))
    assert not any(bool((where[n] & ~m).any()) for n, m in freeze.masks.items())
    state = torch.load("ck/failed.ckpt", weights_only=True)["state_dict"]
    where = moved(before, state)
    assert not any(bool((where[n] & ~m).any()) for n, m in freeze.masks.items())
    assert not any(m._forward_pre_hooks for m in net.modules())
    fit(net, FreezeMask("stem"))  # and the module trains on


@pytest.mark.parametrize("finder", ["rate", "size"])
@pytest.mark.parametrize("first", [True, False])
def test_a_learning_rate_finder_and_a_batch_size_finder_do_not_disturb(finder: str, first: bool) -> None:
    class Tuned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 0.02, 4

        def train_dataloader(self) -> Any:
            return loader(size=self.batch_size)

        def val_dataloader(self) -> Any:
            return loader(16)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=self.lr)

    net = Tuned()
    before = weights(net)
    ours = [
        FreezeMask("head", score="random", density=0.5, scope="stem.weight"),
        PruneMask(0.5, scope="head.weight", start="1 steps", schedule="constant"),
    ]
    theirs: Any = BatchSizeFinder(steps_per_trial=2, init_val=4, max_trials=2)
    if finder == "rate":
        theirs = LearningRateFinder(num_training_steps=15)
    run = trainer(*((*ours, theirs) if first else (theirs, *ours)), max_epochs=1)
    run.fit(net)
    assert (net.batch_size == 8) == (finder != "rate")
    assert (net.lr != 0.02) == (finder != "size")
    assert run.global_step == 64 // net.batch_size
    where = moved(before, weights(net))
    assert {n for n, m in where.items() if bool(m.any())} == names(net, "head", "stem.weight")
    assert int((net.head.weight == 0).sum()) == 12
    held = ~ours[0].masks["stem.weight"]
    assert int(held.sum()) == 48
    assert not bool((where["stem.weight"] & held).any())
