"""What PruneMask does beside holding zeros: sums over steps, lottery tickets, budgets by pattern, refusals, its record."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from mask_nets import Net, Watch, fit, loader, weights
from torch import Tensor, nn

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask

SCOPE = [f"blocks.{i}.lin.weight" for i in (0, 1)]


def sgd(module: Any) -> Any:
    return torch.optim.SGD(module.parameters(), lr=0.1)


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_movement_is_summed_over_the_steps_of_training(engine: str) -> None:
    """By hand: plain SGD with the masks that were seen, the sum of -g * w of each step, the lowest sums pruned."""
    net, watch, seen = Net(make=sgd), Watch(), []

    class Masks(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append({n: m.clone() for n, m in pruner.masks.items()})

    steps = {"start": "3 steps", "end": "12 steps", "every": "3 steps"}
    pruner = PruneMask(0.6, score="movement", scope=SCOPE, schedule="linear", engine=engine, **steps)
    fit(net, pruner, watch, Masks(), max_epochs=2)
    plain = Net()
    named = dict(plain.named_parameters())
    sums = {n: torch.zeros_like(named[n]) for n in SCOPE}
    alive = {n: torch.ones_like(named[n], dtype=torch.bool) for n in SCOPE}
    batches = [*loader(), *loader()]
    for step, batch in enumerate(batches):
        plain.zero_grad()
        plain.loss(batch).backward()
        if 3 <= step <= 12 and (step - 3) % 3 == 0:
            zeros = math.floor(0.6 * (step - 3) / 9 * 288 + 0.5)
            worth = torch.cat([sums[n].masked_fill(~alive[n], -math.inf).view(-1) for n in SCOPE])
            kept = torch.zeros(288, dtype=torch.bool)
            kept[worth.sort(descending=True, stable=True).indices[: 288 - zeros]] = True
            alive = {n: m.view(12, 12) for n, m in zip(SCOPE, kept.split(144), strict=True)}
        with torch.no_grad():
            for n in SCOPE:
                named[n].masked_fill_(~alive[n], 0)
                named[n].grad.masked_fill_(~alive[n], 0)  # type: ignore[union-attr]
                sums[n] -= named[n].grad * named[n]  # type: ignore[operator]
            for p in named.values():
                p -= 0.1 * p.grad  # type: ignore[operator]
        assert all(torch.equal(seen[step][n], alive[n]) for n in SCOPE), step
    assert sum(int((~m).sum()) for m in alive.values()) == math.floor(0.6 * 288 + 0.5)


def test_a_step_that_a_gradient_scaler_skips_is_no_movement() -> None:
    """With so large a scale the first gradients are infinite in float16: the scaler skips these steps and lowers it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=1000)
    net, watch = Net(make=sgd), Watch()
    pruner = PruneMask(0.6, score="movement", scope=SCOPE, schedule="constant", start="10 steps", end="10 steps")
    fit(net, pruner, watch, plugins=[MixedPrecision("16-mixed", device="cpu", scaler=scaler)])
    skipped = [step for step in range(10) if not watch.moved_at(step)]
    assert 0 < len(skipped) < 9
    assert skipped == list(range(len(skipped)))
    sums = {n: torch.zeros(12, 12) for n in SCOPE}
    for step in range(len(skipped), 10):
        for n in SCOPE:
            before, after = watch.weights[step][n], watch.weights[step + 1][n]
            sums[n] += (after - before) / 0.1 * before  # what plain SGD did is -lr * g
    kept = torch.cat([(net.get_parameter(n) != 0).view(-1) for n in SCOPE])
    worth = torch.cat([sums[n].view(-1) for n in SCOPE])
    assert int(kept.sum()) == 115
    assert float(worth[kept].min()) > float(worth[~kept].max()) - 1e-6


def test_a_later_phase_selects_by_the_movement_of_the_earlier_one() -> None:
    net, watch = Net(make=sgd), Watch()
    phases = [Phase("5 steps"), Phase(score="movement", scope=SCOPE, density=30)]
    fit(net, PhaseUnfreeze(phases), watch)
    plain, sums = Net(), {n: torch.zeros(12, 12) for n in SCOPE}
    optimizer = sgd(plain)
    for batch in list(loader())[:5]:
        optimizer.zero_grad()
        plain.loss(batch).backward()
        for n in SCOPE:
            p = plain.get_parameter(n)
            sums[n] -= p.grad * p.detach()  # type: ignore[operator]
        optimizer.step()
    best = torch.cat([sums[n].view(-1) for n in SCOPE]).topk(30).indices
    for n, first in zip(SCOPE, (0, 144), strict=True):
        chosen = torch.zeros(288, dtype=torch.bool).index_fill(0, best, True)[first : first + 144].view(12, 12)
        same = watch.weights[5][n] == watch.weights[-1][n]
        assert bool(same[~chosen].all())
        assert not bool(same[chosen].all())


def test_a_rewound_cycle_brings_back_its_momentum_at_once() -> None:
    def make(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    seen: list[tuple[float, float]] = []

    class Look(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (group,) = trainer.optimizers[0].param_groups
            seen.append((group["lr"], group["betas"][0]))

    fit(Net(make=make), PruneMask(0.5, scope=SCOPE, schedule="constant", start="7 steps", rewind="1 steps"), Look())
    assert seen[8:15] == seen[1:8]
    assert len(set(seen[1:8])) == 7


@pytest.mark.parametrize("rewind_lr", [True, False])
def test_a_lottery_ticket_returns_to_the_weights_and_the_rate_of_its_step(rewind_lr: bool) -> None:
    def make(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    net, watch = Net(make=make), Watch()
    pruner = PruneMask(
        0.75, scope=SCOPE, schedule="geometric", start="2 steps", end="12 steps", every="5 steps", rewind="2 steps",
        rewind_lr=rewind_lr,
    )  # fmt: skip
    fit(net, pruner, watch)
    assert [row["step"] for row in pruner.history] == [7, 12]
    zeros = [round(row["sparsity"] * 288) for row in pruner.history]
    assert zeros == [math.floor((1 - 0.25**0.5) * 288 + 0.5), math.floor(0.75 * 288 + 0.5)]
    early = watch.weights[2]
    for step in (8, 13):  # Watch keeps the weights before they go back; the step after starts from them
        rates = [r[0] for r in watch.rates]
        assert rates[step] == pytest.approx(0.02 * 0.9 ** (2 if rewind_lr else step), rel=1e-12)
    rewound: list[dict[str, Tensor]] = []

    class Look(Watch):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            rewound.append(weights(pl_module))

    again = Net(make=make)
    pruner = PruneMask(
        0.75, scope=SCOPE, schedule="geometric", start="2 steps", end="12 steps", every="5 steps", rewind="2 steps",
        rewind_lr=rewind_lr,
    )  # fmt: skip
    fit(again, pruner, Look())
    for name, value in rewound[13].items():
        mask = pruner.masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(mask, early[name], torch.zeros_like(value))), name


def test_each_pattern_has_a_sparsity_of_its_own_at_every_step() -> None:
    net, zeros = Net(), []

    class Count(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            zeros.append([int((pl_module.get_parameter(n) == 0).sum()) for n in [*SCOPE, "stem.weight"]])

    steps = {"start": "0 steps", "end": "10 steps", "every": "2 steps", "schedule": "cosine"}
    fit(net, PruneMask({"blocks.0": 0.9, "blocks.*": 0.25}, **steps), Count())
    for step, counted in enumerate(zeros):
        t = min(step - step % 2, 10) / 10
        share = (1 - math.cos(math.pi * t)) / 2
        assert counted == [math.floor(s * share * 144 + 0.5) for s in (0.9, 0.25)] + [0], step


def test_what_is_held_is_pruned_when_asked() -> None:
    before = weights(Net())
    net = Net()
    freeze = FreezeMask(["head", "blocks.1.lin.bias"], score="random", density=0.1, scope=SCOPE)
    fit(net, freeze, PruneMask(0.8, scope=SCOPE, start="2 steps", end="6 steps", prune_held=True))
    assert sum(int((net.get_parameter(n) == 0).sum()) for n in SCOPE) == math.floor(0.8 * 288 + 0.5)
    for name in SCOPE:
        now = net.get_parameter(name).detach()
        still = ~freeze.masks[name] & (now != 0)
        assert torch.equal(now[still], before[name][still])
        assert bool(still.any())


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_what_a_phase_holds_behind_a_straight_through_mask_shows_the_same_until_it_is_lifted(engine: str) -> None:
    """A pruned entry that is held does not come back, though its dense weight has grown, and none that shows is pruned."""
    phases = [Phase("6 steps", train="*"), Phase("12 steps", train=["*", "!blocks.0"]), Phase(train="*")]
    steps = {"start": "2 steps", "end": "15 steps", "every": "1 steps"}
    pruner, watch, zeros = PruneMask(0.6, scope=SCOPE, regrow="ste", engine=engine, **steps), Watch(), []

    class Count(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            zeros.append(sum(int((pl_module.get_parameter(n) == 0).sum()) for n in SCOPE))

    fit(Net(), PhaseUnfreeze(phases), pruner, watch, Count())
    ramp = [min(max(step - 2, 0) / 13, 1.0) for step in range(16)]
    assert zeros == [math.floor(0.6 * (1 - (1 - t) ** 3) * 288 + 0.5) for t in ramp]
    assert all(watch.moved_at(step).isdisjoint({SCOPE[0]}) for step in range(6, 12))
    assert any(SCOPE[0] in watch.moved_at(step) for step in range(12, 16))


def small_layer(net: Net) -> Net:
    with torch.no_grad():
        net.blocks[0].lin.weight.mul_(1e-3)
    return net


def test_a_layer_that_would_be_pruned_whole_is_refused_before_training_with_a_way_out() -> None:
    net, watch = small_layer(Net()), Watch()
    with pytest.raises(
        ValueError, match=r"would prune all of blocks\.0\.lin\.weight.* 0\.49\d\d is about the most"
    ) as e:
        fit(net, PruneMask(0.7, scope=SCOPE), watch)
    assert len(watch.weights) == 0
    most = float(str(e.value).split(" is about the most")[0].rsplit(" ", 1)[1])
    assert most == pytest.approx(143 / 288, abs=2e-3)  # all but one entry of the smaller layer
    fit(small_layer(Net()), PruneMask(most - 2e-3, scope=SCOPE, schedule="constant"))
    whole = small_layer(Net())
    fit(whole, PruneMask(0.7, scope=SCOPE, schedule="constant", allow_whole_layers=True))
    assert not bool(whole.blocks[0].lin.weight.any())


def test_a_layer_that_training_made_small_is_refused_when_its_update_is_due() -> None:
    class Shrinks(Watch):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            small_layer(pl_module)

    with pytest.raises(ValueError, match=r"would prune all of blocks\.0\.lin\.weight"):
        fit(Net(), PruneMask(0.7, scope=SCOPE, start="4 steps", schedule="constant"), Shrinks())


@pytest.mark.parametrize(
    "arguments",
    [
        {"score": "taylor", "allocation": "uniform", "batches": 2},
        {"score": "movement", "allocation": "erk"},
        {"regrow": "gradient", "allocation": "uniform", "schedule": "constant"},
        {"score": "snip", "allocation": "row", "batches": 2},
    ],
)
def test_a_share_of_each_layer_that_leaves_one_nothing_is_refused_before_training_whatever_the_score(
    arguments: dict[str, Any],
) -> None:
    watch = Watch()
    with pytest.raises(
        ValueError, match=r"PruneMask: sparsity 0\.9980 would prune all of (stem|blocks\.0\.lin)\.weight"
    ):
        fit(Net(), PruneMask(0.998, start="6 steps", end="12 steps", **arguments), watch)
    assert len(watch.weights) == 0


def test_what_freezemask_holds_of_one_layer_is_known_before_training() -> None:
    """Of all entries it holds few, of one layer too many."""
    watch, mask = Watch(), {n: torch.ones(12, 12, dtype=torch.bool) for n in SCOPE}
    mask[SCOPE[0]][:7] = False
    freeze = FreezeMask(["head"], mask=MaskSet(mask))
    prune = PruneMask(0.5, scope=SCOPE, allocation="uniform", start="6 steps")
    with pytest.raises(
        ValueError, match=r"of the 144 entries of blocks\.0\.lin\.weight cannot be reached: FreezeMask holds"
    ):
        fit(Net(), prune, freeze, watch)
    assert len(watch.weights) == 0

    def farther_down(params: Any, context: Any) -> dict[str, Tensor]:
        return {n: torch.full_like(p, float(n == SCOPE[1])) for n, p in params.items()}

    choice = FreezeMask(["head"], score=farther_down, density=0.6, scope=SCOPE)
    with pytest.raises(
        ValueError, match=r"of the 144 entries of blocks\.0\.lin\.weight cannot be reached: FreezeMask holds"
    ):
        fit(Net(), prune, choice, watch)
    assert len(watch.weights) == 0


def test_the_record_and_the_logger_tell_the_sparsity_of_each_layer(tmp_path: Path) -> None:
    pruner = PruneMask(0.5, scope=SCOPE, start="0 steps", end="8 steps", every="4 steps", schedule="linear")
    net = Net()
    run = fit(net, pruner, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert [row["step"] for row in pruner.history] == [4, 8]
    for row in pruner.history:
        mean = sum(row["layers"].values()) / 2
        assert row["sparsity"] == pytest.approx(mean) == pytest.approx(round(0.5 * row["step"] / 8 * 288) / 288)
    last = pruner.history[-1]["layers"]
    assert last == {n: float((net.get_parameter(n) == 0).sum()) / 144 for n in SCOPE}
    lines = (Path(run.logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("mask/sparsity/blocks.0.lin.weight")
    logged = [float(v) for line in lines[1:] if (v := line.split(",")[column])]
    assert logged == pytest.approx([row["layers"][SCOPE[0]] for row in pruner.history])


@pytest.mark.parametrize(("end", "said"), [(15, True), (14, False)])
def test_an_update_that_no_rewind_can_follow_is_told_before_training(end: int, said: bool, caplog: Any) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    fit(Net(), PruneMask(0.5, scope=SCOPE, end=f"{end} steps", every="5 steps", rewind="0%"), max_epochs=2)
    assert any("nothing goes back to rewind='0%'" in r.getMessage() for r in caplog.records) == said


def test_the_cost_is_told_before_training(capsys: Any, caplog: Any) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch.utilities.rank_zero")
    fit(Net(), PruneMask(0.5, score="taylor", scope=SCOPE, start="0 steps", end="8 steps", every="4 steps", batches=2))
    line = next(r.getMessage() for r in caplog.records if "are to be zero" in r.getMessage())
    assert "144 of 288 entries in scope (50.00%)" in line
    assert "from step 8 on, in 3 updates" in line
    assert "up to 6 batches, 37.5% of the run's own steps" in line
    assert "0.6 kB instead of 1.2 kB" in line


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PruneMask({}), "names nothing"),
        (lambda: PruneMask({"blocks": "2:4"}), "'2:4' of the pattern 'blocks' must be a share"),
        (lambda: PruneMask({"blocks": 1.5}), r"sparsity=1.5 must be a share"),
        (lambda: PruneMask(0.5, regrow="ste", rewind="0%"), "rewind throws them away"),
        (lambda: PruneMask(0.5, regrow="random", prune_held=True), "leave regrow or prune_held out"),
        (lambda: PruneMask("2:4", regrow="gradient"), "leave structure out, and regrow too"),
        (lambda: PruneMask(0.5, regrow="straight"), "'ste' .straight-through. or None"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_at_once(make: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize(
    ("pruners", "says"),
    [
        (
            [PruneMask({"blocks": 0.5, "blocks.0": 0.2}, scope=SCOPE)],
            "'blocks.0' names no tensor in scope that an earlier",
        ),
        ([PruneMask(0.5, scope=SCOPE, regrow="ste"), PruneMask(0.2, scope=SCOPE[:1])], "is in scope of two PruneMasks"),
    ],
)
def test_scopes_that_do_not_go_together_are_refused_before_training(pruners: list[Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit(Net(), *pruners)


class Residual(Net):
    """Two convolutions that are added, so that their channels are one, with BatchNorms; a third reads them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            del self.head  # the output comes last
            self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=False)  # type: ignore[assignment]
            self.norm = nn.BatchNorm2d(6)
            self.inner, self.outer = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 6, 3, padding=1)
            self.blocks = nn.ModuleList()
            self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x.view(-1, 1, 2, 4)))
        x = torch.relu(x + self.outer(torch.relu(self.inner(x))))
        return self.head(x.mean((2, 3)))


def test_channels_that_are_coupled_are_pruned_together() -> None:
    net = Residual()
    pruner = PruneMask(0.5, structure="channel", score="taylor", batches=2, schedule="constant", start="2 steps")
    fit(net, pruner, max_epochs=1)
    masks = pruner.masks
    assert set(masks) == {
        "stem.weight",
        "norm.weight",
        "norm.bias",
        "inner.weight",
        "inner.bias",
        "outer.weight",
        "outer.bias",
    }
    shared = [masks[n].flatten(1).any(1) for n in ("stem.weight", "outer.weight")]
    assert torch.equal(shared[0], shared[1])
    assert torch.equal(shared[0], masks["norm.weight"])
    assert torch.equal(shared[0], masks["outer.bias"])
    assert torch.equal(masks["inner.bias"], masks["inner.weight"].flatten(1).any(1))
    for name, mask in masks.items():
        assert not bool(net.get_parameter(name)[~mask].any())
        if mask.dim() > 1:
            assert torch.equal(mask, mask.flatten(1).any(1).view(-1, *[1] * (mask.dim() - 1)).expand(mask.shape))
    zeros = masks.numel() - masks.count()
    assert abs(zeros - 0.5 * masks.numel()) <= 54 + 12  # as near as whole channels come
    x = torch.randn(3, 8)
    net.eval()
    features = net.norm(net.stem(x.view(-1, 1, 2, 4)))
    assert not bool(features[:, ~shared[0]].any()), "a pruned channel is zero behind its BatchNorm"


def test_a_layer_without_channels_is_refused_by_name_with_the_reason() -> None:
    with pytest.raises(
        ValueError, match=r"stem\.weight has no channels to prune: its channels are those of outer\.weight"
    ):
        fit(Residual(), PruneMask(0.5, structure="channel", scope=["stem.weight", "inner.weight"]))
    with pytest.raises(ValueError, match=r"structure='channel' is read from a forward pass"):
        fit(Net(), FreezeMask(score="magnitude", density=0.5, structure="channel"))
