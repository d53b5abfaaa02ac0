"""Whatever the Trainer is asked to do: several fits, debug runs, no logger, streams, optimizers by hand."""

from typing import Any

import pytest
import torch
from mask_nets import Net, Stop, Stream, Watch, changed, fit, loader, moved, names, trainer, weights
from torch.utils.data import DataLoader

from lightning_mask import FreezeMask, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport


def all_three() -> list[Any]:
    return [
        FreezeMask(["head", "blocks"]),
        PruneMask(0.5, scope="blocks.*.lin.weight", every="10%"),
        PhaseUnfreeze([Phase("30%", train=["head", "blocks.*.lin"], warmup="10%"), Phase("60%"), Phase(lr_scale=0.5)]),
    ]


VARIANTS: dict[str, dict[str, Any]] = {
    "one step": {"fast_dev_run": True},
    "three steps": {"fast_dev_run": 3},
    "barebones": {"barebones": True, "max_epochs": 2},
    "few batches": {"limit_train_batches": 2, "limit_val_batches": 1},
    "one batch": {"limit_train_batches": 1, "max_epochs": 1},
    "no validation": {"limit_val_batches": 0},
    "often validated": {"val_check_interval": 2},
    "overfit": {"overfit_batches": 2},
    "by steps": {"max_steps": 11},
    "sanity check": {"num_sanity_val_steps": 1},
    "clipped": {"gradient_clip_val": 0.1},
    "anomalies": {"detect_anomaly": True},
    "bf16": {"precision": "bf16-mixed"},
    "profiled": {"profiler": "simple"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_any_length_works_and_holds(variant: str) -> None:
    net = Net("batch", dropout=0.1)
    before = weights(net)
    callbacks = all_three()
    if variant == "one batch":
        callbacks[1] = PruneMask(0.5, scope="blocks.*.lin.weight", every="10%", end="100%")
    fit(net, *callbacks, val=True, **VARIANTS[variant])
    assert changed(before, weights(net)) <= names(net, "head", "blocks")
    assert "head.weight" in changed(before, weights(net))
    zeros = sum(int((block.lin.weight == 0).sum()) for block in net.blocks)
    assert zeros == 144


def test_a_debug_run_takes_moments_in_steps_that_it_never_reaches() -> None:
    phases = PhaseUnfreeze([Phase("500 steps", train="*"), Phase(train=["blocks", "stem"])])
    prune = PruneMask(0.5, start="100 steps", end="900 steps", every="100 steps")
    refreshed = FreezeMask(score="random", density=0.5, refresh="10%")
    fit(Net(), phases, prune, refreshed, fast_dev_run=True)
    with pytest.raises(ValueError, match=r"end='900 steps' is step 900, and the run has 16; end the ramp earlier"):
        fit(Net(), PruneMask(0.5, start="100 steps", end="900 steps", every="100 steps"))


def test_a_stream_without_a_length() -> None:
    for callbacks in (
        [FreezeMask("head", score="gradient", density=0.1, batches=3)],
        [PruneMask(0.5, start="2 steps", end="6 steps", every="2 steps")],
        [PhaseUnfreeze([Phase("5 steps", train="head"), Phase("1 epochs", train="stem"), Phase()])],
        all_three(),
    ):
        run = trainer(*callbacks, max_steps=12, max_epochs=-1)
        run.fit(Net(), DataLoader(Stream(), batch_size=8))
        assert run.global_step == 12


def test_what_is_pruned_at_once_needs_a_start_alone() -> None:
    """The default end and every are shares of the run, and one without an end has none."""
    for sparsity in (0.5, "2:4"):
        net = Net()
        fit(net, PruneMask(sparsity, scope="head.weight", start="3 steps", schedule="constant"), Stop(5), max_epochs=-1)
        assert int((net.head.weight == 0).sum()) == 12
    with pytest.raises(ValueError, match=r"PruneMask: start='99 steps' is step 99, and the run has 16; start the ramp"):
        fit(Net(), PruneMask(0.5, start="99 steps", schedule="constant"))


def test_several_fits_in_a_row_begin_anew() -> None:
    net = Net()
    freeze = FreezeMask("head", score="random", density=0.5, refresh="3 steps")
    phases = PhaseUnfreeze([Phase("4 steps", train="blocks.1"), Phase()])
    prune = PruneMask(0.5, scope="head.weight", start="6 steps", schedule="constant")
    first: list[Any] = []
    for attempt in range(3):
        net, watch = Net(), Watch()
        fit(net, freeze, phases, prune, watch)
        first.append((watch.weights, phases.history, freeze.masks.hash()))
        assert not changed(first[0][0][-1], first[attempt][0][-1])
        assert first[0][1:] == first[attempt][1:]
    run = trainer(freeze, phases, prune, max_epochs=1)
    run.fit(net, loader())
    before = weights(net)
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())  # the same Trainer goes on counting its steps
    assert run.global_step == 24
    assert changed(before, weights(net))
    assert int((net.head.weight == 0).sum()) == 12


def test_a_fit_after_a_failed_one_works() -> None:
    class Fails(Watch):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("no more")

    net, freeze = Net(), FreezeMask("head", score="random", density=0.2)
    with pytest.raises(RuntimeError, match="no more"):
        fit(net, freeze, Fails())
    assert all(p.requires_grad for p in net.parameters())
    before = weights(net)
    fit(net, freeze)
    where = moved(before, weights(net))
    assert not any(bool((where[n] & ~m).any()) for n, m in freeze.masks.items())


def test_validate_test_and_predict_with_and_without_a_fit() -> None:
    net = Net(value=lambda _: 1.0)
    before = weights(net)
    callbacks = [
        FreezeMask("head"),
        PruneMask(0.5, scope="head.weight"),
        PhaseUnfreeze([Phase({"monitor": "val/score", "patience": 5}, train="head"), Phase()]),
        RunReport(),
    ]
    run = trainer(*callbacks)
    run.validate(net, loader(16), verbose=False)
    run.test(net, loader(16), verbose=False)
    assert len(run.predict(net, loader(16))) == 2
    assert not changed(before, weights(net))
    run.fit(net, loader(), loader(16))
    after, waited = weights(net), callbacks[2].own_state()["progress"]["waited"]
    for _ in range(6):
        run.validate(net, loader(16), verbose=False)
    run.test(net, loader(16), verbose=False)
    run.predict(net, loader(16))
    assert not changed(after, weights(net))
    assert callbacks[2].own_state()["progress"]["waited"] == waited == 1
    assert all(p.requires_grad for p in net.parameters())


class TwoByHand(Net):
    """Two optimizers, each stepped once a batch: every step counts one."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        body = [p for n, p in self.named_parameters() if not n.startswith("head")]
        return torch.optim.AdamW(body, lr=0.02), torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(("rewind", "start"), [(3, 5), (2, 5), (5, 5), (4, 4), (1, 7)])
def test_rewinding_by_hand_goes_back_to_that_step_also_in_the_middle_of_a_batch(rewind: int, start: int) -> None:
    at: dict[int, dict[str, torch.Tensor]] = {}
    back: list[dict[str, torch.Tensor]] = []

    class Look(Watch):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            at.setdefault(trainer.global_step, weights(pl_module))

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step > start and not back:
                back.append(weights(pl_module))

    prune = PruneMask(
        0.5,
        scope="blocks.*.lin.weight",
        start=f"{start} steps",
        end=f"{start} steps",
        every="1 steps",
        rewind=f"{rewind} steps",
    )
    fit(TwoByHand(), prune, Look(), max_epochs=1)
    assert sorted(at) == list(range(16))
    now = back[0]
    alive = {n: prune.masks[n] if n in prune.masks else torch.ones_like(p, dtype=torch.bool) for n, p in now.items()}
    assert prune.masks.density() == 0.5
    for name, mask in alive.items():
        assert torch.equal(now[name], at[rewind][name].masked_fill(~mask, 0)), name


def test_several_optimizers_by_hand_take_steps_and_whole_epochs_of_a_phase_and_nothing_else() -> None:
    scope = "blocks.*.lin.weight"
    for ours, moment in (
        (PruneMask(0.5, scope=scope), "PruneMask: end='50%'"),
        (PruneMask(0.5, scope=scope, start="1 epochs", schedule="constant"), "PruneMask: start='1 epochs'"),
        (PhaseUnfreeze([Phase("50%", train="head"), Phase()]), "PhaseUnfreeze: phase 0: until='50%'"),
        (PhaseUnfreeze([Phase("1.5 epochs", train="head"), Phase()]), "PhaseUnfreeze: phase 0: until='1.5 epochs'"),
        (FreezeMask(score="random", density=0.5, refresh="10%"), "FreezeMask: refresh='10%'"),
    ):
        with pytest.raises(ValueError, match=f"{moment} cannot be counted in a run of 2 optimizers"):
            fit(TwoByHand(), ours)
    net = TwoByHand()
    fit(net, PruneMask(0.5, scope=scope, start="0 steps", end="30 steps", every="3 steps"))
    assert sum(int((block.lin.weight == 0).sum()) for block in net.blocks) == 144
    phases = PhaseUnfreeze([Phase("1 epochs", train=["head", "stem"]), Phase()])
    fit(TwoByHand(), phases)
    assert [entry["step"] for entry in phases.history] == [0, 16]


@pytest.mark.parametrize("ours", ["prune", "phases"])
def test_a_tensor_of_no_optimizer_that_nobody_asks_for_stays_as_it_is(ours: str) -> None:
    def half(module: Any) -> Any:
        return torch.optim.SGD([*module.head.parameters(), *module.blocks.parameters()], lr=0.1)

    net, before = Net(make=half), weights(Net())
    callback = PhaseUnfreeze([Phase("3 steps", train="head"), Phase()])
    fit(net, PruneMask(0.5, scope="blocks.*.lin.weight") if ours == "prune" else callback)
    assert changed(before, weights(net)) == names(net, "head", "blocks")
    assert all(p.requires_grad for p in net.parameters())
