"""Pruning without training, block by block: what every layer meets, what is left alone, and what is in memory."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lightning_mask.core.one_shot import OneShot, prune
from lightning_mask.core.one_shot.walk import Walk
from tests.core.test_one_shot import correlated, one_layer, pruned


class Block(nn.Module):
    """Two layers around a shortcut."""

    def __init__(self, width: int = 12, inplace: bool = False) -> None:
        super().__init__()
        self.act, self.up, self.down = nn.ReLU(inplace), nn.Linear(width, 20), nn.Linear(20, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.down(self.up(self.act(x)).tanh())
        return x + (y if scale is None else y * scale)


class Tupled(Block):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[str, Tensor]:  # type: ignore[override]
        return "first", super().forward(x, scale)


class Stack(nn.Module):
    """Blocks behind one another, in several wirings; between an embedding and a head."""

    def __init__(self, wiring: str = "plain", depth: int = 4) -> None:
        super().__init__()
        self.wiring, self.runs = wiring, 0
        kind = Tupled if wiring == "tuple" else Block
        self.stem = nn.Linear(6, 12)
        self.blocks = nn.ModuleList(kind(inplace=wiring == "inplace") for _ in range(depth))
        self.norm = nn.BatchNorm1d(12)
        self.out = nn.Linear(12, 3)

    def forward(self, batch: Tensor) -> Tensor:
        self.runs += 1
        x, scale = self.stem(batch), batch.new_tensor(0.5)
        for i, block in enumerate(self.blocks):
            if self.wiring == "tuple":
                x = block(x, scale=scale)[1]
            elif self.wiring == "an argument of its own":
                x = block(x, batch.new_tensor(0.5))
            elif self.wiring == "by name":
                x = block(x=x, scale=scale)
            elif self.wiring == "skips":
                x = block(x, scale) + x
            elif self.wiring == "changed in place":
                x = block(x, scale).mul_(2.0) if i else block(x, scale)
            elif self.wiring == "twice":
                x = block(block(x, scale), scale)
            elif self.wiring == "parts alone":
                x = x + 0.5 * block.down(block.up(block.act(x)).tanh())  # type: ignore[operator, union-attr]
            else:
                x = block(x, scale)
        y: Tensor = self.out(self.norm(x))
        return y


CHAINED = ["plain", "tuple", "by name"]
OTHERS = ["an argument of its own", "skips", "changed in place", "inplace", "twice", "parts alone"]


def stack(wiring: str) -> tuple[Stack, list[Tensor]]:
    torch.manual_seed(0)
    model = Stack(wiring).double().eval()
    return model, [torch.randn(9, 6, dtype=torch.float64) for _ in range(5)]


def by_hand(model: Stack, batches: list[Tensor]) -> None:
    """Wanda at one half by output unit: each block from what its layers meet behind the pruned ones, with plain hooks."""
    for block in model.blocks:
        layers = [block.up, block.down]
        squares: dict[nn.Module, Tensor] = {}

        def see(layer: nn.Module, args: tuple[Tensor, ...], squares: dict[nn.Module, Tensor] = squares) -> None:
            squares[layer] = squares.get(layer, 0) + args[0].square().sum(0)

        hooks = [layer.register_forward_pre_hook(see) for layer in layers]  # type: ignore[union-attr]
        with torch.no_grad():
            for batch in batches:
                model(batch)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            weight: Tensor = layer.weight.data  # type: ignore[union-attr, assignment]
            order = (weight.abs() * squares[layer].sqrt()).argsort(dim=1)  # type: ignore[index]
            weight.scatter_(1, order[:, : weight.shape[1] // 2], 0.0)


@pytest.mark.parametrize("wiring", CHAINED + OTHERS)
def test_each_block_is_pruned_from_what_it_meets_behind_the_pruned_ones(wiring: str) -> None:
    ours, batches = stack(wiring)
    theirs, _ = stack(wiring)
    result = prune(OneShot("wanda", 0.5, scope="blocks.*.weight"), ours, ours, batches)
    runs = ours.runs
    if wiring == "parts alone":  # the blocks themselves are never called, so each layer is seen by itself
        assert [report.name for report in result.layers[:2]] == ["blocks.0.up.weight", "blocks.0.down.weight"]
        return
    by_hand(theirs, batches)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-12, atol=0, msg=name)
    caught = {"changed in place": 3} | dict.fromkeys(CHAINED, 1)  # of four blocks; its first two are a chain
    assert runs == 5 + 1 + 5 * caught.get(wiring, 4), "how often the whole model is run"


@pytest.mark.parametrize("wiring", CHAINED + OTHERS)
def test_nothing_else_is_touched(wiring: str) -> None:
    model, batches = stack(wiring)
    model.train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scope = ["blocks.1", "out", "!*.bias"]
    result = prune(OneShot("obs", 0.5, scope=scope), model, model, batches)
    assert list(result.masks) == ["blocks.1.up.weight", "blocks.1.down.weight", "out.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in result.masks), name
    assert model.training
    assert not model.norm.training
    assert model.stem.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_the_default_scope_is_that_of_pruning_and_layers_outside_of_blocks_count() -> None:
    model, batches = stack("plain")
    result = prune(OneShot("magnitude", 0.5), model, model, batches)
    assert list(result.masks) == ["stem.weight", *(f"blocks.{i}.{k}.weight" for i in range(4) for k in ("up", "down"))]
    assert result.masks.recipe["pruned by"] == "magnitude"
    units = Walk(model, model, batches, ["stem", *(f"blocks.{i}.{k}" for i in range(4) for k in ("up", "down"))]).units
    assert [unit.path for unit in units] == ["stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"]


def test_only_one_block_is_in_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(6)))
    batches = [torch.randn(7, 24) for _ in range(8)]
    most = {(1, 24, 24): 0, (7, 24): 0}

    def count(_: object) -> None:
        alive = [tuple(t.shape) for t in gc.get_objects() if type(t) is Tensor and t.dtype == torch.float32]
        for shape in most:
            most[shape] = max(most[shape], alive.count(shape))

    prune(OneShot("magnitude", 0.5, scope="weights:"), model, model, batches, told=count)
    assert 0 < most[1, 24, 24] <= 2
    assert 8 < most[7, 24] <= 2 * 8, "the batches, and the inputs of one block"


def test_a_weight_that_layers_share_is_pruned_once_from_what_all_of_them_meet() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6, bias=False) for _ in range(3))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return linear(self.c(self.b(self.a(x))), self.a.weight)

    model, x = Tied().double(), correlated(40, 6)
    result = prune(OneShot("obs", 0.5, scope=["a", "c"]), model, model, [x])
    assert [report.name for report in result.layers] == ["a.weight", "c.weight"]
    assert model.a.weight is model.b.weight
    assert int((model.a.weight == 0).sum()) == int((model.c.weight == 0).sum()) == 18


def test_a_layer_that_is_run_several_times_is_pruned_from_all_that_it_meets() -> None:
    class Again(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).tanh())  # type: ignore[no-any-return]

    model, x = Again().double(), correlated(30, 5)
    met = torch.cat([x, model.layer(x).tanh()]).detach()
    alone = one_layer(model.layer.weight.detach())
    pruned(model, x, method="obs", sparsity=0.4)
    pruned(alone, met, method="obs", sparsity=0.4)
    torch.testing.assert_close(model.layer.weight, alone.weight)


def test_half_precision_is_computed_in_single_and_mixed_precision_sees_the_new_weights() -> None:
    model, batches = stack("plain")
    model.bfloat16()
    batches = [batch.bfloat16() for batch in batches]
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = prune(OneShot("wanda", 0.5), model, model, batches)
    for name, mask in result.masks.items():
        assert torch.equal(model.get_parameter(name)[mask], before[name][mask])

    found = []
    for cached in (True, False):
        torch.manual_seed(0)
        model = Stack().eval()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            prune(OneShot("obs", 0.5), model, model, [batch.float() for batch in batches])
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


def test_a_real_language_model_is_pruned_the_same_with_and_without_a_cache() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    batches = [torch.randint(1, 60, (3, 7), generator=torch.Generator().manual_seed(i)) for i in range(4)]
    models, runs = [], {False: 0, True: 0}
    for cached in runs:  # a cache grows each time that a block is run, so that blocks cannot be run by themselves
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        dense = model.lm_head.weight.clone()

        def forward(batch: Tensor, model: Any = model, cached: bool = cached) -> None:
            runs[cached] += 1
            model(input_ids=batch, use_cache=cached)

        result = prune(OneShot("obs", "2:4"), model, forward, batches)
        assert len(result.masks) == 3 * 7
        assert torch.equal(model.lm_head.weight, dense)
        assert ((~result.masks["model.layers.2.mlp.down_proj.weight"]).view(-1, 4).sum(1) == 2).all()
        models.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*models)
    assert runs == {False: 2 * 4 + 1, True: 4 + 1 + 3 * 4}
