"""Weights that lie as (in, out, ...): rows, columns and blocks of them are output units, input units, and both."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from attention_nets import selected
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_mask.core import Context, MaskSet, Selection
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose, n_of_m
from lightning_mask.core.criteria import compute
from lightning_mask.core.criteria.weights import spectral
from lightning_mask.core.transposed import transposed_weights, turned, turned_shape


class Pair(nn.Module):
    """The same network twice: its weights lie as (in, out, ...) in one half and as (out, in, ...) in the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lying = nn.ModuleDict(
            {
                "linear": Conv1D(6, 4),
                "conv": nn.ConvTranspose2d(4, 6, 2),
                "groups": nn.ConvTranspose1d(4, 6, 3, groups=2),
                "apart": nn.ConvTranspose2d(4, 4, 2, groups=4),
            }
        )
        self.facing = nn.ModuleDict(
            {
                "linear": nn.Linear(4, 6),
                "conv": nn.Conv2d(4, 6, 2),
                "groups": nn.Conv1d(4, 6, 3, groups=2),
                "apart": nn.Conv2d(4, 4, 2, groups=4),
            }
        )


KINDS = ("linear", "conv", "groups", "apart")
GROUPS = {"linear": 1, "conv": 1, "groups": 2, "apart": 4}


def by_hand(weight: Tensor, groups: int) -> Tensor:
    """(out, in / groups, ...) from (in, out / groups, ...), entry by entry."""
    into, out = weight.shape[0], weight.shape[1] * groups
    seen = torch.zeros(out, into // groups, *weight.shape[2:], dtype=weight.dtype)
    for i in range(into):
        for o in range(weight.shape[1]):
            group = i // (into // groups)
            seen[group * weight.shape[1] + o, i % (into // groups)] = weight[i, o]
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_turned_is_the_layout_of_the_ordinary_layer(kind: str):
    net = Pair()
    weight = net.lying[kind].weight
    assert isinstance(weight, Tensor)
    assert transposed_weights(net)[f"lying.{kind}.weight"] == GROUPS[kind]
    seen = turned(weight.detach(), GROUPS[kind])
    assert torch.equal(seen, by_hand(weight.detach(), GROUPS[kind]))
    assert seen.shape == turned_shape(tuple(weight.shape), GROUPS[kind]) == net.facing[kind].weight.shape
    assert torch.equal(turned(seen, GROUPS[kind]), weight)


def test_which_weights_lie():
    net = Pair()
    assert transposed_weights(net) == {f"lying.{kind}.weight": GROUPS[kind] for kind in KINDS}

    class Conv1D(nn.Conv1d):
        """Another one of that name."""

    assert transposed_weights(nn.Sequential(Conv1D(2, 2, 1), nn.Conv1d(2, 2, 1))) == {}
    tied = nn.Sequential(nn.Linear(3, 3), globals()["Conv1D"](3, 3))
    tied[1].weight = tied[0].weight
    assert transposed_weights(tied) == {}


SHAPES = [
    ("row", "global"),
    ("column", "global"),
    ("row", "uniform"),
    ("column", "erk"),
    ("block:2x1", "global"),
    ("block:1x2", "global"),
    ("entry", "row"),
]


@pytest.mark.parametrize(("structure", "allocation"), SHAPES, ids=[" ".join(pair) for pair in SHAPES])
@pytest.mark.parametrize("amount", [0.4, 9])
def test_units_are_those_of_the_ordinary_layer(structure: str, allocation: str, amount: float | int):
    """The same scores, with ties, lie in one half as (in, out, ...) and in the other as (out, in, ...)."""
    net = Pair()
    kinds = KINDS if structure != "block:1x2" else KINDS[:2]
    shapes = {kind: net.lying[kind].weight.shape for kind in kinds}
    generator = torch.Generator().manual_seed(0)
    lying = {kind: torch.randint(-3, 4, shape, generator=generator).float() for kind, shape in shapes.items()}
    facing = {kind: by_hand(score, GROUPS[kind]) for kind, score in lying.items()}
    chosen = {}
    for half, scores in (("lying", lying), ("facing", facing)):
        named = {f"{half}.{kind}.weight": score for kind, score in scores.items()}
        chosen[half] = choose(named, [(list(named), Budget(amount))], structure, allocation, net)
    for kind in kinds:
        mask = chosen["lying"][f"lying.{kind}.weight"]
        assert mask.shape == shapes[kind]
        assert mask.is_contiguous()
        assert torch.equal(by_hand(mask, GROUPS[kind]), chosen["facing"][f"facing.{kind}.weight"]), kind
    assert any(mask.any() and not mask.all() for mask in chosen["lying"].values())


def test_a_row_by_hand():
    net = nn.Sequential(Conv1D(3, 2))
    score = {"0.weight": torch.tensor([[1.0, 9.0, 4.0], [7.0, 0.0, 5.0]])}  # of outputs: 1 + 7, 9 + 0, 4 + 5
    budget = [(["0.weight"], Budget(2))]
    assert choose(score, budget, "row", "global", net)["0.weight"].tolist() == [[False, True, False]] * 2
    assert choose(score, budget, "row", "global")["0.weight"].tolist() == [[True] * 3, [False] * 3], "of a Linear"
    column = choose(score, [(["0.weight"], Budget(3))], "column", "global", net)["0.weight"]
    assert column.tolist() == [[True] * 3, [False] * 3]
    best = choose(score, [(["0.weight"], Budget(0.5))], "entry", "row", net)["0.weight"]
    assert best.tolist() == [[False, True, False], [True, False, True]], "the best input of each output"
    assert choose(score, [(["0.weight"], Budget(4))], "entry", "row", net)["0.weight"].sum(0).tolist() == [2, 1, 1]
    block = choose(score, [(["0.weight"], Budget(1))], "block:3x1", "global", net)["0.weight"]
    assert block.tolist() == [[True] * 3, [False] * 3], "three outputs of one input"
    with pytest.raises(ValueError, match=r"0\.weight .*3 x 2, is not divisible into blocks of 2 x 1"):
        choose(score, budget, "block:2x1", "global", net)


def test_n_of_m_of_groups():
    score = torch.rand(8, 3, 2, generator=torch.Generator().manual_seed(0))  # 2 groups of 4 inputs and 3 outputs
    mask = n_of_m({"w": score}, 2, 4, transposed={"w": 2})["w"]
    expected = n_of_m({"w": by_hand(score, 2)}, 2, 4)["w"]
    assert torch.equal(by_hand(mask, 2), expected)
    assert mask.sum() == 24
    with pytest.raises(ValueError, match="an input width of 8, which is not divisible by 16"):
        n_of_m({"w": score}, 8, 16, transposed={"w": 2})


@pytest.mark.parametrize(("structure", "allocation"), SHAPES, ids=[" ".join(pair) for pair in SHAPES])
def test_a_random_mask_follows_from_its_file(structure: str, allocation: str, tmp_path: Path):
    net = Pair()
    scope = ["lying.linear.weight", "lying.conv.weight", "facing.linear", "lying.apart.bias"]
    if structure in ("block:1x2", "block:2x1"):
        scope = scope[:2]
    masks = selected(Selection(None, "random", 0.4, scope=scope, structure=structure, allocation=allocation), net)
    assert masks.recipe["transposed"] == {"lying.linear.weight": 1, "lying.conv.weight": 1}
    assert 0 < masks.density() < 1
    for name in scope[:2]:
        lines = masks[name].movedim(1 if structure == "row" else 0, 0).flatten(1)
        if structure in ("row", "column"):
            assert torch.equal(lines.all(1), lines.any(1))
        if allocation == "row":
            assert len(set(masks[name].movedim(1, 0).flatten(1).sum(1).tolist())) == 1
    file = tmp_path / "masks.safetensors"
    masks.save(file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as content:
        assert not list(content.keys()), "the recipe alone"
        assert json.loads(content.metadata()["recipe"])["scope_names"]
    assert MaskSet.load(file) == masks


def test_where_it_makes_no_difference_a_recipe_says_nothing():
    for structure, allocation in (("entry", "global"), ("tensor", "global"), ("layer", "global"), ("entry", "erk")):
        masks = selected(Selection(None, "random", 0.4, structure=structure, allocation=allocation), Pair())
        assert "transposed" not in masks.recipe
    masks = selected(Selection(None, "random", 0.4, scope="facing", structure="row"), Pair())
    assert "transposed" not in masks.recipe


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=6, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def test_rows_of_gpt2_are_output_units():
    net = gpt2()
    scope = "re:h\\.\\d\\.(attn|mlp)\\.\\w+\\.weight"
    masks = selected(Selection(None, "magnitude", 0.25, scope=scope, structure="row", allocation="uniform"), net)
    names = [name for name in masks if ".attn." in name and name.endswith("weight")]
    assert len(names) == 4
    for name in names:
        weight = net.get_parameter(name)
        sizes = weight.abs().mean(0)  # (in, out): of each output unit, over its inputs
        best = sizes.argsort(descending=True)[: math.floor(0.25 * len(sizes) + 0.5)]
        assert torch.equal(masks[name].all(0).nonzero().view(-1), best.sort().values)
        assert torch.equal(masks[name].all(0), masks[name].any(0))


@pytest.mark.parametrize("name", ["spectral", "snr"])
def test_a_spectrum_is_that_of_the_outputs(name: str):
    net = Pair()
    for kind in KINDS:
        net.facing[kind].weight = nn.Parameter(by_hand(net.lying[kind].weight.detach(), GROUPS[kind]))
    params = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    scores = compute(partial(spectral, rank=2) if name == "spectral" else name, params, Context(net))
    for kind in KINDS:
        lying, facing = scores[f"lying.{kind}.weight"], scores[f"facing.{kind}.weight"]
        torch.testing.assert_close(by_hand(lying, GROUPS[kind]), facing)
