"""Smaller modules: the same outputs from less, and nothing taken that was needed."""

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from pruned_nets import bert, images, llama, logits, resnet, scrambled, tokens, zero, zero_channels
from torch import Tensor, nn

from lightning_mask.core import MaskSet, structures
from lightning_mask.export import load_physical, save_physical, shrink
from lightning_mask.tasks import EfficientNetLite0


def entries(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def test_channels_of_a_residual_network_are_cut():
    model, x = resnet(), images()
    zero_channels(model, lambda net: net(x))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = shrink(model, x)
    assert type(small) is type(model)
    assert close(out(small, x), out(model, x))
    fresh = torch.randn(5, 1, 12, 12)
    assert close(out(small, fresh), out(model, fresh))
    for name, parameter in small.named_parameters():
        full = state[name].shape
        assert parameter.shape[0] == (full[0] if "classifier" in name else full[0] // 2)
        if parameter.dim() > 1 and name != "stem.0.weight":
            assert parameter.shape[1] == full[1] // 2
    assert small.stem[0].out_channels == small.stem[1].num_features == len(small.stem[1].running_var) == 4
    assert small.classifier.in_features == 16
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    small.train()(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in small.parameters())


def test_channels_of_depthwise_convolutions_are_cut():
    torch.manual_seed(0)
    model, x = scrambled(EfficientNetLite0(3, size=32, pretrained=False)), torch.randn(2, 3, 32, 32)
    zero_channels(model, lambda net: net(x))
    small = shrink(model, x)
    assert close(out(small, x), out(model, x))
    block = small.layers[2]
    deep = block.depthwise
    assert (deep.groups, deep.in_channels, deep.out_channels, block.depthwise_norm.num_features) == (72, 72, 72, 72)
    assert (block.expand.in_channels, block.project.in_channels, block.project.out_channels) == (12, 72, 12)
    assert entries(small) < 0.3 * entries(model)


def test_heads_and_inner_channels_of_bert_are_cut():
    model, inputs = bert(), tokens()
    zero_channels(model, lambda net: net(**inputs))
    zero(model, structures.heads(model)[:1], lambda heads: [1, 3])
    small = shrink(model, inputs)
    assert close(logits(small, **inputs), logits(model, **inputs))
    layers = small.bert.encoder.layer
    attention = layers[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.query.out_features) == (2, 16, 16)
    assert layers[0].attention.output.dense.in_features == 16
    assert layers[1].attention.self.num_attention_heads == 4
    assert [layer.intermediate.dense.out_features for layer in layers] == [12, 12]
    assert entries(small) < entries(model)
    longer = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in inputs.items()}
    assert close(logits(small, **longer), logits(model, **longer))


@pytest.mark.parametrize("part", ["columns", "values"])
def test_a_head_goes_by_its_columns_or_by_its_values_and_their_bias(part: str):
    model, inputs = bert(), tokens()
    attention = model.bert.encoder.layer[0].attention
    with torch.no_grad():
        if part == "columns":
            attention.output.dense.weight[:, 8:16] = 0.0
        else:
            attention.self.value.weight[8:16] = 0.0
            with pytest.raises(ValueError, match="Nothing to remove"):  # its bias still reaches the output
                shrink(model, inputs)
            attention.self.value.bias[8:16] = 0.0
    small = shrink(model, inputs)
    assert small.bert.encoder.layer[0].attention.self.num_attention_heads == 3
    assert close(logits(small, **inputs), logits(model, **inputs))
    with pytest.raises(ValueError, match="Nothing to remove"):
        shrink(model, inputs, heads=False)


@pytest.mark.parametrize(
    ("silent", "queries", "pairs"),
    [
        ([0, 1], 2, 1),  # all of the first pair's
        ([0], 4, 2),  # one that the other pair has none to match
        ([0, 3], 2, 2),  # one of each
        ([0, 1, 3], 2, 1),  # all of the first, one of the second: it alone must stay divisible
        ([0, 1, 2, 3], 1, 1),  # all: one stays
    ],
)
def test_queries_that_share_a_head_of_keys_and_values(silent: list[int], queries: int, pairs: int):
    model, inputs = llama(), tokens()
    with torch.no_grad():
        for head in silent:
            model.model.layers[0].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0.0
    if queries == 4:
        with pytest.raises(ValueError, match="Nothing to remove"):
            shrink(model, {**inputs, "use_cache": False})
        return
    small = shrink(model, {**inputs, "use_cache": False})
    attention = small.model.layers[0].self_attn
    left = attention.q_proj.out_features // 8, attention.k_proj.out_features // 8
    if silent == [0, 1, 3]:
        assert left in ((2, 1), (1, 1))
    else:
        assert left == (queries, pairs)
    assert attention.num_key_value_groups == left[0] // left[1]
    assert attention.v_proj.out_features == 8 * left[1]
    assert close(logits(small, **inputs), logits(model, **inputs))
    tied = small.get_output_embeddings().weight
    assert tied is small.get_input_embeddings().weight


def test_gated_channels_of_llama_are_cut():
    model, inputs = llama(4), tokens()
    zero_channels(model, lambda net: net(**inputs, use_cache=False))
    small = shrink(model, {**inputs, "use_cache": False})
    assert small.model.layers[1].mlp.down_proj.in_features == 12
    assert close(logits(small, **inputs), logits(model, **inputs))


# What a constant channel does.


def mlp(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2, bias=bias))
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0.0
        model[0].bias[[1, 4]] = torch.tensor([0.7, -0.2])
    return model


def test_a_row_of_zeros_with_a_bias_stays_where_its_constant_has_nowhere_to_go():
    model, x = mlp(bias=False), torch.randn(4, 3)
    with pytest.raises(ValueError, match="Nothing to remove"):
        shrink(model, x)
    with torch.no_grad():
        model[2].weight[:, 4] = 0.0
    small = shrink(model, x)
    assert (small[0].out_features, small[2].in_features) == (5, 5)
    assert close(out(small, x), out(model, x))
    with torch.no_grad():
        model[0].bias[1] = 0.0  # GELU(0) = 0
    assert shrink(model, x)[0].out_features == 4


def test_the_constant_of_a_row_of_zeros_goes_into_the_next_bias():
    model, x = mlp(bias=True), torch.randn(4, 3)
    small = shrink(model, x)
    assert small[0].out_features == 4
    assert torch.allclose(small[2].bias, out(model[1:], model[0].bias * torch.tensor([0, 1, 0, 0, 1, 0])), atol=1e-6)
    fresh = torch.randn(9, 3)
    assert close(out(small, fresh), out(model, fresh))


def test_a_channel_that_is_zero_on_these_inputs_alone_stays():
    model, x = mlp(bias=True), torch.ones(4, 3)
    model[1] = nn.ReLU()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(6, 3).roll(3, 0) - 2 * torch.ones(6, 3))
        model[0].bias.zero_()
    assert bool((model[:2](x) == 0).all())
    with pytest.raises(ValueError, match="Nothing to remove"):
        shrink(model, x)


def test_a_norm_that_makes_a_constant_of_a_zero_row_keeps_it_before_a_convolution():
    torch.manual_seed(0)
    model = scrambled(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1), nn.Flatten())
    )
    x = images()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].bias[2] = 0.0
        model[1].running_mean[2] = 0.0
        model[1].bias[2] = 0.5
    with pytest.raises(ValueError, match="Nothing to remove"):
        shrink(model, x)
    with torch.no_grad():
        model[1].bias[2] = -0.5  # which ReLU makes zero
    small = shrink(model, x)
    assert small[1].num_features == 3
    assert close(out(small, x), out(model, x))


def test_what_is_zero_as_a_whole_keeps_one_channel():
    model, x = resnet(), images()
    with torch.no_grad():
        for tensor in (model.layers[0][0].conv1.weight, *model.layers[0][0].bn1.parameters()):
            tensor.zero_()
    small = shrink(model, x)
    assert small.layers[0][0].conv1.out_channels == 1
    assert close(out(small, x), out(model, x))


def test_channels_behind_a_concatenation_are_cut_where_they_lie():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3, bias=False), nn.Conv2d(1, 6, 3, bias=False)
            self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 3, 1)
            self.deep, self.out = nn.Conv2d(3, 3, 3, groups=3), nn.Linear(3 * 4 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(torch.cat([self.a(x), self.b(x)], dim=1)).relu()
            return self.out(self.deep(self.c(y)).flatten(1))

    torch.manual_seed(0)
    model, x = scrambled(Joined()), images()
    with torch.no_grad():
        model.c.weight[:, [1, 4, 9]] = 0.0
        model.out.weight[:, 16:32] = 0.0
    small = shrink(model, x)
    assert (small.a.out_channels, small.b.out_channels, small.norm.num_features) == (3, 4, 7)
    assert torch.equal(small.norm.running_mean, model.norm.running_mean[[0, 2, 3, 5, 6, 7, 8]])
    assert (small.deep.groups, small.out.in_features) == (2, 32)
    assert close(out(small, x), out(model, x))


def test_masks_are_zeros_whatever_the_weights_say():
    model, x = mlp(bias=True), torch.randn(4, 3)
    masks = MaskSet({"2.weight": (torch.arange(6) != 3).expand(2, 6)})
    small = shrink(model, x, masks)
    assert small[0].out_features == 3
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
    assert close(out(small, x), out(model, x))
    with pytest.raises(ValueError, match="no parameter 'gone'"):
        shrink(model, x, {"gone": torch.ones(2, dtype=torch.bool)})


def test_what_was_held_still_is_and_the_mode_stays():
    model, x = mlp(bias=True), torch.randn(4, 3)
    model.train()[0].weight.requires_grad_(False)
    small = shrink(model, (x,))
    assert small.training
    assert [p.requires_grad for p in small.parameters()] == [False, True, True, True]


# What cannot be.


def test_nothing_to_remove_is_said():
    with pytest.raises(ValueError, match=r"Nothing to remove: no channel and no attention head"):
        shrink(resnet(), images())


def test_a_module_that_mixes_channels_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.Softmax(1), nn.Linear(6, 2))
    with torch.no_grad():
        model[2].weight[:, 3] = 0.0
    with pytest.raises(RuntimeError, match="outputs differ"):
        shrink(model, torch.randn(4, 3))


def test_a_module_that_reads_a_width_from_elsewhere_is_refused():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.ones(6))

    model = Fixed()
    with torch.no_grad():
        model.b.weight[:, 3] = 0.0
    with pytest.raises(RuntimeError, match="does not run"):
        shrink(model, torch.randn(4, 3))


# Files.


def test_a_folder_makes_a_model_of_full_size_the_smaller_one(tmp_path: Path):
    for number, (make, inputs) in enumerate(((bert, tokens()), (llama, {**tokens(), "use_cache": False}))):
        model = make()
        zero_channels(model, lambda net, given=inputs: net(**given))
        zero(model, [group for group in structures.heads(model) if len(group) > 2][:1], lambda heads: [0])
        small = shrink(model, inputs)
        folder = tmp_path / str(number)
        save_physical(small, model, folder)
        back = load_physical(folder, make())
        assert torch.equal(logits(back, **inputs), logits(small, **inputs))
        assert back.state_dict().keys() == model.state_dict().keys()
        assert sorted(f.name for f in folder.iterdir()) == ["model.json", "model.safetensors"]
        save_physical(small, model, folder)
        assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_a_folder_that_cannot_take_the_place_of_the_old_one_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = mlp(bias=True)
    small = shrink(model, torch.randn(4, 3))
    save_physical(small, model, tmp_path / "small")
    before = {f.name: f.read_bytes() for f in (tmp_path / "small").iterdir()}
    rename = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "small" and Path(source).suffix == ".tmp":
            raise OSError("no space left")
        rename(source, target)

    monkeypatch.setattr("lightning_mask.core.files.os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        save_physical(small, model, tmp_path / "small")
    assert [f.name for f in tmp_path.iterdir()] == ["small"]
    assert {f.name: f.read_bytes() for f in (tmp_path / "small").iterdir()} == before


def test_channels_that_a_pixel_shuffle_reads_stay():
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1))
    model = nn.Sequential(convs[0], nn.PixelShuffle(2), convs[1], nn.ReLU(), convs[2]).eval()
    with torch.no_grad():
        model[0].weight[4:8] = model[0].bias[4:8] = 0
        model[2].weight[3:] = model[2].bias[3:] = 0
    small = shrink(model, torch.randn(2, 3, 6, 6))
    assert [tuple(layer.weight.shape[:2]) for layer in (small[0], small[2], small[4])] == [(16, 3), (3, 4), (2, 3)]


def test_a_folder_of_another_model_is_refused_and_changes_nothing(tmp_path: Path):
    model, x = mlp(bias=True), torch.randn(4, 3)
    small = shrink(model, x)
    save_physical(small, model, tmp_path / "small")
    other = nn.Sequential(nn.Linear(3, 6), nn.GELU(), nn.Linear(6, 2), nn.Linear(2, 2))
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"another architecture .*: 3\.bias"):
        load_physical(tmp_path / "small", other)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())
    with pytest.raises(FileNotFoundError, match=r"no model\.json"):
        load_physical(tmp_path, model)
    plan = tmp_path / "small/model.json"
    good = plan.read_text()
    plan.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="another format"):
        load_physical(tmp_path / "small", model)
    plan.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_physical(tmp_path / "small", model)
    plan.write_text(good)
    load_physical(tmp_path / "small", copy.deepcopy(model))
    for key, value in (("numbers", None), ("numbers", {"0": [3]}), ("aliases", None), ("shapes", {"0.weight": [9, 9]})):
        plan.write_text(json.dumps({**json.loads(good), key: value}))
        with pytest.raises(ValueError, match="damaged"):
            load_physical(tmp_path / "small", model)
    plan.write_text(json.dumps({**json.loads(good), "numbers": {"0": {"forward": 3}}}))
    with pytest.raises(ValueError, match=r"another architecture .*: 0\.forward"):
        load_physical(tmp_path / "small", model)
    plan.write_text(good)
    with pytest.raises(ValueError, match=r"another architecture .*: 0\.weight"):
        load_physical(tmp_path / "small", nn.Sequential(nn.Linear(2, 6), nn.GELU(), nn.Linear(6, 2)))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        save_physical(small, model, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
