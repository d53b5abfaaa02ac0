"""When phases switch and what they train: steps, epochs, percent, plateau; gradual; overlapping; refresh."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from mask_nets import Net, Stream, Watch, changed, fit, moved, names, trainer, weights
from torch.utils.data import DataLoader

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask, criterion
from lightning_mask.callbacks import RunReport


def steps_of(history: list[dict[str, Any]]) -> list[int]:
    return [entry["step"] for entry in history]


@pytest.mark.parametrize(
    ("until", "arguments", "step"),
    [
        ("5 steps", {}, 5),
        ("1 epochs", {}, 8),
        ("1.5 epochs", {}, 12),
        ("25%", {}, 4),
        ("25%", {"max_steps": 12}, 3),
        ("5 steps", {"accumulate_grad_batches": 2}, 5),
        ("1 epochs", {"accumulate_grad_batches": 2}, 4),
        ("1 epochs", {"accumulate_grad_batches": 3}, 3),
        ("50%", {"accumulate_grad_batches": 3}, 3),
        ("1 epochs", {"limit_train_batches": 3}, 3),
        ("50%", {"limit_train_batches": 0.5}, 4),
    ],
)
def test_a_phase_trains_exactly_the_steps_before_its_moment(until: str, arguments: dict[str, Any], step: int) -> None:
    net, watch = Net(), Watch()
    phases = PhaseUnfreeze([Phase(until, train="head", name="first"), Phase(train=["head", "blocks.1"])])
    run = fit(net, phases, watch, **arguments)
    assert phases.history == [
        {"phase": 0, "name": "first", "step": 0, "reason": "start"},
        {"phase": 1, "name": "phase 1", "step": step, "reason": until},
    ]
    assert phases.phase == 1
    assert run.global_step > step
    for i in range(run.global_step):
        assert watch.moved_at(i) == (names(net, "head") if i < step else names(net, "head", "blocks.1")), i


def test_a_stream_without_a_length_switches_by_steps_and_whole_epochs() -> None:
    net, watch = Net(), Watch()
    phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase("1 epochs", train="stem"), Phase(train="blocks")])
    run = trainer(phases, watch, max_epochs=2)
    run.fit(net, DataLoader(Stream(), batch_size=8))
    assert steps_of(phases.history) == [0, 3, 8]
    assert [watch.moved_at(i) for i in (2, 3, 7, 8)] == [names(net, n) for n in ("head", "stem", "stem", "blocks")]


def test_phases_overlap_freeze_again_and_train_again() -> None:
    net, watch = Net(), Watch()
    trains = [["head"], ["head", "blocks.1"], ["blocks"], ["head"], ["*"], ["blocks.1.norm"]]
    phases = PhaseUnfreeze(
        [{"until": f"{2 * i + 2} steps", "train": t} for i, t in enumerate(trains[:-1])] + [{"train": trains[-1]}]
    )
    fit(net, phases, watch)
    for step in range(16):
        wanted = trains[min(step // 2, len(trains) - 1)]
        everything = names(net, *(("",) if wanted == ["*"] else wanted))
        assert watch.moved_at(step) == everything, step
        assert watch.trainable[step] == everything, step


def test_a_tensor_trains_from_fresh_moments_when_it_comes_back() -> None:
    """Re-frozen and thawed again: as if AdamW had never seen it."""
    net = Net()
    seen: dict[int, Any] = {}

    class Look(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            state = trainer.optimizers[0].state
            seen[trainer.global_step] = {
                n: float(state[p]["step"]) for n, p in pl_module.named_parameters() if p in state
            }

    phases = [Phase("4 steps", train="head"), Phase("8 steps", train="stem"), Phase(train=["stem", "head"])]
    fit(net, PhaseUnfreeze(phases), Look())
    assert seen[4] == {"head.weight": 4.0, "head.bias": 4.0}
    assert seen[8] == {"stem.weight": 4.0, "stem.bias": 4.0}
    assert seen[16] == {"stem.weight": 12.0, "stem.bias": 12.0, "head.weight": 8.0, "head.bias": 8.0}


def test_entries_that_come_back_start_from_zero_moments_and_those_that_stay_keep_theirs() -> None:
    columns = torch.arange(12)
    masks = [
        MaskSet({"head.weight": (columns < 6).expand(2, 12)}),
        MaskSet({"head.weight": (columns >= 4).expand(2, 12)}),
        MaskSet({"head.weight": (columns < 8).expand(2, 12)}),
    ]
    moments: dict[int, Any] = {}

    class Look(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            state = trainer.optimizers[0].state.get(pl_module.head.weight)
            if state:
                moments[trainer.global_step] = (state["exp_avg"].clone(), state["exp_avg_sq"].clone())

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            state = trainer.optimizers[0].state[pl_module.head.weight]
            last[trainer.global_step] = (state["exp_avg"].clone(), state["exp_avg_sq"].clone())

    last: dict[int, Any] = {}
    phases = [
        Phase(until, mask=mask, engine="dense") for until, mask in zip(["4 steps", "8 steps", None], masks, strict=True)
    ]
    fit(Net(), PhaseUnfreeze(phases), Look())
    for step, back, stay in ((4, columns >= 6, (columns >= 4) & (columns < 6)), (8, columns < 4, columns.eq(5))):
        for now, then in zip(moments[step], last[step], strict=True):
            assert not bool(now[:, back].any()), step
            assert bool((now[:, stay] != 0).all())
            assert torch.equal(now[:, stay], then[:, stay])
    assert bool((last[8][0][:, columns < 4] != 0).any())  # what was left over would have been carried on


PLATEAUS = {
    # value of each epoch -> epochs until the switch
    "falls then stands": ([5, 4, 4, 4, 4, 4], {"patience": 2}, 4),
    "patience of one": ([5, 4, 4, 4, 4, 4], {"patience": 1}, 3),
    "rises, wanted high": ([1, 2, 3, 2, 3, 3], {"patience": 2, "mode": "max"}, 5),
    "small steps do not count": ([5.0, 4.9, 4.8, 4.7, 4.7, 4.7], {"patience": 2, "min_delta": 0.5}, 3),
    "nan never improves": ([5.0, float("nan"), float("nan"), 1.0, 1.0, 1.0], {"patience": 2}, 3),
    "never stops improving": ([6, 5, 4, 3, 2, 1], {"patience": 1}, None),
}


@pytest.mark.parametrize("case", PLATEAUS)
@pytest.mark.parametrize("where", ["val/score", "train/score", "train/late"])
def test_a_phase_ends_when_a_metric_stops_improving(case: str, where: str) -> None:
    """Logged in validation, in training steps, or at the end of a training epoch by the module's own hook."""
    values, arguments, epochs = PLATEAUS[case]

    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if where == "train/score":
                self.log(where, float(values[self.current_epoch]), on_step=False, on_epoch=True)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self) -> None:
            if where == "train/late":
                self.log(where, float(values[self.current_epoch]))

    net = Logs(value=(lambda epoch: float(values[epoch])) if where == "val/score" else None)
    phases = PhaseUnfreeze([Phase({"monitor": where, **arguments}, train="head"), Phase()])
    fit(net, phases, val=True, max_epochs=6, limit_train_batches=2)
    assert steps_of(phases.history) == ([0] if epochs is None else [0, 2 * epochs])
    if epochs is not None:
        assert phases.history[1]["reason"] == f"{where} stopped improving"


def test_a_plateau_in_the_middle_of_an_epoch_switches_at_the_next_step() -> None:
    net, watch = Net(value=lambda _: 1.0), Watch()
    phases = PhaseUnfreeze([Phase({"monitor": "val/score", "patience": 1}, train="head"), Phase(train="stem")])
    fit(net, phases, watch, val=True, val_check_interval=3, accumulate_grad_batches=2)
    # validated after micro-batches 3 and 6: the second time ends the phase; step 3 is the first whose window begins later
    assert steps_of(phases.history) == [0, 3]
    assert [watch.moved_at(i) for i in (2, 3)] == [names(net, "head"), names(net, "stem")]


def test_going_back_to_the_best_weights() -> None:
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    net, watch = Net("batch", value=lambda epoch: scores[epoch]), Watch()
    stats: list[torch.Tensor] = []

    class Stats(Watch):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            stats.append(pl_module.blocks[1].norm.running_mean.clone())

        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            self.weights.append(weights(pl_module))
            stats.append(pl_module.blocks[1].norm.running_mean.clone()) if trainer.global_step == 8 else None

    look = Stats()
    until = {"monitor": "val/score", "patience": 2}
    phases = PhaseUnfreeze([Phase(until, train=["head", "blocks.1"], restore_best=True), Phase(train="stem")])
    fit(net, phases, watch, look, val=True, max_epochs=6, limit_train_batches=2)
    assert steps_of(phases.history) == [0, 8]
    best = watch.weights[4]  # after the second epoch
    at_switch = look.weights[9]
    assert not changed(best, at_switch)
    assert changed(watch.weights[8], at_switch) == names(net, "head", "blocks.1")
    assert torch.equal(stats[4], stats[1])  # running statistics went back as well
    assert not torch.equal(stats[3], stats[1])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("refresh", [None, "3 steps"])
def test_a_run_that_ends_as_the_metric_ends_the_phase_goes_back_as_well(first: bool, refresh: str | None) -> None:
    """The phase's end is the run's end, by its length or by EarlyStopping; a run that ends before leaves the weights."""
    until = {"monitor": "val/score", "patience": 2}

    def run(epochs: int) -> tuple[Net, PhaseUnfreeze, RunReport, list[dict[str, torch.Tensor]]]:
        scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
        net, watch, report = Net("batch", value=lambda epoch: scores[epoch]), Watch(), RunReport()
        phase = Phase(until, train=["head"], score="random", density=0.5, refresh=refresh, restore_best=True)
        phases = PhaseUnfreeze([phase, Phase(train="stem")])
        freeze = FreezeMask("*")
        fit(net, *((phases, freeze) if first else (freeze, phases)), watch, report, val=True, max_epochs=epochs, **two)
        return net, phases, report, watch.weights

    two = {"limit_train_batches": 2}
    net, phases, report, seen = run(4)
    assert not changed(seen[4], weights(net))  # after the second epoch
    assert changed(seen[8], weights(net))
    assert steps_of(phases.history) == [0]
    assert report.results()["held_changed"] == 0
    net, _, _, seen = run(3)
    assert not changed(seen[6], weights(net))  # the metric has not ended the phase


def test_a_run_that_ended_as_the_phase_did_goes_on_from_the_best_weights() -> None:
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    ends = []

    def phases() -> PhaseUnfreeze:
        until = {"monitor": "val/score", "patience": 2}
        return PhaseUnfreeze([Phase(until, train=["head", "blocks.1"], restore_best=True), Phase(train="stem")])

    whole = Net(value=lambda epoch: scores[epoch])
    fit(whole, phases(), val=True, max_epochs=6)
    for ckpt in ("last.ckpt", "end.ckpt"):  # written before training ended, and after
        net, keep = Net(value=lambda epoch: scores[epoch]), ModelCheckpoint(".", save_last=True)
        run = fit(net, phases(), keep, val=True, max_epochs=4, enable_checkpointing=True)
        run.save_checkpoint("end.ckpt")
        again = Net(value=lambda epoch: scores[epoch])
        fit(again, resumed := phases(), val=True, max_epochs=6, ckpt=ckpt)
        assert steps_of(resumed.history) == [0, 32]
        ends.append(weights(again))
        Path("last.ckpt").unlink()
    assert not changed(weights(whole), ends[0])
    assert not changed(weights(whole), ends[1])


def test_going_back_revives_nothing_that_was_pruned_since() -> None:
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    net, watch = Net(value=lambda epoch: scores[epoch]), Watch()
    until = {"monitor": "val/score", "patience": 2}
    phases = PhaseUnfreeze(
        [
            Phase(until, train="blocks", restore_best=True),
            Phase(score="magnitude", density=30, scope="blocks.0.lin.weight"),
        ]
    )
    prune = PruneMask(0.75, score="random", scope="blocks.0.lin.weight", start="5 steps", schedule="constant")
    fit(net, prune, phases, watch, val=True, max_epochs=6, limit_train_batches=2)
    name = "blocks.0.lin.weight"
    for step in range(6, 13):
        assert int((watch.weights[step][name] == 0).sum()) == 108, step
    assert torch.equal(watch.weights[9][name] == 0, ~prune.masks[name])
    # the next phase chose among what is alive, not among what going back brought for a moment
    assert int((phases.masks[name] & prune.masks[name]).sum()) == 30


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_gradual_unfreezes_block_by_block_with_falling_rates_and_its_yaml_gives_the_same_run(
    tmp_path: Path, engine: str
) -> None:
    from lightning.pytorch.loggers import CSVLogger

    ends, histories, files = [], [], []
    for i in range(2):
        net, watch = Net(), Watch()
        given: Any = "gradual" if i == 0 else files[0]
        extra: dict[str, Any] = {"every": "3 steps", "lr_decay": 2.0} if i == 0 else {}
        phases = PhaseUnfreeze(given, **extra)
        fit(net, phases, watch, logger=CSVLogger(str(tmp_path), version=i), log_every_n_steps=1)
        ends.append(watch.weights)
        histories.append(phases.history)
        files.append(Path(tmp_path, "lightning_logs", f"version_{i}", "phases.yaml"))
        parts = ["head", "blocks.1", "blocks.0", "stem"]
        for step in range(16):
            assert watch.moved_at(step) == names(net, *parts[: step // 3 + 1]), step
    assert histories[0] == histories[1]
    assert all(not changed(a, b) for a, b in zip(*ends, strict=True))
    assert files[0].read_text() == files[1].read_text()
    scales = [phase["lr_scale"] for phase in yaml.safe_load(files[0].read_text())]
    assert list(scales[-1].values())[1:4] == [1.0, 0.5, 0.25]  # head.weight, head.bias, then the blocks from above


def test_phases_written_as_yaml_are_the_same_phases(tmp_path: Path) -> None:
    from lightning_mask.callbacks.phase import write_phases

    given = [
        Phase("1234567 steps", train=["head", "!head.bias"], lr_scale={"head": 0.1}, warmup="1000000 steps", name="a"),
        Phase("66.66666667%", score="fisher", density=0.005, scope=["blocks"], structure="row", allocation="uniform"),
        Phase({"monitor": "val/loss", "patience": 3, "mode": "max", "min_delta": 0.1}, train="*", restore_best=True),
        Phase(score="random", density=40, seed=7, refresh="2 epochs", batches=3, engine="dense"),
    ]
    write_phases(given, tmp_path / "p.yaml")
    read = PhaseUnfreeze(tmp_path / "p.yaml").phases
    assert [p.to_dict() for p in read] == [p.to_dict() for p in given]
    for a, b in zip(read, given, strict=True):
        assert (a.until, a.warmup, a.refresh, a.lr_scale) == (b.until, b.warmup, b.refresh, b.lr_scale)
        assert a.selection.recipe() == b.selection.recipe()


def test_a_schedule_with_a_mask_set_or_an_own_criterion_can_be_given_back(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    @criterion("a test's own: smallest")
    def smallest(params: Any, context: Any) -> Any:
        return {n: -p.detach().abs() for n, p in params.items()}

    net = Net()
    chosen = MaskSet({"head.weight": torch.arange(24).view(2, 12) % 3 == 0})
    ends = []
    for i in range(2):
        net = Net()
        given: Any = [Phase("3 steps", mask=chosen), Phase(score=smallest, density=20)]
        phases = PhaseUnfreeze(given if i == 0 else tmp_path / "lightning_logs" / "version_0" / "phases.yaml")
        fit(net, phases, logger=CSVLogger(str(tmp_path), version=i))
        ends.append(weights(net))
    assert not changed(*ends)


def test_refresh_draws_a_new_mask_at_its_moments_and_old_entries_keep_their_values() -> None:
    for callback in (
        FreezeMask(score="random", density=0.2, refresh="4 steps", seed=5),
        PhaseUnfreeze([Phase("2 steps", train="head"), Phase(score="random", density=0.2, refresh="4 steps")]),
    ):
        net, watch = Net(), Watch()
        masks: list[MaskSet] = []

        class Look(Watch):
            def on_train_batch_end(self, *_: Any, masks: Any = masks, callback: Any = callback) -> None:
                masks.append(callback.masks)

        fit(net, callback, watch, Look())
        first = 0 if isinstance(callback, FreezeMask) else 2
        bounds = list(range(first, 17, 4))
        for step in range(first, 16):
            assert (masks[step] == masks[step - 1]) == (step not in bounds), step
            where = moved(watch.weights[step], watch.weights[step + 1])
            assert not any(bool((where[n] & ~masks[step][n]).any()) for n in where), step
        assert len({m.hash() for m in masks[first:]}) == len([b for b in bounds if b < 16])
        assert len({m.count() for m in masks[first:]}) == 1


def test_percent_phases_of_no_step_are_passed_over_in_a_short_run() -> None:
    """The same configuration must serve a debug run of a step."""
    phases = PhaseUnfreeze([Phase("20%", train="head"), Phase("40%", train="stem"), Phase(train="blocks")])
    net, watch = Net(), Watch()
    fit(net, phases, watch, max_steps=1)
    assert watch.moved_at(0) == names(net, "blocks")


def test_prune_ramp_has_the_exact_count_at_every_update() -> None:
    net, watch = Net(), Watch()
    prune = PruneMask(0.9, scope="blocks.*.lin.weight", start="2 steps", end="10 steps", every="2 steps")
    fit(net, prune, watch)
    for step in range(16):
        after = watch.weights[step + 1]
        zeros = sum(int((after[f"blocks.{i}.lin.weight"] == 0).sum()) for i in (0, 1))
        progress = (min(step, 10) - 2) // 2 * 2 / 8 if step >= 2 else 0.0
        share = 0.9 * (1 - (1 - progress) ** 3) if step >= 2 else 0.0
        assert zeros == int(share * 288 + 0.5), step
        for i in (0, 1):
            bits = after[f"blocks.{i}.lin.weight"]
            assert not bool(torch.signbit(bits[bits == 0]).any())


def three(**changes: Any) -> list[Any]:
    """Three phases as dicts; ``p1={...}`` changes arguments of the second."""
    phases = [{"until": "3 steps", "train": "head"}, {"until": "12 steps", "train": "stem"}, {"train": "blocks"}]
    return [{**phase, **changes.get(f"p{i}", {})} for i, phase in enumerate(phases)]


def test_a_resume_refuses_phases_that_were_edited_up_to_the_current_one_and_takes_later_ones() -> None:
    net = Net()
    chosen = MaskSet({"head.weight": torch.arange(24).view(2, 12) % 3 == 0})
    chosen.save("chosen.safetensors")
    given = three(p0={"train": None, "mask": chosen})
    fit(net, PhaseUnfreeze(given), max_epochs=1).save_checkpoint("second.ckpt")  # at step 8, in the second phase

    def resume(phases: list[Any]) -> list[set[str]]:
        net, watch = Net(), Watch()
        fit(net, PhaseUnfreeze(phases), watch, max_epochs=2, ckpt="second.ckpt")
        return [changed(a, b) for a, b in zip(watch.weights, watch.weights[1:], strict=False)]

    stem, blocks, head = (names(net, part) for part in ("stem", "blocks", "head"))
    assert resume(given) == [stem] * 4 + [blocks] * 4
    same = three(p0={"train": None, "mask": "chosen.safetensors", "name": "top"}, p1={"engine": "dense"})
    assert resume(same) == [stem] * 4 + [blocks] * 4  # another name, another way of holding, the mask as a file
    assert resume([*given[:2], {"until": "14 steps", "train": "head"}, {"train": "blocks"}]) == (
        [stem] * 4 + [head] * 2 + [blocks] * 2
    )
    for phases, message in (
        (
            [*given[:1], {"train": "blocks"}],
            r"phase 1 has train=\['blocks'\], until=None, and not train=\['stem'\], until='12 steps' as in the checkpoint",
        ),
        (given[2:], r"the checkpoint is in phase 1, and there are 1 phases now; give all .*, or start a new run"),
        (
            [*given[:1], {**given[1], "name": "mid", "score": "random", "density": 0.5}, given[2]],
            r"PhaseUnfreeze: mid ",
        ),
        ([given[0], {**given[1], "until": "13 steps"}, given[2]], r"phase 1 .*until='13 steps'"),
        ([{**given[0], "mask": MaskSet({"head.weight": chosen["head.weight"] ^ True})}, *given[1:]], r"phase 0 .*mask"),
        ([{**given[0], "lr_scale": 0.5}, *given[1:]], r"phase 0 .*lr_scale=0\.5"),
    ):
        watch = Watch()
        with pytest.raises(ValueError, match=message) as caught:
            fit(Net(), PhaseUnfreeze(phases), watch, max_epochs=2, ckpt="second.ckpt")
        assert "\n" not in str(caught.value)
        assert not watch.rates  # no batch was begun


def test_a_gradual_schedule_resumes_and_refuses_another_decay() -> None:
    def ours(decay: float) -> PhaseUnfreeze:
        return PhaseUnfreeze("gradual", every="3 steps", lr_decay=decay)

    fit(Net(), ours(2.0), max_epochs=1).save_checkpoint("gradual.ckpt")
    phases = ours(2.0)
    fit(Net(), phases, max_epochs=2, ckpt="gradual.ckpt")
    assert steps_of(phases.history) == [0, 3, 6, 9]
    with pytest.raises(
        ValueError,
        match=r"PhaseUnfreeze: \+ blocks\.1 has lr_scale=.*'blocks\.1': 0\.33.*, and not lr_scale=.*0\.5",
    ):
        fit(Net(), ours(3.0), max_epochs=2, ckpt="gradual.ckpt")
