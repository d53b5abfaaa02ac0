import itertools
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_mask.core import Context
from lightning_mask.core.criteria import compute
from lightning_mask.core.structures import heads


def run(score: str, model: nn.Module, batches: Iterable[object], scope: str = "weight") -> dict[str, Tensor]:
    params = {n: p for n, p in model.named_parameters() if n.endswith(tuple(scope.split(",")))}
    return compute(score, params, Context(model, loss=lambda x: model(x).mean(), batches=lambda: batches))


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


class Conv1D(nn.Module):
    """As transformers': a Linear whose weight is (in, out)."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(like.weight.detach().T.contiguous()), nn.Parameter(like.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


# Two batches of two: (1, 0), (0, 1); (1, 1), (-1, 2). The norms of the two inputs are sqrt(3) and sqrt(6).
INPUTS = [torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 1.0], [-1.0, 2.0]])]
WEIGHT, BIAS = [[2.0, -1.0], [0.0, 3.0]], [0.5, 0.0]
# The first output is 2.5, -0.5; 1.5, -3.5 (mean size 2), the second 0, 3; 3, 6 (mean size 3).


def test_wanda_by_hand():
    expected = torch.tensor([[2 * 3**0.5, 6**0.5], [0.0, 3 * 6**0.5]])
    layer = linear(WEIGHT, BIAS)
    torch.testing.assert_close(run("wanda", layer, INPUTS)["weight"], expected)
    torch.testing.assert_close(run("wanda", Conv1D(layer), INPUTS)["weight"], expected.T)
    tokens = [torch.cat(INPUTS).view(1, 2, 2, 2)]
    torch.testing.assert_close(run("wanda", layer, tokens)["weight"], expected)


def test_activation_by_hand():
    layer = linear(WEIGHT, BIAS)
    for model, turned in ((layer, False), (Conv1D(layer), True)):
        scores = run("activation", model, INPUTS, "weight,bias")
        expected = torch.tensor([[2.0, 2.0], [3.0, 3.0]])
        torch.testing.assert_close(scores["weight"], expected.T if turned else expected)
        torch.testing.assert_close(scores["bias"], torch.tensor([2.0, 3.0]))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), groups=2),
        nn.Conv2d(4, 2, 2, dilation=2, padding=1, padding_mode="reflect"),
        nn.Conv1d(3, 2, 3, padding="same"),
        nn.Conv3d(2, 2, 2, groups=2),
    ],
    ids=["grouped", "reflected", "same", "3d"],
)
def test_a_convolution_position_by_position(layer: nn.Conv2d):
    torch.manual_seed(0)
    dims = layer.weight.dim() - 2
    batches = [torch.randn(2, layer.in_channels, *(5, 6, 4)[:dims]) for _ in range(2)]
    around = [n for d in range(dims) for n in _padding(layer, d)]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    met = torch.zeros_like(layer.weight)
    groups, each, outs = layer.groups, layer.weight.shape[1], layer.out_channels // layer.groups
    size = torch.zeros(layer.out_channels)
    for x in batches:
        y = layer(x).detach()
        size += y.abs().flatten(2).sum((0, 2)) / y[0, 0].numel() / 4
        padded = pad(x, around[::-1], mode=mode)
        for out, channel in itertools.product(range(layer.out_channels), range(each)):
            seen = padded[:, out // outs * each + channel]
            for entry in itertools.product(*(range(k) for k in layer.kernel_size)):
                for position in itertools.product(*(range(n) for n in y.shape[2:])):
                    at = [
                        p * s + e * d for p, s, e, d in zip(position, layer.stride, entry, layer.dilation, strict=True)
                    ]
                    met[(out, channel, *entry)] += seen[(slice(None), *at)].square().sum()
    assert groups * outs == layer.out_channels
    scores = run("wanda", layer, batches)
    torch.testing.assert_close(scores["weight"], layer.weight.detach().abs() * met.sqrt())
    rows = run("activation", layer, batches)["weight"]
    torch.testing.assert_close(rows, size.view(-1, *[1] * (dims + 1)).expand_as(rows))


def _padding(layer: nn.Conv2d, dim: int) -> tuple[int, int]:
    if layer.padding == "same":
        return 1, 1
    amount = layer.padding[dim]
    assert isinstance(amount, int)
    return amount, amount


class Attention(nn.Module):
    """Heads of width 2 that give on what they read as values; shared ones to all of their queries."""

    def __init__(self, shared: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=4, num_key_value_heads=shared)
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 2 * shared)
        self.v_proj, self.o_proj = nn.Linear(8, 2 * shared, bias=False), nn.Linear(8, 3)
        nn.init.eye_(self.v_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        values = self.v_proj(x).unflatten(-1, (-1, 2))
        return self.o_proj(values.repeat_interleave(4 // values.shape[-2], dim=-2).flatten(-2))


@pytest.mark.parametrize("shared", [4, 2])
def test_head_activation_by_hand(shared: int):
    # Two tokens: heads give (3, 4), (0, 1), (0, 0), (5, 12) and (0, 0), (1, 0), (8, 6), (0, 0).
    x = torch.tensor([[3.0, 4.0, 0.0, 1.0, 0.0, 0.0, 5.0, 12.0], [0.0, 0.0, 1.0, 0.0, 8.0, 6.0, 0.0, 0.0]])
    of_queries = [2.5, 1.0, 5.0, 6.5] if shared == 4 else [2.5, 2.5, 1.0, 1.0]
    model = Attention(shared)
    params = {n: p for n, p in model.named_parameters() if n != "o_proj.bias"}
    context = Context(model, loss=lambda x: model(x).sum(), batches=lambda: [x[:1], x[1:]])
    scores = compute("head_activation", params, context)
    rows = torch.tensor(of_queries).repeat_interleave(2)
    torch.testing.assert_close(scores["q_proj.weight"], rows.view(8, 1).expand(8, 8))
    torch.testing.assert_close(scores["q_proj.bias"], rows)
    torch.testing.assert_close(scores["o_proj.weight"], rows.expand(3, 8))
    shared_rows = torch.tensor(of_queries[:: 4 // shared]).repeat_interleave(2)
    torch.testing.assert_close(scores["k_proj.weight"], shared_rows.view(-1, 1).expand(2 * shared, 8))
    torch.testing.assert_close(scores["v_proj.weight"], shared_rows.view(-1, 1).expand(2 * shared, 8))
    with pytest.raises(ValueError, match=r"head_activation scores attention heads .* and o_proj\.bias is of none"):
        compute("head_activation", dict(model.named_parameters()), context)


def test_head_activation_tells_what_no_called_layer_reads():
    model = nn.MultiheadAttention(4, 2, batch_first=True)
    context = Context(model, loss=lambda x: model(x, x, x)[0].sum(), batches=lambda: [torch.ones(1, 2, 4)])
    with pytest.raises(ValueError, match=r"in_proj_weight is of none; take it away with '!in_proj_weight'"):
        compute("head_activation", {"in_proj_weight": model.in_proj_weight}, context)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_head_activation_is_what_the_output_projection_of_a_model_reads(kind: str):
    make: Any = {
        "gpt2": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=12, n_layer=2, n_head=3, vocab_size=20)),
        "bert": lambda: transformers.BertModel(
            transformers.BertConfig(
                hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=8, vocab_size=20
            )
        ),
    }[kind]
    model, ids = make().eval(), torch.arange(10).view(2, 5)
    scope = {n: p for n, p in model.named_parameters() if n in {name for group in heads(model) for name in group}}
    name = {"gpt2": "h.1.attn.c_proj", "bert": "encoder.layer.1.attention.output.dense"}[kind]
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    context = Context(model, loss=lambda b: model(b).last_hidden_state.sum(), batches=lambda: [ids])
    scores = compute("head_activation", scope, context)
    handle.remove()
    expected = seen[0].view(10, 3, 4).norm(dim=2).mean(0).repeat_interleave(4)
    found = scores[f"{name}.weight"]
    torch.testing.assert_close(
        found, expected.view(12, 1).expand(12, 12) if kind == "gpt2" else expected.expand(12, 12)
    )


class Tied(nn.Module):
    """One weight in two layers, one of which is called twice and by keyword; one layer that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.idle = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        self.two.weight = self.one.weight
        self.norm, self.table = nn.LayerNorm(1), nn.Embedding(2, 1)
        nn.init.constant_(self.one.weight, 3.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.one(input=2 * x) + self.two(4 * x)


def test_a_tied_weight_meets_the_inputs_of_all_its_calls():
    model = Tied()
    scope = {"one.weight": model.one.weight}
    context = Context(model, loss=lambda x: model(x).sum(), batches=lambda: [torch.tensor([[-1.0]])])
    assert compute("wanda", scope, context)["one.weight"].item() == pytest.approx(3 * (1 + 4 + 16) ** 0.5)
    assert compute("activation", scope, context)["one.weight"].item() == pytest.approx((3 + 6 + 12) / 3)


@pytest.mark.parametrize("score", ["wanda", "activation"])
@pytest.mark.parametrize("name", ["norm.weight", "table.weight"])
def test_a_tensor_of_no_such_layer_is_refused_by_name(score: str, name: str):
    with pytest.raises(ValueError, match=rf"{score} scores .* and {name} is none; .*'!{name}'"):
        run(score, Tied(), [torch.ones(1, 1)], name)


def test_a_bias_meets_no_input_and_has_an_output():
    with pytest.raises(ValueError, match="bias is none"):
        run("wanda", linear(WEIGHT, BIAS), INPUTS, "bias")


@pytest.mark.parametrize("score", ["wanda", "activation"])
def test_a_layer_that_is_never_called_is_refused_by_name(score: str):
    with pytest.raises(ValueError, match=r"The layer of idle.weight was not run .*'!idle.weight'"):
        run(score, Tied(), [torch.ones(1, 1)], "one.weight,idle.weight")
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    with pytest.raises(ValueError, match=r"The layer of self_attn\.out_proj\.weight was not run"):
        run(score, attention, [torch.randn(2, 3, 4)], "self_attn.out_proj.weight,linear1.weight")
    assert (run(score, attention, [torch.randn(2, 3, 4)], "linear1.weight")["linear1.weight"] > 0).any()


@pytest.mark.parametrize("score", ["wanda", "activation"])
def test_hooks_go_also_when_the_loss_fails(score: str):
    model = linear(WEIGHT, BIAS).train()

    def fail(x: Tensor) -> Tensor:
        model(x)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compute(score, {"weight": model.weight}, Context(model, loss=fail, batches=lambda: INPUTS))
    assert not model._forward_hooks
    assert model.training
    with pytest.raises(ValueError, match="gave none"):
        run(score, model, [])


def test_batches_are_seen_in_eval_mode_and_low_precision_is_summed_in_float32():
    model = nn.Sequential(nn.Dropout(0.9), linear(WEIGHT, BIAS)).to(torch.bfloat16).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = run("wanda", model, [x.bfloat16() for x in INPUTS])["1.weight"]
    torch.testing.assert_close(scores, torch.tensor([[2 * 3**0.5, 6**0.5], [0.0, 3 * 6**0.5]]))
    layer = nn.Conv1d(1, 1, 1).to(torch.bfloat16)
    nn.init.ones_(layer.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        met = run("wanda", layer, [torch.ones(1, 1, 1001, dtype=torch.bfloat16)])["weight"]
    torch.testing.assert_close(met, torch.full((1, 1, 1), 1001**0.5))
