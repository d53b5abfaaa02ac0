"""Coupled channels: against what a channel does in its network."""

import sys

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_mask.core import structures
from lightning_mask.core.channels import channel_groups, coupling
from lightning_mask.tasks import EfficientNetLite0, ResNet

SMALL = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 10}


def images(channels: int = 1, side: int = 8) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


def tokens() -> Tensor:
    return torch.randint(20, (2, 5), generator=torch.Generator().manual_seed(0))


def scrambled(model: nn.Module) -> nn.Module:
    """Normalisations that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.2, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return model.eval()


class Joined(nn.Module):
    """Two convolutions side by side, a norm over both, a depthwise convolution, and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.c, self.deep = nn.Conv2d(10, 5, 3), nn.Conv2d(5, 5, 3, groups=5)
        self.flat, self.out = nn.Linear(5 * 4 * 4, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).tanh()
        joined = self.norm(torch.cat([a, self.b(a)], dim=1))
        return self.out(self.flat(self.deep(self.c(joined)).tanh().flatten(1)).tanh())


def check_units(model: nn.Module, x: Tensor) -> list[structures.Group]:
    """A unit that is zero lets nothing through, whatever the columns that read it say; and no entry is of two units."""
    groups, _ = channel_groups(model, lambda net: net(x))
    parameters = dict(model.named_parameters())
    covered = {name: torch.zeros(p.shape, dtype=torch.int64) for name, p in parameters.items()}
    found = {frozenset(parts.makers): parts for parts in coupling(model, lambda net: net(x)).channels}

    def out(changed: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, {**parameters, **changed}, (x,))

    for group in groups:
        layers = frozenset(name.rpartition(".")[0] for name in group)
        readers = found[layers].readers
        (units,) = structures.unit_shape(group)
        mattered = 0
        for number in range(units):
            chosen = torch.zeros(units, dtype=torch.bool)
            chosen[number] = True
            mask = structures.spread(chosen, group, parameters)
            for name in group:
                covered[name] += mask[name]
            silent = {name: parameters[name].masked_fill(mask[name], 0.0) for name in group}
            moved = {}
            for layer, part in readers.items():
                name = f"{layer}.weight"
                weight = silent.get(name, parameters[name]).clone()
                weight[:, part.of(chosen)] += 1.0
                moved[name] = weight
            assert torch.equal(out({**silent, **moved}), out(silent))
            mattered += not torch.equal(out(silent), out({}))
        assert mattered >= units / 2, "units did something before"
    assert all(bool((covered[name] == 1).all()) for group in groups for name in group)
    return groups


def test_channels_of_a_residual_network():
    model = scrambled(ResNet(3, width=4, depth=1))
    groups = check_units(model, images())
    residual = next(group for group in groups if "stem.0.weight" in group)
    assert sorted(residual) == sorted(
        f"{layer}.{kind}"
        for layer, kinds in {"stem.0": "w", "stem.1": "wb", "layers.0.0.conv2": "w", "layers.0.0.bn2": "wb"}.items()
        for kind in (["weight"] if kinds == "w" else ["weight", "bias"])
    )
    assert sum(structures.unit_shape(group)[0] for group in groups) == 2 * (4 + 8 + 16)
    assert coupling(model, lambda net: net(images())).left_out == {"classifier": "they are the network's output"}


def test_channels_through_depthwise_convolutions():
    model = EfficientNetLite0(3, pretrained=False)
    found = coupling(model, lambda net: net(images(3, 32)))
    assert list(found.left_out) == ["classifier"]
    wide = next(parts for parts in found.channels if "layers.1.depthwise" in parts.makers)
    assert set(wide.makers) == {f"layers.1.{n}" for n in ("expand", "expand_norm", "depthwise", "depthwise_norm")}
    assert set(wide.readers) == {"layers.1.project"}
    assert wide.units == 96


def test_channels_through_a_concatenation_and_a_flattening():
    model = scrambled(Joined())
    found = {next(iter(parts.makers)): parts for parts in coupling(model, lambda net: net(images())).channels}
    assert set(found) == {"a", "b", "deep", "flat"}
    assert set(found["deep"].makers) == {"c", "deep"}
    assert found["b"].readers["c"].at.tolist() == found["b"].makers["norm"].at.tolist() == [4, 5, 6, 7, 8, 9]
    assert found["b"].readers["c"].unit.tolist() == [0, 1, 2, 3, 4, 5]
    assert found["deep"].readers["flat"].of(torch.arange(5) == 2).tolist() == list(range(32, 48))
    groups = check_units(model, images())
    assert sorted(name for group in groups for name in group if name.endswith("weight")) == [
        "c.weight",
        "deep.weight",
        "flat.weight",
    ]
    left_out = channel_groups(model, lambda net: net(images()))[1]
    assert left_out["a"] == left_out["b"] == "norm holds only some of them, behind a concatenation"


def test_channels_of_transformers_are_those_between_their_normalisations():
    ids = tokens()
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(hidden_size=12, **SMALL))
    groups, left_out = channel_groups(bert, lambda net: net(input_ids=ids))
    inner = [group for group in groups if any("intermediate" in name for name in group)]
    assert [sorted(group) for group in inner] == [
        [f"bert.encoder.layer.0.intermediate.dense.{kind}" for kind in ("bias", "weight")]
    ]
    assert "normalisation" in left_out["bert.encoder.layer.0.output.dense"]
    assert left_out["bert.encoder.layer.0.attention.self.value"] == "they are the widths of attention heads"

    config = transformers.LlamaConfig(hidden_size=16, num_key_value_heads=2, **SMALL)
    llama = transformers.LlamaForCausalLM(config)
    groups, left_out = channel_groups(llama, lambda net: net(input_ids=ids))
    assert [sorted(group) for group in groups] == [
        [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj")]
    ]
    assert set(left_out) == {"lm_head", "model.layers.0.mlp.down_proj"} | {
        f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"
    }


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


class Sequences(nn.Module):
    """A concatenation along a side that the graph does not take for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(3, 4), nn.Linear(3, 6), nn.Linear(10, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.c(torch.cat([self.a(x), self.b(x)], dim=2)))


@pytest.mark.parametrize(
    ("model", "x", "reasons"),
    [
        (Grouped(), images(), {"a": "b is a grouped", "b": "b is a grouped", "c": "output"}),
        (Sequences(), torch.ones(2, 7, 3), {"a": "does not see", "b": "does not see", "d": "output"}),
        (nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 4)), torch.ones(2, 3), {"0": "norm", "2": "out"}),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), torch.ones(2, 3, dtype=torch.int64), {"1": "output"}),
    ],
)
def test_what_cannot_be_followed_is_left_out_with_a_reason(model: nn.Module, x: Tensor, reasons: dict[str, str]):
    groups, left_out = channel_groups(model, lambda net: net(x))
    assert set(left_out) == set(reasons)
    assert all(reason in left_out[layer] for layer, reason in reasons.items())
    assert [set(group) for group in groups] == ([{"c.weight", "c.bias"}] if isinstance(model, Sequences) else [])


def test_tracing_leaves_the_model_as_it_was():
    model = ResNet(3, width=4, depth=1).train()
    model.stem[1].eval()
    model.classifier.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert len(channel_groups(model, lambda net: {"logits": [net(images())]})[0]) == 6
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.stem[1].training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_without_outputs_is_refused():
    with pytest.raises(ValueError, match="no tensor that depends on a parameter"):
        coupling(nn.Linear(2, 2), lambda net: None)


def test_without_torch_pruning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"lightning-mask\[export\]"):
        coupling(nn.Linear(2, 2), lambda net: net(torch.ones(1, 2)))
