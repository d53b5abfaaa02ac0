"""The Tuner trains for a while without any callback, then puts everything back."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.tuner import Tuner
from mask_nets import Net, Watch, loader, trainer, weights
from ours import assert_equal, assert_exact_at_every_step, cells, make
from torch import Tensor

GROUP = "The Tuner"


class Tuned(Net):
    """Has a rate and a batch size to be found."""

    def __init__(self, lr: float = 0.02, batch_size: int = 8) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def train_dataloader(self) -> Any:
        return loader(size=self.batch_size)

    def val_dataloader(self) -> Any:
        return loader(16)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


def run(ours: str, net: Tuned, tune: Callable[[Tuner, Tuned], Any] | None = None) -> dict[str, Tensor]:
    """Tune, then train; return the weights at the end, which are checked."""
    callback, watch, before = make(ours), Watch(), weights(net)
    trains = trainer(callback, watch, max_epochs=2)
    if tune is not None:
        tune(Tuner(trains), net)
        assert_equal(before, weights(net))
        assert len(callback.masks) == 0
        assert all(p.requires_grad for p in net.parameters())
    trains.fit(net)
    assert trains.global_step == 2 * 64 // net.batch_size
    assert_exact_at_every_step(callback, watch)
    return weights(net)


@cells(GROUP, "`Tuner.lr_find`", "the run after it equals one without it, at the rate that was found")
def test_a_rate_is_found(ours: str) -> None:
    def look(tuner: Tuner, net: Tuned) -> None:
        found = tuner.lr_find(net, num_training=16, update_attr=False)
        assert found is not None
        assert len(found.results["lr"]) == 16

    assert_equal(run(ours, Tuned(), look), run(ours, Tuned()))
    net = Tuned()
    end = run(ours, net, lambda tuner, net: tuner.lr_find(net, num_training=16))
    assert net.lr != 0.02
    assert_equal(end, run(ours, Tuned(lr=net.lr)))


@cells(GROUP, "`Tuner.scale_batch_size`", "the run after it equals one without it, at the size that was found")
def test_a_batch_size_is_found(ours: str) -> None:
    net = Tuned()
    end = run(ours, net, lambda t, net: t.scale_batch_size(net, init_val=2, steps_per_trial=3, max_trials=2))
    assert net.batch_size == 4
    assert_equal(end, run(ours, Tuned(batch_size=4)))
