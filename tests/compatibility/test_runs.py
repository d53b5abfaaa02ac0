"""What a Trainer can be asked to do, one run after another."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, OnExceptionCheckpoint
from mask_nets import Net, Watch, changed, data, fit, loader, names, trainer, weights
from ours import assert_equal, assert_exact, assert_exact_at_every_step, cells, make
from torch import Tensor

from lightning_mask import FreezeMask

GROUP = "The Trainer"
CALLBACKS = "Lightning's callbacks"


def end_of(ours: str, *others: Any, **arguments: Any) -> dict[str, Tensor]:
    """Train with one of our callbacks; return the weights at the end, which are checked."""
    net, callback = Net(), make(ours)
    before = weights(net)
    fit(net, callback, *others, val=True, **arguments)
    assert_exact(callback, before, weights(net))
    return weights(net)


@cells(GROUP, "`fit`, `validate`, `test`, `predict`", "before a fit they change nothing of it, after it nothing at all")
def test_all_four_methods(ours: str) -> None:
    def run(around: bool) -> dict[str, Tensor]:
        net, callback, watch = Net(), make(ours), Watch()
        run = trainer(callback, watch)
        if around:
            run.validate(net, loader(16), verbose=False)
            run.test(net, loader(16), verbose=False)
            run.predict(net, loader(16))
        run.fit(net, loader(), loader(16))
        after = weights(net)
        assert_exact_at_every_step(callback, watch)
        if around:
            run.validate(net, loader(16), verbose=False)
            run.test(net, loader(16), verbose=False)
            predicted = torch.cat(run.predict(net, loader(16, 16)))  # type: ignore[arg-type]
            assert torch.equal(predicted, net(data(16).tensors[0]).detach())
        assert_equal(after, weights(net))
        return after

    assert_equal(run(around=True), run(around=False))


@cells(
    GROUP, "`fit` several times, with other callbacks each time", "each list of callbacks is in force in its own fit"
)
def test_fits_in_a_row_with_other_callbacks(ours: str) -> None:
    net, alone, callback, run = Net(), Net(), make(ours), None
    before = weights(net)
    run = trainer(callback, max_epochs=1)
    run.fit(net, loader())
    first = weights(net)
    assert_exact(callback, before, first)
    alone.load_state_dict(net.state_dict())

    run.callbacks.remove(callback)  # type: ignore[attr-defined]
    run.fit_loop.max_epochs = 2
    run.fit(net, loader())
    fit(alone, max_epochs=1)
    assert changed(first, weights(net)) == names(net, "")
    assert_equal(weights(net), weights(alone))

    second = weights(net)
    run.callbacks.append(FreezeMask("blocks.0"))  # type: ignore[attr-defined]
    run.fit_loop.max_epochs = 3
    run.fit(net, loader())
    assert changed(second, weights(net)) == names(net, "blocks.0")

    third = weights(net)
    trainer(callback, max_epochs=1).fit(net, loader())
    assert_exact(callback, third, weights(net))


@cells(GROUP, "`barebones=True`", "equal to a run with everything that it turns off")
def test_barebones(ours: str) -> None:
    assert_equal(end_of(ours, barebones=True, max_epochs=2), end_of(ours, max_epochs=2, logger=True))


@cells(GROUP, "`fast_dev_run=8`", "equal to a run of so many steps")
def test_fast_dev_run(ours: str) -> None:
    assert_equal(end_of(ours, fast_dev_run=8), end_of(ours, max_steps=8))


@cells(GROUP, "`overfit_batches`", "equal to a run over so many batches")
def test_overfit_batches(ours: str) -> None:
    assert_equal(end_of(ours, overfit_batches=4, max_epochs=3), end_of(ours, limit_train_batches=4, max_epochs=3))


@cells(GROUP, "`limit_train_batches`, `limit_val_batches`", "equal to a run over data of that length")
def test_limited_batches(ours: str) -> None:
    net, callback = Net(), make(ours)
    run = trainer(callback, max_epochs=3)
    run.fit(net, loader(32), loader(8))
    assert_equal(weights(net), end_of(ours, limit_train_batches=4, limit_val_batches=1, max_epochs=3))


@cells(CALLBACKS, "`GradientAccumulationScheduler`", "equal to `accumulate_grad_batches`; steps are optimizer steps")
def test_an_accumulation_schedule(ours: str) -> None:
    scheduled = end_of(ours, GradientAccumulationScheduler({0: 2}), max_epochs=3)
    assert_equal(scheduled, end_of(ours, max_epochs=3, accumulate_grad_batches=2))
    end_of(ours, GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)


@cells(
    GROUP,
    "`ModelCheckpoint(save_weights_only=True)`",
    "loads in plain PyTorch, exact; a fit from it is refused as ever",
)
def test_checkpoints_of_weights_alone(ours: str) -> None:
    net, callback = Net(), make(ours)
    before = weights(net)
    save = ModelCheckpoint(
        dirpath="ck", filename="{step}", save_weights_only=True, every_n_train_steps=8, save_top_k=-1
    )
    run = fit(net, callback, save, enable_checkpointing=True, max_epochs=2)
    loaded = Net()
    loaded.load_state_dict(torch.load("ck/step=16.ckpt", weights_only=True)["state_dict"])
    assert_exact(callback, before, weights(loaded))
    assert_equal(weights(loaded), weights(net))
    run.test(net, loader(16), ckpt_path="ck/step=8.ckpt", verbose=False)
    assert_exact(callback, before, weights(net))
    again = Net.load_from_checkpoint("ck/step=16.ckpt")
    start, callback = weights(again), make(ours)
    fit(again, callback)
    assert_exact(callback, start, weights(again))
    assert Path("ck/step=8.ckpt").exists()
    with pytest.raises(KeyError, match="optimizer state"):
        fit(Net(), make(ours), ckpt="ck/step=8.ckpt")


class Fail(Watch):
    """Raise in the middle of optimizer step 10: after the update, before anything that follows it."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 10:
            optimizer = trainer.optimizers[0]
            update = type(optimizer).step.__wrapped__  # without the hooks

            def step(*args: Any, **kwargs: Any) -> None:
                update(optimizer, *args, **kwargs)
                raise RuntimeError("failed in the middle of a step")

            optimizer.step = step


@cells(
    CALLBACKS, "`OnExceptionCheckpoint`", "exact where a run fails in the middle of an optimizer step, as is the model"
)
def test_a_run_that_fails_in_the_middle_of_a_step(ours: str) -> None:
    net, callback = Net(), make(ours)
    before = weights(net)
    with pytest.raises(RuntimeError, match="middle of a step"):
        fit(net, callback, OnExceptionCheckpoint("ck", "failed"), Fail(), enable_checkpointing=True)
    assert_exact(callback, before, weights(net))
    saved = Net()
    saved.load_state_dict(torch.load("ck/failed.ckpt", weights_only=True)["state_dict"])
    assert_exact(callback, before, weights(saved))
