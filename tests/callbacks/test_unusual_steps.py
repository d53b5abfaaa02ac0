"""Steps that no backward of Lightning's comes before, optimizers that are toggled, callbacks that were tested in between."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from mask_nets import Net, Watch, fit, loader, moved, trainer, weights
from torch import Tensor

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask


def scattered() -> MaskSet:
    generator = torch.Generator().manual_seed(1)
    return MaskSet({n: torch.rand(p.shape, generator=generator) < 0.2 for n, p in Net().named_parameters()})


class SkipsTheLast(Net):
    """Returns no loss for the last micro-batch of the third window of two; Lightning steps all the same."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx == 5 else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_a_window_that_ends_without_a_loss_is_masked_too(engine: str) -> None:
    net, mask = SkipsTheLast(), FreezeMask(mask=scattered(), engine=engine)
    before = weights(net)
    held = ~mask.selection.mask["head.weight"]  # type: ignore[index]
    net.head.weight.register_hook(lambda g: torch.where(held, torch.full_like(g, float("nan")), g))
    fit(net, mask, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    for name, where in moved(before, weights(net)).items():
        assert not bool((where & ~mask.masks[name]).any())
        assert bool(where.any()) == bool(mask.masks[name].any())


def test_a_phase_ends_after_such_a_window() -> None:
    phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train="stem")])
    fit(SkipsTheLast(), phases, max_epochs=1, accumulate_grad_batches=2)
    assert [entry["step"] for entry in phases.history] == [0, 3]


class PlainBackward(Net):
    """Optimizes by hand, and calls ``backward`` on the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.loss(batch).backward()
        optimizer.step()  # type: ignore[union-attr]


def test_masks_and_pruning_without_manual_backward() -> None:
    net = PlainBackward()
    before = weights(net)
    mask = FreezeMask("head", scope="blocks.0.lin.weight", score="random", density=0.5)
    pruner = PruneMask(0.5, scope="head.weight", schedule="constant", start="3 steps")
    fit(net, mask, pruner)
    assert int((net.head.weight == 0).sum()) == 12 == int((~pruner.masks["head.weight"]).sum())
    where = moved(before, weights(net))["blocks.0.lin.weight"]
    assert torch.equal(where, mask.masks["blocks.0.lin.weight"])


class Toggling(Net):
    """Two optimizers in turn, the other one's tensors toggled off."""

    def __init__(self, toggle: bool) -> None:
        super().__init__()
        self.automatic_optimization, self.toggle = False, toggle

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            if self.toggle:
                self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
            if self.toggle:
                self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        body = [p for n, p in self.named_parameters() if not n.startswith("head")]
        return torch.optim.AdamW(body, lr=0.02), torch.optim.AdamW(self.head.parameters(), lr=0.02)


@pytest.mark.parametrize("toggle", [False, True])
def test_a_tensor_pruned_whole_stays_zero_when_optimizers_are_toggled(toggle: bool) -> None:
    net = Toggling(toggle)
    pruner = PruneMask(0.5, structure="tensor", scope=["blocks.*.lin.weight"], start="3 steps", schedule="constant")
    fit(net, pruner)
    zero = [n for n, m in pruner.masks.items() if not bool(m.any())]
    assert len(zero) == 1
    assert not bool(net.get_parameter(zero[0]).any())


@pytest.mark.parametrize("between", ["test", "validate", "predict"])
def test_testing_a_checkpoint_does_not_reach_into_the_next_fit(between: str) -> None:
    phases = PhaseUnfreeze([Phase("4 steps", train="head"), Phase(train="blocks")])
    pruner = PruneMask(0.5, scope="head.weight", start="2 steps", schedule="constant")
    run = trainer(phases, pruner)
    run.fit(Net(), loader())
    run.save_checkpoint("one.ckpt")
    more: dict[str, Any] = {} if between == "predict" else {"verbose": False}
    getattr(run, between)(Net(), loader(), ckpt_path="one.ckpt", **more)
    watch = Watch()
    pl.Trainer.fit(trainer(phases, pruner, watch), Net(), loader())
    assert {name.partition(".")[0] for name in watch.moved_at(0)} == {"head"}
    assert not bool((watch.weights[1]["head.weight"] == 0).any())
    assert [entry["step"] for entry in phases.history] == [0, 4]


class ZeroesAfterTheStep(Toggling):
    """What leaks from the other optimizer's turn is not wiped out before the step."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for factor, optimizer in zip((1.0, -3.0), self.optimizers(), strict=True):  # type: ignore[arg-type]
            self.toggle_optimizer(optimizer)
            self.manual_backward(factor * self.loss(batch))
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


def test_toggled_optimizers_see_their_own_loss_alone() -> None:
    nets = {engine: ZeroesAfterTheStep(True) for engine in ("compact", "dense")}
    for engine, net in nets.items():
        fit(net, FreezeMask(mask=scattered(), engine=engine))
    assert not any(moved(weights(nets["compact"]), weights(nets["dense"]))[n].any() for n in weights(Net()))


class SavesInTheStep(Net):
    """Saves before the step's other hooks have run, as a signal may have it."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        optimizer.register_step_post_hook(
            lambda *_: self.trainer.save_checkpoint("mid.ckpt") if self.global_step == 5 else None
        )
        return optimizer


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_a_checkpoint_from_inside_a_step_at_scaled_rates_resumes(engine: str) -> None:
    def phases() -> PhaseUnfreeze:
        rates = {"stem": 0.5, "head": 0.5, "blocks": 0.1}  # so that groups split by rate have another order
        scattered = Phase(train="head", score="random", density=0.3, lr_scale=rates, engine=engine)
        return PhaseUnfreeze([Phase("3 steps", train="head"), scattered])

    watch = Watch()
    fit(SavesInTheStep(), phases(), watch)
    saved = torch.load("mid.ckpt", weights_only=True)
    updated = watch.weights[6]
    assert all(torch.equal(saved["state_dict"][name], updated[name]) for name in updated), (
        "moments and weights go together"
    )
    assert saved["lightning_mask"]["names"] == [[n for n, _ in Net().named_parameters()]]
    fit(Net(), phases(), ckpt="mid.ckpt")


class Renormalised(Net):
    """An embedding that writes to its table in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(600, 12, max_norm=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table((x * 100).long().remainder(600)).mean(1))


@pytest.mark.parametrize("engine", ["auto", "compact", "dense"])
def test_a_table_that_is_renormalised_is_held(engine: str) -> None:
    net = Renormalised()
    before = weights(net)
    mask = FreezeMask("head", scope="table", score="random", density=0.2, engine=engine)
    fit(net, mask)
    where = moved(before, weights(net))["table.weight"]
    assert not bool((where & ~mask.masks["table.weight"]).any())
    assert bool(where.any())


def test_an_older_optimizer_state_may_be_put_back() -> None:
    net = Net()

    class PutBack(pl.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            optimizer = trainer.optimizers[0]
            for state in optimizer.state.values() if trainer.global_step == 12 else []:
                state["step"].zero_()

    fit(net, FreezeMask("head", score="random", density=0.3, refresh="4 steps"), PutBack())
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_an_interrupt_between_the_update_and_its_end_loses_no_step(engine: str) -> None:
    """Everything stands at the same step, as the reference without an interrupt does there."""

    class Interrupts(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.interrupt)  # before the masks' own
            return optimizer

        def interrupt(self, *_: Any) -> None:
            if self.global_step == 4:
                raise RuntimeError("interrupted")

    net, whole = Interrupts(), Net()
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(net, FreezeMask("head", score="random", density=0.3, engine=engine))
    fit(whole, FreezeMask("head", score="random", density=0.3, engine=engine), max_steps=5)
    assert not any(where.any() for where in moved(weights(net), weights(whole)).values())
