"""Tied weights, gradient checkpointing, several optimizers, batch statistics, torch.compile."""

import copy
import itertools
from typing import Any

import lightning as L
import pytest
import torch
from plain_and_ours import (
    ENGINES,
    Batch,
    Setting,
    Task,
    adamw,
    fit,
    inject,
    make_batches,
    make_masks,
    make_net,
    moved,
    prefixed,
    reference,
    same,
    trained,
)
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_mask import FreezeMask, MaskSet
from lightning_mask.core import MaskEngine


def half(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def check_against_reference(net: nn.Module, masks: dict[str, Tensor], batches: list[Batch], **more: Any) -> None:
    for engine in ENGINES:
        ours, plain = copy.deepcopy(net), copy.deepcopy(net)
        start, _ = reference(plain, adamw, batches, masks)
        fit(Task(ours), [FreezeMask(mask=MaskSet(prefixed(masks)))], batches, Setting(engine=engine), **more)
        assert moved(ours, start, masks) == []
        assert same(ours, plain) == []
        assert trained(ours, start, masks) > 0


class Tied(nn.Module):
    """The output head is the embedding, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.middle = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(x.long()).mean(1))))


@pytest.mark.parametrize("whole", [False, True])
def test_tied_weights(whole: bool):
    torch.manual_seed(0)
    net = Tied()
    masks = {n: half(tuple(p.shape)) for n, p in net.named_parameters()}
    assert list(masks) == ["embed.weight", "middle.weight", "middle.bias"]
    if whole:
        masks["embed.weight"] = torch.zeros_like(masks["embed.weight"])
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(20, (4, 3), generator=generator), torch.randn(4, 20, generator=generator)) for _ in range(5)
    ]
    check_against_reference(net, masks, batches)
    assert net.head.weight is net.embed.weight


class Checkpointed(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(False)
        return checkpoint(self.net, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_gradient_checkpointing():
    check_against_reference(Checkpointed(make_net()), prefixed(make_masks()), make_batches())


# Several optimizers.


class TwoOptimizers(L.LightningModule):
    """Manual optimization; both optimizers hold ``some``, the first also the body, the second also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.automatic_optimization = make_net(), False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        for optimizer, factor in zip(self.optimizers(), (1.0, 0.5), strict=True):  # type: ignore[arg-type]
            optimizer.zero_grad()
            loss = factor * (self.net(batch[0]) - batch[1]).square().mean()
            self.manual_backward(loss)
            if batch_idx % 2:
                self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:  # type: ignore[override]
        return two_optimizers(self.net)


def two_optimizers(net: nn.Module) -> list[Optimizer]:
    shared = [p for n, p in net.named_parameters() if n.startswith("some")]
    head = [p for n, p in net.named_parameters() if n.startswith("head")]
    body = [p for n, p in net.named_parameters() if not n.startswith(("head", "some"))]
    return [AdamW([*body, *shared], lr=0.01, weight_decay=0.1), SGD([*head, *shared], lr=0.1, momentum=0.9)]


def test_two_optimizers_and_what_they_share():
    module, masks, batches = TwoOptimizers(), make_masks(), make_batches()
    plain, start = copy.deepcopy(module.net), copy.deepcopy(module.net)
    optimizers = two_optimizers(plain)
    for i, (x, y) in enumerate(batches):
        for optimizer, factor in zip(optimizers, (1.0, 0.5), strict=True):
            optimizer.zero_grad()
            (factor * (plain(x) - y).square().mean()).backward()
            for name, p in plain.named_parameters():
                if masks[name].any():
                    p.grad.copy_(torch.where(masks[name], p.grad, torch.zeros_like(p.grad)))
                else:
                    p.grad = None
            if i % 2:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
            optimizer.step()
            with torch.no_grad():
                for name, p in plain.named_parameters():
                    p.copy_(torch.where(masks[name], p, start.get_parameter(name)))
    seen: list[list[str]] = []

    class AfterEach(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            seen.append(moved(module.net, start, masks))

    fit(module, [FreezeMask(mask=MaskSet(prefixed(masks))), AfterEach()], batches)
    assert seen == [[]] * 2 * len(batches)
    assert moved(module.net, start, masks) == []
    assert same(module.net, plain) == []


def test_bad_gradients_of_held_entries_with_two_optimizers():
    module, clean, masks = TwoOptimizers(), TwoOptimizers(), make_masks()
    inject(module.net, {n: ~m for n, m in masks.items()}, float("nan"))
    for each in (module, clean):
        fit(each, [FreezeMask(mask=MaskSet(prefixed(masks)))], make_batches())
    assert same(module, clean) == []


# Batch statistics.


class Normed(nn.Module):
    """Normalisation of every kind: held, trained, without parameters inside a held and inside a trained part."""

    def __init__(self) -> None:
        super().__init__()
        self.held = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False), nn.Tanh())
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.lost = nn.BatchNorm2d(4, track_running_stats=False)
        self.part = nn.BatchNorm1d(16)
        self.head = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.lost(self.instance(self.held(x))).flatten(1)))


def statistics(net: nn.Module) -> dict[str, Tensor]:
    return {n: b.clone() for n, b in net.named_buffers()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {n.rpartition(".")[0] for n, b in before.items() if not torch.equal(b, after[n])}


def normed_masks(net: nn.Module) -> dict[str, Tensor]:
    masks = {n: torch.full(p.shape, n.startswith("head")) for n, p in net.named_parameters()}
    masks["part.weight"][3] = True
    return masks


MOVING = {"part", "head.1", "head.2"}


def test_statistics_of_held_normalisation_do_not_move():
    torch.manual_seed(0)
    net = Normed()
    before, masks = statistics(net), normed_masks(net)
    with torch.no_grad():
        x = make_batches()[0][0]
        expected = copy.deepcopy(net.held).eval()(x)
    module = Task(net)
    outputs: list[Tensor] = []
    net.held.register_forward_hook(
        lambda _, inputs, output: outputs.append(output) if torch.equal(inputs[0], x) else None
    )

    class Train(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            pl_module.train()

    fit(module, [FreezeMask(mask=MaskSet(prefixed(masks))), Train()], make_batches())
    assert changed(before, statistics(net)) == MOVING
    assert torch.equal(outputs[0], expected), "stored statistics are used in the forward pass"


def test_statistics_in_a_plain_loop():
    torch.manual_seed(0)
    net = Normed().eval()  # as a pretrained network comes
    before, masks = statistics(net), normed_masks(net)
    optimizer = adamw(net.parameters())
    engine = MaskEngine(net, optimizer, masks)

    def run(mode: bool) -> set[str]:
        then = statistics(net)
        net.train(mode)
        for x, y in make_batches(2):
            optimizer.zero_grad()
            (net(x) - y).square().mean().backward()
            engine.after_backward()
            optimizer.step()
        assert all(m.training is mode for m in net.modules()), "the mode is the user's"
        return changed(then, statistics(net))

    assert run(True) == MOVING
    assert run(False) == set()
    assert run(True) == MOVING
    with pytest.raises(ValueError, match="expected 4D input"):
        net.held[1](torch.randn(2, 4))
    assert all(m.training for m in net.modules()), "also after an error in the forward pass"
    engine.update({n: torch.ones_like(m) for n, m in masks.items()})
    assert run(True) == {"held.1", "held.2", "instance"} | MOVING, "what trains again moves again"
    engine.update(masks)
    assert run(True) == MOVING
    engine.release()
    assert run(True) == {"held.1", "held.2", "instance"} | MOVING
    assert changed(before, statistics(net)) != set()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_network(backend: str):
    """The reference is compiled too: a compiler's rounding is its own."""
    if backend == "inductor":  # as small as can be, because compiling takes long
        net: nn.Module = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        masks = {n: half(tuple(p.shape)) for n, p in net.named_parameters()}
    else:
        net, masks = make_net(), make_masks()
    batches, plain = make_batches(4), copy.deepcopy(net)
    for n, p in plain.named_parameters():
        p.requires_grad_(bool(masks[n].any()))
    plain.compile(backend=backend)
    net.compile(backend=backend)
    start, _ = reference(plain, adamw, batches, masks)
    fit(Task(net), [FreezeMask(mask=MaskSet(prefixed(masks)))], batches)
    assert moved(net, start, masks) == []
    assert same(net, plain) == []
    assert trained(net, start, masks) > 20


def test_held_statistics_of_a_compiled_network():
    torch.manual_seed(0)
    net = Normed()
    before, masks = statistics(net), normed_masks(net)
    start = copy.deepcopy(net)
    module = Task(net)
    module.net.compile(backend="aot_eager")
    fit(module, [FreezeMask(mask=MaskSet(prefixed(masks)))], make_batches(4))
    assert changed(before, statistics(net)) == MOVING
    assert moved(net, start, masks) == []
    assert all(m.training for m in net.modules())


def test_accumulation_that_does_not_divide_the_epoch():
    """The last window of an epoch is short; Lightning steps on it all the same."""
    for count, accumulate in itertools.product((5, 7), (2, 3)):
        net, masks = make_net(), make_masks()
        start = copy.deepcopy(net)
        trainer = fit(
            Task(net), [FreezeMask(mask=MaskSet(prefixed(masks)))], make_batches(count), Setting(accumulate=accumulate)
        )
        assert trainer.global_step == -(-count // accumulate)
        assert moved(net, start, masks) == []
