"""Units that span tensors, and a density for each pattern, in real training runs."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from mask_nets import Net, changed, fit, moved, weights
from torch import Tensor

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.callbacks.phase import write_phases
from lightning_mask.core import structures


class Text(pl.LightningModule):
    """A tiny BERT over what the tests' loader gives: eight numbers, read as a sentence of token 0 and token 1."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = transformers.BertConfig(
                vocab_size=2,
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=32,
                max_position_embeddings=8,
                num_labels=2,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
            self.net = transformers.BertForSequenceClassification(config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(input_ids=(batch[0] > 0).long(), labels=batch[1]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


PROJECTIONS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")


def heads_of(mask: Tensor, dim: int) -> list[bool]:
    """Which of four heads are active along ``dim``; all entries of each are alike."""
    parts = mask.movedim(dim, 0).reshape(4, -1)
    assert bool((parts.all(1) == parts.any(1)).all())
    return parts.any(1).tolist()


@pytest.mark.parametrize("score", ["magnitude", "gradient", "random"])
def test_heads_train_by_rows_and_columns(score: str) -> None:
    nets = {}
    for engine in ("auto", "dense"):
        net = nets[engine] = Text()
        before = weights(net)
        callback = FreezeMask("net.classifier", score=score, density=0.4, structure="head", batches=2, engine=engine)
        held: dict[str, str] = {}

        class Summary(pl.Callback):
            def on_train_end(self, *_: Any, held: dict[str, str] = held, callback: FreezeMask = callback) -> None:
                held.update({row["name"]: row["held by"] for row in callback.summary()})

        fit(net, callback, Summary(), max_steps=3)
        active = 0
        for layer in range(2):
            q, k, v, o = (f"net.bert.encoder.layer.{layer}.{name}.weight" for name in PROJECTIONS)
            chosen = heads_of(callback.masks[q], 0)
            assert chosen == heads_of(callback.masks[k], 0) == heads_of(callback.masks[v], 0)
            assert chosen == heads_of(callback.masks[o], 1)
            assert chosen == heads_of(callback.masks[k.replace("weight", "bias")], 0)
            active += sum(chosen)
            if engine == "auto" and 0 < sum(chosen) <= 2:
                assert [held[name] for name in (q, k, v, o)] == ["rows", "rows", "rows", "columns"]
        assert active == 3, "of 8 heads, 0.4 is 3.2"
        bits = moved(before, weights(net))
        assert not any(bool((bits[name] & ~callback.masks[name]).any()) for name in bits)
        assert any(held[name] == "columns" for name in held) == (engine == "auto")
    assert changed(weights(nets["auto"]), weights(nets["dense"])) == set()


def test_pruned_heads_are_pruned_whole() -> None:
    net = Text()
    prune = PruneMask(0.5, structure="head", schedule="constant", start="1 steps")
    fit(net, prune, max_steps=3)
    assert prune.masks.density() == 0.5
    for group in structures.heads(net):
        zeros = [
            heads_of(net.get_parameter(name) != 0, tiles.dims[0])
            for name, tiles in group.items()
            if name in prune.masks
        ]
        assert len(zeros) == 4, "biases are not in scope"
        assert all(each == zeros[0] for each in zeros)


def test_random_layers_are_drawn_anew() -> None:
    net, seen = Net(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            blocks = [all(m.all() for n, m in mask.masks.items() if n.startswith(f"blocks.{i}.")) for i in range(2)]
            seen.append(blocks.index(True))
            assert sum(blocks) == 1

    mask = FreezeMask("head", score="random", density=0.5, scope="blocks", structure="layer", refresh="1 steps")
    fit(net, mask, Watch())
    assert set(seen) == {0, 1}


DENSITY = {"*.bias": 1.0, "blocks.0": 0.25, "stem": 7}


def check_counts(masks: MaskSet) -> None:
    assert all(bool(mask.all()) for name, mask in masks.items() if name.endswith(".bias") or name.startswith("head"))
    first = [name for name in masks if name.startswith("blocks.0") and not name.endswith(".bias")]
    entries = sum(masks[name].numel() for name in first)
    assert sum(int(masks[name].sum()) for name in first) == math.floor(entries / 4 + 0.5)
    assert int(masks["stem.weight"].sum()) == 7
    assert not any(masks[name].any() for name in masks if name.startswith("blocks.1") and name.endswith("weight"))


@pytest.mark.parametrize("score", ["magnitude", "random"])
def test_a_density_for_each_pattern(score: str, tmp_path: Path) -> None:
    freeze = FreezeMask("head", score=score, density=DENSITY)
    phases = [Phase("4 steps", train="head"), Phase(train="head", score=score, density=DENSITY)]
    write_phases(phases, tmp_path / "phases.yaml")
    unfreeze = PhaseUnfreeze(tmp_path / "phases.yaml")
    assert unfreeze.phases[1].selection.density == DENSITY
    for callback in (freeze, unfreeze):
        net = Net()
        before = weights(net)
        fit(net, callback)
        check_counts(callback.masks)
        bits = moved(before, weights(net))
        assert not any(bool((bits[name] & ~callback.masks[name]).any()) for name in bits)
        callback.masks.save(tmp_path / "masks.safetensors")
        assert MaskSet.load(tmp_path / "masks.safetensors") == callback.masks


def test_pruning_beside_a_density_for_each_pattern() -> None:
    freeze = FreezeMask("head", score="magnitude", density={"blocks.0": 0.5})
    with pytest.raises(ValueError, match=r"cannot be reached: FreezeMask holds all but 90 of them"):
        fit(Net(), freeze, PruneMask(0.9, scope="blocks.*.lin.weight"))


@pytest.mark.parametrize(
    ("callback", "says"),
    [
        (lambda: PruneMask(0.5, structure="head"), r"PruneMask: structure='head': stem.weight has no attention heads"),
        (
            lambda: PruneMask(0.5, structure="block:5x5"),
            r"PruneMask: structure='block:5x5': stem.weight of shape \(12, 8\)",
        ),
        (lambda: PruneMask(0.5, regrow="random", allocation="row"), r"PruneMask: regrow exchanges entries of a tensor"),
        (lambda: PruneMask(0.5, structure="tensor", allocation="erk"), r"PruneMask: allocation='erk' would give"),
        (lambda: FreezeMask("head", score="fisher", density={"blocks.7": 0.5}), r"FreezeMask: density: .*'blocks.7'"),
        (
            lambda: FreezeMask("head", score="fisher", density=0.5, structure="head"),
            r"FreezeMask: structure='head': stem.weight has no attention heads, nor has any tensor of this model",
        ),
    ],
)
def test_refused_before_training(callback: Any, says: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=says):
        fit(net, callback())
    assert changed(weights(net), weights(Net())) == set()


def test_a_density_for_each_pattern_on_the_command_line() -> None:
    conf = Path(__file__).parents[2] / "conf"
    with initialize_config_dir(str(conf), version_base=None):
        line = "mask.density={*.attention.*:0.02,net.bert.pooler:50}"
        config = compose("train", ["mask=magnitude", line, "mask.structure=row"])
    callback = instantiate(config.mask)
    callback = callback if isinstance(callback, FreezeMask) else next(iter(callback.values()))
    assert callback.selection.density == {"*.attention.*": 0.02, "net.bert.pooler": 50}
    assert callback.selection.recipe()["density"] == {"*.attention.*": 0.02, "net.bert.pooler": 50}
