"""The ways of holding scattered entries give equal networks; they differ in what they cost and in what is in ``.grad``."""

import copy
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch.callbacks import ModelCheckpoint
from mask_nets import Block, Net, fit, loader
from torch import Tensor

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask

PLANS: dict[str, Callable[[str], list[Any]]] = {
    "freeze": lambda e: [FreezeMask("head", score="random", density=0.3, engine=e)],
    "drawn anew": lambda e: [FreezeMask("head", score="random", density=0.3, refresh="3 steps", engine=e)],
    "columns": lambda e: [
        FreezeMask("head", score="random", density=0.3, structure="column", refresh="3 steps", engine=e)
    ],
    "SET": lambda e: [PruneMask(0.7, start="0%", end="80%", every="2 steps", regrow="random", engine=e)],
    "rows": lambda e: [FreezeMask("head", score="magnitude", density=0.3, structure="row", engine=e)],
    "ramp": lambda e: [PruneMask(0.8, start="1 steps", end="10 steps", every="2 steps", engine=e)],
    "RigL": lambda e: [PruneMask(0.7, start="0%", end="80%", every="2 steps", regrow="gradient", engine=e)],
    "2:4": lambda e: [PruneMask("2:4", scope="blocks.*.lin.weight", schedule="constant", start="3 steps", engine=e)],
    "phases": lambda e: [
        PhaseUnfreeze(
            [
                Phase("4 steps", train="head", engine=e),
                Phase(
                    "9 steps", train="head", score="magnitude", density=0.2, lr_scale={"head": 0.5, "*": 0.1}, engine=e
                ),
                Phase("12 steps", train=["head", "blocks"], warmup="2 steps", engine=e),
                Phase(score="random", density=0.25, engine=e),
            ]
        )
    ],
    "together": lambda e: [
        FreezeMask("head", score="random", density=0.4, engine=e),
        PruneMask(0.3, start="1 steps", end="10 steps", every="2 steps", engine=e),
    ],
}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that Lightning's loggers print."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, logger = Keep(), rank_zero_module.log
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(keep)
    logger.setLevel(level)


def equal(a: pl.LightningModule, b: pl.LightningModule) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def optimizer_tensors(trainer: pl.Trainer) -> list[Tensor]:
    return [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v) and v.dim()]


class Alive(pl.Callback):
    """What is alive when a step begins: numbers in the optimizer's state, in ``.grad``, and the groups."""

    def __init__(self) -> None:
        self.state: list[int] = []
        self.gradients: list[int] = []
        self.groups: list[list[Any]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        owned = {id(p): p for g in optimizer.param_groups for p in g["params"]}
        every = owned | {id(p): p for p in pl_module.parameters()}
        self.gradients.append(sum(p.grad.numel() for p in every.values() if p.grad is not None))
        self.state.append(sum(t.numel() for t in optimizer_tensors(trainer)))
        self.groups.append([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


@pytest.mark.parametrize("plan", PLANS)
def test_compact_equals_dense(plan: str) -> None:
    nets = {engine: Roomy() if plan == "columns" else Net() for engine in ("compact", "dense")}
    callbacks = {engine: PLANS[plan](engine) for engine in nets}
    for engine, net in nets.items():
        fit(net, *callbacks[engine])
    assert equal(nets["compact"], nets["dense"])
    assert not equal(nets["compact"], Net())
    assert callbacks["compact"][-1].masks == callbacks["dense"][-1].masks


def wide(engine: str) -> tuple[Alive, FreezeMask]:
    class Wide(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(torch.nn.Sequential(torch.nn.Linear(12, 4000), torch.nn.Linear(4000, 12)))

    alive, mask = Alive(), FreezeMask(score="random", density=0.01, engine=engine)
    fit(Wide(), mask, alive, max_steps=4)
    return alive, mask


def test_memory_follows_the_density() -> None:
    alive, mask = wide("auto")
    dense, _ = wide("dense")
    assert max(alive.state) <= 2 * mask.masks.count() * 1.3 + 12 * 16, "two moments an entry, and filling"
    assert max(alive.gradients) <= mask.masks.count() * 1.3 + 12 * 16
    assert max(dense.state) > 50 * max(alive.state)
    assert max(dense.gradients) > 50 * max(alive.gradients)
    assert [len(g) for g in alive.groups] == [len(g) for g in dense.groups]
    assert alive.groups == dense.groups


# Whole rows and columns.


class Roomy(Net):
    """A network with linears large enough to train by lines."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = torch.nn.Linear(8, 96)
            self.blocks = torch.nn.ModuleList([Block(96, "layer", 0.0) for _ in range(2)])
            self.head = torch.nn.Linear(96, 2)


@pytest.mark.parametrize(("structure", "held_by"), [("row", "rows"), ("column", "columns"), ("tensor", None)])
@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_lines_of_a_linear_train_without_a_dense_gradient(structure: str, held_by: str | None, engine: str) -> None:
    nets, seen = {}, []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(all(block.lin.weight.grad is None for block in pl_module.blocks))

    for way in (engine, "dense"):
        nets[way] = Roomy()
        callback = FreezeMask(
            "head", scope="blocks.*.lin.weight", score="magnitude", density=0.25, structure=structure, engine=way
        )
        held: list[str] = []

        class Summary(pl.Callback):
            def on_train_end(self, trainer: Any, pl_module: Any, held: list[str] = held) -> None:
                held.extend(row["held by"] for row in callback.summary())  # noqa: B023

        fit(nets[way], callback, Look(), Summary())
        if way == "auto" and held_by:
            assert all(seen)
            assert held.count(held_by) == 2
    assert equal(nets[engine], nets["dense"])
    assert not equal(nets[engine], Roomy())


class Words(Net):
    """An embedding table and its lookup by two ways."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.direct = torch.nn.Embedding(5000, 12), direct

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x * 1000).long().remainder(5000)
        rows = torch.nn.functional.embedding(tokens, self.table.weight) if self.direct else self.table(tokens)
        return self.head(rows.mean(1))


@pytest.mark.parametrize("direct", [False, True])
def test_a_few_new_tokens_do_not_cost_a_table(direct: bool) -> None:
    mask = torch.zeros(5000, 12, dtype=torch.bool)
    used = (next(iter(loader()))[0] * 1000).long().remainder(5000).unique()
    mask[used[::2]] = True
    masks = MaskSet({"table.weight": mask})
    nets, alive = {}, {}
    for engine in ("auto", "dense"):
        nets[engine], alive[engine] = Words(direct), Alive()
        fit(nets[engine], FreezeMask(["head"], engine=engine, mask=masks), alive[engine])
    moved = (nets["auto"].table.weight != Words(direct).table.weight).any(1)
    assert torch.equal(nets["dense"].table.weight != Words(direct).table.weight, mask)
    if direct:  # the first step finds out that nobody calls the table
        assert torch.equal(moved, mask.any(1))
        return
    assert equal(nets["auto"], nets["dense"])
    assert max(alive["auto"].gradients) <= mask.sum() + 26
    assert max(alive["auto"].state) <= 2 * (mask.sum() + 26)


class Penalised(Roomy):
    """Uses weights past their modules' forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def loss(self, batch: Any) -> Tensor:
        loss = super().loss(batch)
        if self.how == "penalty":
            return loss + 0.1 * sum(p.square().sum() for p in self.parameters())
        if self.how == "only past its forward":
            return loss + torch.nn.functional.linear(torch.ones(96), self.blocks[1].lin.weight).square().mean()
        return loss


@pytest.mark.parametrize("structure", ["row", "column", "entry"])
@pytest.mark.parametrize("how", ["penalty", "only past its forward"])
def test_gradients_that_come_past_the_forward_count(how: str, structure: str) -> None:
    nets = {}
    for engine in ("auto", "dense"):
        nets[engine] = Penalised(how)
        mask = FreezeMask(
            "head", scope="blocks.*.lin.weight", score="random", density=0.25, structure=structure, engine=engine
        )
        fit(nets[engine], mask)
    close = all(
        torch.allclose(p, q, atol=1e-5)
        for p, q in zip(nets["auto"].parameters(), nets["dense"].parameters(), strict=True)
    )
    assert close, "two gradients may be added in another order"


@pytest.mark.parametrize("score", ["fisher", "gradient"])
def test_a_criterion_sees_the_gradients_of_what_is_held_by_lines(score: str) -> None:
    masks = {}
    for engine in ("auto", "dense"):
        mask = FreezeMask(
            "head",
            scope="blocks.*.lin.weight",
            score=score,
            density=0.25,
            structure="row",
            batches=2,
            refresh="3 steps",
            engine=engine,
        )
        fit(Roomy(), mask)
        masks[engine] = mask.masks
    assert masks["auto"] == masks["dense"]


class Overrides(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class Zeroes(Net):
    def optimizer_zero_grad(self, *_: Any) -> None:
        self.zero_grad()


@pytest.mark.parametrize("make", [Overrides, Zeroes])
def test_who_takes_gradients_into_their_own_hands_gets_them(make: type[Net]) -> None:
    nets = {engine: make() for engine in ("auto", "dense")}
    for engine, net in nets.items():
        fit(net, FreezeMask("head", score="random", density=0.3, engine=engine))
    assert equal(nets["auto"], nets["dense"])


# Code of the user's that reads gradients.


class ReadsInTheModule(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.seen = {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}


class ReadsInACallback(pl.Callback):
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        pl_module.seen = {n: None if p.grad is None else p.grad.clone() for n, p in pl_module.named_parameters()}


class ByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.loss(batch))
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.01)
        self.seen = {n: None if p.grad is None else p.grad.clone() for n, p in self.named_parameters()}
        optimizer.step()  # type: ignore[union-attr]


READERS: dict[str, Callable[[], tuple[Net, list[Any], str]]] = {
    "module": lambda: (ReadsInTheModule(), [], "ReadsInTheModule.on_before_optimizer_step may read gradients"),
    "callback": lambda: (Net(), [ReadsInACallback()], "ReadsInACallback may read gradients"),
    "manual": lambda: (ByHand(), [], "manual optimization may read gradients"),
}


@pytest.mark.parametrize("kind", READERS)
def test_who_may_read_gradients_gets_them_whole(kind: str, said: list[str]) -> None:
    net, more, reason = READERS[kind]()
    mask = FreezeMask("head", score="random", density=0.3)
    fit(net, mask, *more)
    assert any(f"Scattered entries are held dense: {reason}" in line for line in said)
    gradients: dict[str, Tensor] = net.seen  # type: ignore[assignment]
    for name, allowed in mask.masks.items():
        if allowed.any() and kind != "callback":  # that one reads before the masks are applied, or after: by its place
            assert gradients[name] is not None
            assert not bool(gradients[name][~allowed].any()), name
    assert gradients["blocks.0.lin.weight"] is not None


def test_a_user_who_asks_for_compact_gets_it(said: list[str]) -> None:
    net, mask = ReadsInTheModule(), FreezeMask("head", score="random", density=0.3, engine="compact")
    fit(net, mask)
    assert any("held compact: engine='compact' was asked for; .grad of such a tensor is None" in line for line in said)
    assert net.seen["blocks.0.lin.weight"] is None
    assert net.seen["head.weight"] is not None


def test_an_optimizer_that_does_not_go_by_entries_is_served_dense(said: list[str]) -> None:
    net = Net(make=lambda module: torch.optim.Adafactor(module.parameters(), lr=0.01))
    before = copy.deepcopy(net)
    mask = FreezeMask("head", score="random", density=0.3, refresh="4 steps", engine="compact")
    fit(net, mask)
    line = "dense, as Adafactor is not known to update each entry by itself"
    assert sum(line in each for each in said) == 1
    assert {row["held by"] for row in mask.summary() if 0 < row["density"] < 1} <= {"dense", "-"}
    assert not equal(net, before)


class Writes(pl.Callback):
    """Code that changes weights by itself, at several moments of a step."""

    def __init__(self, moment: str, mask: FreezeMask) -> None:
        setattr(self, moment, self.write)
        self.mask = mask

    def write(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.head.weight.mul_(0.9)
            weight = pl_module.blocks[0].lin.weight
            weight.copy_(torch.where(self.mask.masks["blocks.0.lin.weight"], weight.clamp(-0.2, 0.2), weight))


@pytest.mark.parametrize(
    "moment", ["on_train_batch_start", "on_after_backward", "on_before_optimizer_step", "on_train_batch_end"]
)
def test_what_others_write_to_active_entries_stays(moment: str) -> None:
    nets = {}
    for engine in ("compact", "dense"):
        nets[engine] = Net()
        whole = FreezeMask(
            ["head", "blocks.1"], scope="blocks.0.lin.weight", score="random", density=0.4, engine=engine
        )
        fit(nets[engine], whole, Writes(moment, whole), max_steps=3)
    assert equal(nets["compact"], nets["dense"])
    assert float(nets["dense"].blocks[0].lin.weight.detach()[whole.masks["blocks.0.lin.weight"]].abs().max()) < 0.3


# From one engine to another.


def saved(engine: str, plan: str, folder: Path, at: int, net: Net) -> tuple[Net, Path]:
    keep = ModelCheckpoint(str(folder), every_n_train_steps=at, save_top_k=-1, filename="{step}")
    torch.manual_seed(5)
    fit(net, *PLANS[plan](engine), keep, enable_checkpointing=True)
    return net, folder / f"step={at}.ckpt"


@pytest.mark.parametrize("plan", ["freeze", "drawn anew", "columns", "ramp", "RigL", "phases", "together"])
@pytest.mark.parametrize(("before", "after"), [("dense", "compact"), ("compact", "dense"), ("compact", "compact")])
def test_a_checkpoint_of_one_engine_resumes_in_another(plan: str, before: str, after: str, tmp_path: Path) -> None:
    make = Roomy if plan == "columns" else functools.partial(Net, dropout=0.1)
    straight, path = saved(before, plan, tmp_path, 8, make())
    resumed = make()
    fit(resumed, *PLANS[plan](after), ckpt=str(path))
    assert equal(resumed, straight)


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_moments_outlive_another_mask_on_resume(engine: str, tmp_path: Path) -> None:
    """The user changes the recipe and resumes: entries that are active under both keep their moments."""
    first, second = (FreezeMask("head", score="random", density=0.3, seed=s, engine=engine) for s in (0, 1))
    keep = ModelCheckpoint(str(tmp_path), every_n_train_steps=8, save_top_k=-1, filename="{step}")
    fit(
        Net(),
        FreezeMask("head", score="random", density=0.3, engine="compact"),
        keep,
        enable_checkpointing=True,
        max_steps=8,
    )
    reference = Net()
    moments: dict[str, Tensor] = {}

    class Look(pl.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            first._session.engine.release()  # type: ignore[union-attr]
            optimizer = trainer.optimizers[0]
            moments.update(
                {n: optimizer.state[p]["exp_avg"] for n, p in pl_module.named_parameters() if p in optimizer.state}
            )

    fit(reference, first, Look(), max_steps=8)
    name, seen = "blocks.0.lin.weight", []

    class LookAtStart(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            session = second._session
            engine_ = session.engine  # type: ignore[union-attr]
            state = trainer.optimizers[0].state[engine_._in_optimizer(name)]["exp_avg"]  # type: ignore[union-attr]
            slots = engine_._compact[name].slots if name in engine_._compact else None  # type: ignore[union-attr]
            seen.append(state.clone() if slots is None else slots.scatter(state))

    fit(Net(), second, LookAtStart(), ckpt=str(tmp_path / "step=8.ckpt"), max_steps=9)
    both = first.masks[name] & second.masks[name]
    assert int(both.sum()) > 0
    assert torch.equal(seen[0][both], moments[name][both])
    assert bool(moments[name][both].any())


@pytest.mark.parametrize("engine", ["compact", "dense"])
def test_optimizer_state_finds_its_parameters_by_name(engine: str, tmp_path: Path) -> None:
    """The user sorts the parameters into groups in between, in another order."""

    def sorted_into_groups(module: Any) -> torch.optim.Optimizer:
        vectors = [p for p in module.parameters() if p.dim() < 2]
        matrices = [p for p in module.parameters() if p.dim() > 1]
        return torch.optim.AdamW([{"params": matrices[::-1]}, {"params": vectors}], lr=0.5, weight_decay=0.1)

    mask = functools.partial(FreezeMask, "head", score="random", density=0.3, engine=engine)
    keep = ModelCheckpoint(str(tmp_path), every_n_train_steps=8, save_top_k=-1, filename="{step}")
    straight, resumed = Net(), Net(make=sorted_into_groups)
    fit(straight, mask(), keep, enable_checkpointing=True)
    run = fit(resumed, mask(), ckpt=str(tmp_path / "step=8.ckpt"))
    assert equal(resumed, straight)
    assert [g["lr"] for g in run.optimizers[0].param_groups] == [0.02, 0.02], "the rate in the checkpoint counts"
