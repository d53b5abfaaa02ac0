"""Rows and columns of weights that lie as (in, out, ...), trained and pruned: tiny GPT-2, and a transposed convolution."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from mask_nets import Net, changed, fit, moved, weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_mask import FreezeMask, PruneMask


class Gpt2(pl.LightningModule):
    """Two layers over what the tests' loader gives: eight numbers, read as a sentence of token 0 and token 1."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.GPT2Config(
                vocab_size=4,
                n_positions=8,
                n_embd=48,
                n_layer=2,
                n_head=2,
                num_labels=2,
                pad_token_id=3,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
            self.net = transformers.GPT2ForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(input_ids=(batch[0] > 0).long(), labels=batch[1]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class Decoder(pl.LightningModule):
    """Two transposed convolutions, the second one in two groups."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.ConvTranspose2d(8, 12, 3)
            self.second = nn.ConvTranspose2d(12, 4, 3, stride=2, groups=2)
            self.head = nn.Linear(4, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.second(torch.relu(self.first(batch[0][:, :, None, None])))
        return nn.functional.cross_entropy(self.head(x.mean((2, 3))), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


GPT2_WEIGHTS = "re:net\\.transformer\\.h\\.\\d\\.(attn|mlp)\\.\\w+\\.weight"


def by_dimension(mask: Tensor, dim: int) -> Tensor:
    """Which lines along ``dim`` are active; all entries of each are alike."""
    lines = mask.movedim(dim, 0).flatten(1)
    assert torch.equal(lines.all(1), lines.any(1))
    return lines.any(1)


@pytest.mark.parametrize(("structure", "dim"), [("row", 1), ("column", 0)])
@pytest.mark.parametrize("score", ["gradient", "random"])
def test_gpt2_trains_by_output_and_input_units(structure: str, dim: int, score: str) -> None:
    nets = {}
    for engine in ("auto", "dense"):
        net = nets[engine] = Gpt2()
        before = weights(net)
        freeze = FreezeMask(
            "net.score",
            score=score,
            density=0.25,
            scope=GPT2_WEIGHTS,
            structure=structure,
            allocation="uniform",
            batches=2,
            engine=engine,
        )
        held: dict[str, str] = {}

        class Summary(pl.Callback):
            def on_train_end(self, *_: Any, held: dict[str, str] = held, freeze: FreezeMask = freeze) -> None:
                held.update({row["name"]: row["held by"] for row in freeze.summary()})

        fit(net, freeze, Summary(), max_steps=4)
        after, bits = weights(net), moved(before, weights(net))
        scope = [name for name in before if ".h." in name and name.endswith("weight") and ".ln_" not in name]
        assert len(scope) == 8
        for name, mask in freeze.masks.items():
            assert torch.equal(before[name][~mask], after[name][~mask]), name
            assert not bool((bits[name] & ~mask).any()), name
        for name in scope:
            lines = by_dimension(freeze.masks[name], dim)
            assert int(lines.sum()) == len(lines) // 4
            assert bits[name].any(), name
        active = sum(before[name].numel() for name in scope) // 4 + before["net.score.weight"].numel()
        assert freeze.masks.count() == active
        assert {held[name] for name in scope} == {"compact" if engine == "auto" else "dense"}
    assert changed(weights(nets["auto"]), weights(nets["dense"])) == set()


@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_transposed_convolutions_train_by_output_units(engine: str) -> None:
    net = Decoder()
    before = weights(net)
    freeze = FreezeMask(
        "head", score="magnitude", density=0.5, scope=["first.weight", "second.weight"], structure="row", engine=engine,
        allocation="uniform",
    )  # fmt: skip
    fit(net, freeze, max_steps=4)
    for name, bits in moved(before, weights(net)).items():
        assert not bool((bits & ~freeze.masks[name]).any()), name
    assert int(by_dimension(freeze.masks["first.weight"], 1).sum()) == 6
    second = freeze.masks["second.weight"].view(2, 6, 2, 9).transpose(1, 2).reshape(4, 54)  # of four output units
    assert int(by_dimension(second, 0).sum()) == 2
    sizes = before["second.weight"].abs().view(2, 6, 2, 9).sum((1, 3)).view(4)
    assert set(by_dimension(second, 0).nonzero().view(-1).tolist()) == set(sizes.topk(2).indices.tolist())


def both_ways(*callbacks: Any) -> list[Net]:
    """The same network with a Linear and with a Conv1D of the same weights, trained alike."""
    nets = [Net(), Net()]
    linear, lying = nets[0].blocks[0].lin, Conv1D(12, 12)
    lying.weight.data.copy_(linear.weight.T)
    lying.bias.data.copy_(linear.bias)
    nets[1].blocks[0].lin = lying
    for net, callback in zip(nets, callbacks, strict=True):
        fit(net, callback, max_steps=3)
    return nets


@pytest.mark.parametrize("choice", [{"structure": "row"}, {"structure": "column"}, {"allocation": "row"}], ids=str)
def test_pruning_by_units_is_that_of_a_linear(choice: dict[str, str]) -> None:
    prunes = [PruneMask(0.7, scope="blocks.0.lin.weight", schedule="constant", **choice) for _ in range(2)]
    facing, lying = both_ways(*prunes)
    zeros = lying.blocks[0].lin.weight == 0
    assert torch.equal(zeros.T, facing.blocks[0].lin.weight == 0)
    assert int(zeros.sum()) == {"row": 8 * 12, "column": 8 * 12}.get(choice.get("structure", ""), 12 * 8)


def test_per_neuron_gradients_are_those_of_a_linear() -> None:
    freezes = [
        FreezeMask("head", score="gradient", density=0.25, scope="blocks.0.lin.weight", allocation="row", batches=2)
        for _ in range(2)
    ]
    both_ways(*freezes)
    facing, lying = (freeze.masks["blocks.0.lin.weight"] for freeze in freezes)
    assert torch.equal(lying.T, facing)
    assert lying.sum(0).tolist() == [3] * 12
