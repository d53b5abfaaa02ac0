"""Whatever the Trainer is asked to do: several fits, debug runs, no logger, streams; what is logged; whether it held."""

import csv
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from mask_nets import Net, Stream, Watch, changed, data, fit, loader, moved, names, trainer, weights
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import RunReport


class Stop(Watch):
    """End the run after that many steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


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
    held = ~freeze.masks["stem.weight"]
    assert changed(before, weights(net))
    assert held.shape == net.stem.weight.shape
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


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged(accumulate: int, tmp_path: Path) -> None:
    net = Net()
    phases = PhaseUnfreeze([Phase("3 steps", train="head"), Phase(train=["head", "stem"])])
    prune = PruneMask(0.5, scope="stem.weight", start="5 steps", schedule="constant")
    logger = CSVLogger(str(tmp_path), name="", version="")
    steps = 8
    fit(
        net,
        phases,
        prune,
        max_steps=steps,
        logger=logger,
        log_every_n_steps=1,
        accumulate_grad_batches=accumulate,
    )
    lines = Path(tmp_path, "metrics.csv").read_text().splitlines()
    rows = [r for r in csv.DictReader(lines) if r.get("mask/active")]
    by_step = {int(r["step"]): r for r in rows}
    assert set(by_step) == set(range(steps))
    for step, row in by_step.items():
        active = 26 if step < 3 else 26 + 108 if step <= 5 else 26 + 108 - 48
        total = sum(p.numel() for p in net.parameters())
        assert float(row["mask/active"]) == active, step
        assert float(row["mask/density"]) == pytest.approx(active / total)
        assert float(row["mask/phase"]) == (step >= 3)
        assert float(row["mask/sparsity"]) == (0.0 if step <= 5 else 0.5)


@pytest.mark.parametrize("what", ["whole", "whole after a phase", "part", "nothing"])
def test_the_report_finds_a_change_behind_our_back(what: str) -> None:
    class Tamper(Watch):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            if what == "part":
                pl_module.head.weight.data[0, 0] += 1

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if what == "whole" and trainer.global_step == 2:
                pl_module.stem.weight.data[3, 3] += 1
            if what == "whole after a phase" and trainer.global_step == 2:
                pl_module.stem.bias.data[:2] += 1

    net, report = Net(), RunReport()
    ours: Any = FreezeMask(score="random", density=1, scope="head.weight")
    if what == "whole after a phase":
        ours = PhaseUnfreeze([Phase("5 steps", train="head"), Phase()])
    if what == "part":
        ours = FreezeMask(score="magnitude", density=1, scope="head.weight")
    fit(net, ours, Tamper(), report)
    expected = {"whole": 1, "whole after a phase": 2, "part": 1, "nothing": 0}[what]
    assert report.results()["held_changed"] == expected


def test_the_report_knows_the_bytes_of_the_optimizers_state() -> None:
    net, report = Net(), RunReport()
    fit(net, FreezeMask("head"), report)
    tensors, entries = len(list(net.head.parameters())), sum(p.numel() for p in net.head.parameters())
    numbers = 2 * entries + tensors  # two moments, and a count for each tensor
    assert report.results()["optimizer_bytes"] == 4 * numbers


@pytest.mark.parametrize(
    ("ours", "most"),
    [
        (FreezeMask("head"), 26),
        (PhaseUnfreeze([Phase("3 steps", train="head"), Phase("5 steps", train="stem"), Phase(train="head")]), 108),
        (PruneMask(0.5, scope="stem.weight", schedule="constant"), 494 - 48),  # before the first step
        (PruneMask(0.5, scope="stem.weight", start="3 steps", schedule="constant"), 494),
    ],
)
def test_the_report_knows_how_many_entries_trained_at_most(ours: Any, most: int) -> None:
    net, report = Net(), RunReport()
    assert sum(p.numel() for p in net.parameters()) == 494
    fit(net, ours, report)
    assert report.results()["most_active"] == most


def test_the_report_raises_no_false_alarm() -> None:
    scores = [3.0, 1.0, 2.0, 4.0, 0.0, 0.0]
    net, report = Net(value=lambda epoch: scores[epoch]), RunReport("out")
    until = {"monitor": "val/score", "patience": 2}
    phases = PhaseUnfreeze(
        [
            Phase(until, score="random", density=0.5, refresh="3 steps", restore_best=True),
            Phase(train="stem"),
        ]
    )
    prune = PruneMask(0.5, scope="stem.weight", start="9 steps", end="11 steps", every="1 steps", rewind="1 steps")
    fit(net, phases, prune, report, val=True, max_epochs=6, limit_train_batches=2)
    facts = report.results()
    assert facts["held_changed"] == 0
    assert facts["held_checked"] > 300
    assert facts["sparsity"] == 0.5
    assert [entry["step"] for entry in facts["phases"]] == [0, 8]
    saved = MaskSet.load("out/masks.safetensors")
    assert saved.count() == facts["active"]
    assert torch.equal(saved["stem.weight"], prune.masks["stem.weight"])


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


def twice(params: Any, context: Any, power: int) -> Any:
    return {name: p.detach().abs() ** power for name, p in params.items()}


class Twice:
    def __call__(self, params: Any, context: Any) -> Any:
        return twice(params, context, 2)


@pytest.mark.parametrize("score", [partial(twice, power=2), Twice()], ids=["partial", "object"])
def test_a_criterion_may_be_a_partial_or_an_object_and_every_callback_can_be_sent_to_another_process(
    score: Any, tmp_path: Path
) -> None:
    """As strategy="ddp_spawn" sends them."""

    def callbacks() -> list[Any]:
        chosen = {"score": score, "density": 0.5, "scope": ["stem.weight", "blocks.1.lin.weight"]}
        return [
            FreezeMask(["head", "blocks.0"], **chosen),
            PruneMask(0.25, score=score, scope="blocks.*.lin.weight", start="1 steps", end="4 steps", rewind="1 steps"),
            PruneMask("2:4", scope="head.weight", start="1 steps"),
            PhaseUnfreeze([Phase("4 steps"), Phase({"monitor": "train/loss"}, **chosen), Phase(train="blocks")]),
            RunReport(),
        ]

    ends = []
    for given in (callbacks(), pickle.loads(pickle.dumps(callbacks()))):
        net = Net()
        fit(net, *given, max_epochs=1, logger=CSVLogger(str(tmp_path)))
        assert sum(int((block.lin.weight == 0).sum()) for block in net.blocks) == 72
        ends.append(weights(net))
    assert not changed(*ends)


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


@pytest.mark.parametrize("ours", ["freeze", "prune"])
@pytest.mark.parametrize("given", ["loader", "sampler", "batch sampler"])
def test_a_criterion_leaves_the_order_of_a_loader_with_its_own_generator_as_it_is(ours: str, given: str) -> None:
    def order(*callbacks: Any) -> list[float]:
        seen: list[float] = []

        class Looks(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Any:
                if self.training:  # a criterion looks in eval mode
                    seen.append(float(batch[0].sum()))
                return super().training_step(batch, batch_idx)

        own, examples = torch.Generator().manual_seed(5), data()
        sampler = RandomSampler(examples, replacement=True, generator=own)  # draws as it goes
        how: dict[str, Any] = {
            "loader": {"batch_size": 8, "shuffle": True, "generator": own},
            "sampler": {"batch_size": 8, "sampler": sampler},
            "batch sampler": {"batch_sampler": BatchSampler(sampler, 8, False)},
        }[given]
        trainer(*callbacks).fit(Looks(), DataLoader(examples, **how))
        return seen

    callback = FreezeMask("head", score="fisher", density=0.5) if ours == "freeze" else PruneMask(0.2, score="fisher")
    assert order(callback) == order()


def test_a_criterion_passes_over_batches_without_a_loss() -> None:
    class Skips(Net):
        def __init__(self, some: bool) -> None:
            super().__init__()
            self.some = some

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if not self.training and not (self.some and float(batch[0].sum()) > 0):
                return None
            return super().training_step(batch, batch_idx)

    class Shown(Net):
        """The same batches, and those alone."""

        def mask_loss(self, batch: Any) -> Any:
            return self.loss(batch) if float(batch[0].sum()) > 0 else None

    ends = []
    for net in (Skips(some=True), Shown()):
        freeze = FreezeMask(score="fisher", density=0.3)
        fit(net, freeze)
        ends.append(freeze.masks)
    assert ends[0] == ends[1]
    with pytest.raises(ValueError, match=r"needs training batches with a loss, and the training data gave none"):
        fit(Skips(some=False), FreezeMask(score="fisher", density=0.3))

    def own(params: Any, context: Any) -> Any:
        for batch in context.batches:
            context.loss(batch)
        return {name: p.detach().abs() for name, p in params.items()}

    with pytest.raises(ValueError, match=r"no loss came back for this batch; let the criterion pass over it"):
        fit(Shown(), FreezeMask(score=own, density=0.3))


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
