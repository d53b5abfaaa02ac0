"""A run that goes on for longer than it was to: ramps and draws go on from where they stood."""

from typing import Any

import pytest
from mask_nets import Net, Stop, Watch, fit

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask


@pytest.mark.parametrize("regrow", [None, "random"])
def test_a_run_resumed_with_more_epochs_prunes_no_less_than_before(regrow: str | None) -> None:
    """The ramp of a longer run lies below what is pruned already, for a while."""

    def prune() -> PruneMask:
        return PruneMask(0.9, scope="blocks.*.lin.weight", regrow=regrow)

    class Dead(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            dead.append(~trainer.callbacks[0].masks)
            parameters = dict(pl_module.named_parameters())
            assert not any(bool((parameters[n][m] != 0).any()) for n, m in dead[-1].items())

    dead: list[MaskSet] = []
    run = fit(Net(), prune(), Dead(), max_epochs=2)
    run.save_checkpoint("two.ckpt")
    before = dead[-1]
    dead.clear()
    fit(Net(), prune(), Dead(), max_epochs=20, ckpt="two.ckpt")
    assert [masks.count() for masks in dead] == [259] * 18 * 8
    assert all(masks == before for masks in dead) == (regrow is None)


def test_a_ramp_that_a_longer_run_goes_on_with_rises_from_where_it_stood() -> None:
    counts: list[int] = []

    class Zeros(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            counts.append(sum(int((block.lin.weight == 0).sum()) for block in pl_module.blocks))

    def prune() -> PruneMask:
        return PruneMask(0.9, scope="blocks.*.lin.weight", schedule="linear", every="1 steps")

    run = fit(Net(), prune(), Stop(8), max_epochs=4)  # half way through its ramp, as by a time limit
    run.save_checkpoint("half.ckpt")
    fit(Net(), prune(), Zeros(), max_epochs=8, ckpt="half.ckpt")
    assert counts == sorted(counts)
    assert counts[0] == 113  # floor(0.9 * 7 / 16 * 288 + 0.5), as at the last step before
    assert counts[-1] == 259
    assert len(set(counts)) > 10


@pytest.mark.parametrize("phased", [False, True])
def test_a_mask_is_drawn_anew_also_in_a_run_resumed_with_more_epochs(phased: bool) -> None:
    """A share of a longer run is more steps: what counts is the step of the last draw."""

    def ours() -> Any:
        drawn: dict[str, Any] = {"score": "random", "density": 0.3, "refresh": "12.5%"}
        return PhaseUnfreeze([Phase("1 steps", train="head"), Phase(**drawn)]) if phased else FreezeMask(**drawn)

    class Look(Watch):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen[trainer.global_step - 1] = trainer.callbacks[0].masks.hash()

    first = int(phased)  # a phase counts from its own start
    seen: dict[int, str] = {}
    run = fit(Net(), ours(), Look(), max_epochs=4)
    run.save_checkpoint("four.ckpt")
    before = dict(seen)
    fit(Net(), ours(), Look(), max_epochs=16, ckpt="four.ckpt")
    draws = [step for step in range(32, 128) if seen[step] != seen[step - 1]]
    assert draws == [step + first for step in (32, 48, 64, 80, 96, 112)]
    assert len(set(seen.values())) == len(set(before.values())) + len(draws)
    again = dict(seen)
    run = fit(Net(), ours(), Look(), Stop(50), max_epochs=16, ckpt="four.ckpt")
    run.save_checkpoint("half.ckpt")
    fit(Net(), ours(), Look(), max_epochs=16, ckpt="half.ckpt")
    assert seen == again
