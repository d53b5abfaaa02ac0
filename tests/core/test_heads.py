"""Attention heads: against what a head does in its model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from attention_nets import Net, selected
from torch import Tensor, nn

from lightning_mask.core import Selection, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose

# What a head's entries do in the model.


class Fused(nn.Module):
    """A vision transformer's attention, as timm has it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 3, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Torch(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True, **arguments)
        self.kdim, self.vdim = arguments.get("kdim", 12), arguments.get("vdim", 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., : self.kdim], x[..., : self.vdim], need_weights=False)[0]


SMALL = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))


def vectors() -> Tensor:
    return torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, int]] = {
    "bert": (
        lambda: transformers.BertModel(transformers.BertConfig(hidden_size=12, **SMALL)),
        tokens,
        "attention.output.dense.weight",
        7,
    ),
    "llama": (
        lambda: transformers.LlamaModel(transformers.LlamaConfig(hidden_size=12, **SMALL)),
        tokens,
        "o_proj.weight",
        4,
    ),
    "llama with grouped queries": (
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(
                hidden_size=16, **{**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
            )
        ),
        tokens,
        "o_proj.weight",
        4,
    ),
    "gpt2": (
        lambda: transformers.GPT2Model(
            transformers.GPT2Config(vocab_size=20, n_embd=12, n_layer=1, n_head=3, bos_token_id=0, eos_token_id=0)
        ),
        tokens,
        "attn.c_proj.weight",
        3,
    ),
    "distilbert": (
        lambda: transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=20, dim=12, n_layers=1, n_heads=3, hidden_dim=8)
        ),
        tokens,
        "out_lin.weight",
        7,
    ),
    "vit": (
        lambda: transformers.ViTModel(
            transformers.ViTConfig(
                hidden_size=12,
                num_hidden_layers=1,
                num_attention_heads=3,
                intermediate_size=8,
                image_size=8,
                patch_size=4,
            )
        ),
        images,
        "o_proj.weight",
        7,
    ),
    "timm": (Fused, vectors, "proj.weight", 3),
    "torch": (Torch, vectors, "out_proj.weight", 3),
    "torch, of three inputs": (lambda: Torch(kdim=4, vdim=6, add_bias_kv=True), vectors, "out_proj.weight", 7),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_head_is_what_reaches_the_output_through_its_columns(kind: str):
    make, inputs, output, size = MODELS[kind]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    parameters, x = dict(model.named_parameters()), inputs()
    groups = structures.heads(model)
    assert sum(len(group) for group in groups) == size
    assert len(groups) == (2 if "grouped" in kind else 1)
    (reader,) = (name for name in groups[0] if name.endswith(output))
    (queries,), (shared,) = (structures.unit_shape(groups[i]) for i in (0, -1))

    def out(changed: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            result = torch.func.functional_call(model, {**parameters, **changed}, (x,))
        return result if isinstance(result, Tensor) else result[0]

    def unit(group: structures.Group, *numbers: int) -> dict[str, Tensor]:
        chosen = torch.zeros(structures.unit_shape(group), dtype=torch.bool)
        chosen[list(numbers)] = True
        return structures.spread(chosen, group, parameters)

    for group in groups:
        covered = {name: torch.zeros(parameters[name].shape, dtype=torch.int64) for name in group}
        for number in range(*structures.unit_shape(group)):
            mask = unit(group, number)
            for name in group:
                covered[name] += mask[name]
            served = [q for q in range(queries) if q * shared // queries == number]
            silenced = unit(groups[0], *([number] if reader in group else served))[reader]
            silent = {reader: parameters[reader].masked_fill(silenced, 0.0)}
            moved = {n: torch.where(mask[n], -2 * parameters[n], parameters[n]) for n in group if n != reader}
            assert torch.equal(out({**moved, **silent}), out(silent)), "of a silenced head nothing reaches the output"
            for name in moved:
                if not name.endswith(("k_proj.bias", "key.bias", "k_lin.bias")):  # which no softmax sees
                    assert not torch.allclose(out({name: moved[name]}), out({})), f"{name}: these entries do something"
        assert all(bool((count == 1).all()) for count in covered.values()), "each entry is of one head"


def test_heads_of_a_part_of_the_projections():
    net = Net(4, 2, 3, 5, bias=True)
    scores = {n: torch.zeros(p.shape) for n, p in net.named_parameters() if "layers.1" in n and ".v_proj" in n}
    scores["layers.1.attention.v_proj.bias"][4] = 9.0
    masks = choose(scores, [(list(scores), Budget(0.5))], "head", "global", net)
    assert masks["layers.1.attention.v_proj.bias"].tolist() == [False] * 3 + [True] * 3
    assert masks["layers.1.attention.v_proj.weight"].all(1).tolist() == [False] * 3 + [True] * 3


def test_the_number_of_heads_may_stand_anywhere_around_the_layer():
    inner = Net(2, 2, 3, 5, bias=False)
    config, inner.config = inner.config, None
    assert structures.heads(inner) == []
    inner.layers[1].attention.config = config
    assert len(structures.heads(inner)) == 1
    inner.layers.config = config
    assert len(structures.heads(nn.Sequential(inner))) == 2
    config.head_dim = 4
    assert structures.heads(inner) == [], "numbers that contradict the shapes"


# From a selection.


def test_the_default_scope_of_heads_is_what_has_heads():
    net = Net(2, 2, 3, 5, bias=True)
    selection = Selection(["out", "layers.0"], "magnitude", 0.5, structure="head")
    assert selection.scope_names(net) == [n for n, _ in net.named_parameters() if n.startswith("layers.1.attention")]
    masks = selected(selection, net)
    assert masks["layers.1.attention.q_proj.weight"].all(1).sum() == 3
    assert masks["out.weight"].all()
    assert not masks["stem.weight"].any()


def test_each_attention_layer_gets_what_its_tensors_would():
    net = Net(4, 4, 2, 5, bias=True)
    masks = selected(
        Selection(["out", "stem", "scale", "*.mlp"], "magnitude", 0.75, structure="head", allocation="uniform"), net
    )
    for layer in range(2):
        for kind in ("q", "k", "v"):
            assert masks[f"layers.{layer}.attention.{kind}_proj.bias"].sum() == 6
        assert masks[f"layers.{layer}.attention.o_proj.weight"].all(0).sum() == 6


def test_a_model_without_heads_says_what_is_missing():
    with pytest.raises(ValueError, match=r"0.weight has no attention heads, nor has any tensor of this model"):
        Selection(None, "magnitude", 0.5, structure="head").check(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="pass the model too"):
        choose({"w": torch.zeros(2, 2)}, [(["w"], Budget(1))], "layer", "global")
