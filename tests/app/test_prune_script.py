"""scripts/prune.py: what a run leaves behind, that training goes on from it, and what is refused before minutes are spent."""

import csv
import json
import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from torch import Tensor

from lightning_mask.app import errors
from lightning_mask.app.prune import _print, main, prune
from lightning_mask.app.train import train
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.one_shot import LayerReport, OneShot, Pruned
from tests.app.conftest import CONF, REPO, command

DIGITS = [
    "model=resnet",
    "data=mnist5k",
    "model.width=4",
    "model.depth=2",
    "data.train_size=400",
    "batches=3",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
]
Config = Callable[..., DictConfig]


@pytest.fixture
def pruning(tmp_path: Path) -> Config:
    def make(*overrides: str) -> DictConfig:
        with initialize_config_module("lightning_mask.conf", version_base="1.3"):
            return compose("prune", overrides=[f"paths.output_dir={tmp_path / 'pruned'}", *overrides])

    return make


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return state


def test_every_argument_of_the_recipe_is_in_the_config(pruning: Config) -> None:
    assert set(OneShot.__dataclass_fields__) <= set(pruning())
    assert OneShot() == OneShot(**{name: pruning()[name] for name in OneShot.__dataclass_fields__})
    lines = (CONF / "prune.yaml").read_text().splitlines()
    for name in OneShot.__dataclass_fields__:
        assert any(line.startswith(f"{name}: ") and "# " in line for line in lines), f"{name} has no comment"


@pytest.mark.slow
def test_training_pruning_and_training_on(
    pruning: Config, config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["trainer.max_steps=4", "trainer.val_check_interval=4", "callbacks.progress.refresh_rate=0"]
    taught = ["experiment=smoke", "mask=none", "model.depth=2", "data.train_size=400", *steps]
    train(config(*taught, "trainer.max_steps=20", f"paths.output_dir={tmp_path / 'taught'}"))
    start = f"ckpt_path={tmp_path / 'taught/checkpoints/last.ckpt'}"
    dense = weights(tmp_path / "taught")
    folder = tmp_path / "pruned"

    for method in ("magnitude", "wanda", "obs"):
        after = prune(pruning(*DIGITS, start, f"method={method}", "sparsity=0.6", "allocation=uniform"))
        summary = json.loads((folder / "summary.json").read_text())
        assert set(after) == set(summary["before"]) == {f"{p}/{n}" for p in ("val", "test") for n in FIGURES}
        assert summary["metrics"] == after
        assert summary["before"]["test/loss"] != after["test/loss"]
        assert summary["mask"]["pruned by"] == method

        sparse, masks = weights(folder), MaskSet.load(folder / "masks.safetensors")
        with open(folder / "layers.csv", newline="") as file:
            layers = list(csv.DictReader(file))
        assert list(layers[0]) == ["name", "entries", "zeros", "error", "seconds"]
        names = [layer["name"] for layer in layers]
        assert "net.stem.0.weight" in names
        assert "net.classifier.weight" not in names
        for layer in layers:
            zeros = math.floor(0.6 * int(layer["entries"]) + 0.5)
            assert int(layer["zeros"]) == zeros == int((~masks[layer["name"]]).sum())
            assert not sparse[layer["name"]][~masks[layer["name"]]].any()
            assert 0 < float(layer["error"]) < 1
        assert summary["mask"]["pruned"] == sum(int(layer["zeros"]) for layer in layers)
        for name, value in dense.items():
            if not name.startswith("metrics"):
                assert torch.equal(value, sparse[name]) == (name not in names), name
        assert (method == "obs") != all(torch.equal(sparse[n], dense[n] * masks[n]) for n in names)

    shown = capsys.readouterr().out
    for words in ("What was pruned", "net.layers.*.*.conv1.weight", "Before and after", "test/accuracy"):
        assert words in shown

    more = [*taught, "mask=head", f"mask.mask={folder / 'masks.safetensors'}", "mask.train=null"]
    train(config(*more, f"ckpt_path={folder / 'checkpoints/last.ckpt'}", f"paths.output_dir={tmp_path / 'on'}"))
    on = weights(tmp_path / "on")
    for name, mask in masks.items():
        assert not on[name][~mask].any(), name
        assert not torch.equal(on[name], sparse[name]), name
    assert json.loads((tmp_path / "on/summary.json").read_text())["mask"]["held_changed"] == 0


FIGURES = ("loss", "accuracy", "macro_f1")


@pytest.mark.slow
def test_a_language_model_has_a_perplexity_before_and_after(pruning: Config, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, tie_word_embeddings=True, **shape)).save_pretrained(
        tmp_path / "tiny"
    )
    rows = [f"a film of {n} words that is {'not ' * (n % 2)}worth the ticket,{n % 2}" for n in range(60)]
    (tmp_path / "rows.csv").write_text("\n".join(["text,label", *rows]))
    words = [f"model.model={tmp_path / 'tiny'}", "data.tokenizer=smollm2", "data.batch_size=4"]
    words += ["data.source._target_=lightning_mask.data.table", f"+data.source.path={tmp_path / 'rows.csv'}"]
    words += ["+data.source.text_column=text", "+data.source.label_column=label"]
    words += ["trainer.limit_val_batches=1", "trainer.limit_test_batches=2", "batches=3", "data.max_length=12"]
    after = prune(pruning("method=obs", "sparsity=2:4", "trainer.precision=bf16-mixed", "val=false", *words))
    summary = json.loads((tmp_path / "pruned/summary.json").read_text())
    assert set(after) == {"test/loss", "test/perplexity", "test/accuracy", "test/exact"}
    for figures in (summary["before"], after):
        assert figures["test/perplexity"] == pytest.approx(math.exp(figures["test/loss"]), rel=1e-3)
    assert after["test/loss"] != summary["before"]["test/loss"]
    masks = MaskSet.load(tmp_path / "pruned/masks.safetensors")
    kept = {name: mask for name, mask in masks.items() if mask.all()}
    assert {name for name in masks if "_proj" not in name} == set(kept)
    for name in masks.keys() - kept.keys():
        assert (masks[name].view(-1, 4).sum(1) == 2).all()
    state = weights(tmp_path / "pruned")
    assert state["net.lm_head.weight"].data_ptr() == state["net.model.embed_tokens.weight"].data_ptr()


REFUSED = [
    (["sparsity=1.5"], ["sparsity=1.5 must be a share in [0, 1)"]),
    (["sparsity=half"], ["sparsity='half'"]),
    (["method=sparsegpt"], ["method='sparsegpt'", "magnitude, wanda, obs"]),
    (["allocation=global"], ["allocation='global'", "uniform, erk, row"]),
    (["batches=0"], ["batches=0 must be a whole number from 1"]),
    (["sparsity=2:4"], ["net.stem.0.weight", "width of 9", "divisible by 4"]),
    (["sparsity=0.999"], ["all of net.stem.0.weight", "largest", "allow_whole_layers"]),
    (["scope=[net.classifer]"], ["net.classifer", "net.classifier"]),
    (["scope=[net.stem]"], ["is no weight of a linear or convolution layer", "!net.stem"]),
    (["ckpt_path=/no/such.ckpt"], ["/no/such.ckpt", "No such file"]),
    (["trainer=ddp_cpu"], ["one process", "trainer.devices=2"]),
    (["mask=fisher"], ["mask"]),
    (["val=false", "test=false"], ["val=false and test=false"]),
    (["seed=null"], ["seed=None must be a whole number"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[case[0][0] for case in REFUSED])
def test_one_line_says_what_is_wrong_and_nothing_is_written(
    overrides: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(errors.FULL, raising=False)
    monkeypatch.setattr(sys, "argv", ["prune.py", *DIGITS, *overrides])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as end:
        main()
    GlobalHydra.instance().clear()
    assert end.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    for word in words:
        assert word in said[0]
    left = [p.name for p in tmp_path.rglob("*") if p.is_file() and ".hydra" not in p.parts]
    assert set(left) <= {"prune.log"}


@pytest.mark.slow
def test_the_command_runs_from_any_folder(tmp_path: Path) -> None:
    words = [*DIGITS, "method=wanda", "sparsity=0.5", "val=false"]
    done = command(sys.executable, str(REPO / "scripts/prune.py"), *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    (folder,) = (tmp_path / "logs/prune/runs").iterdir()
    assert str(folder.relative_to(tmp_path)) in done.stdout
    wanted = {"summary.json", "layers.csv", "masks.safetensors", "checkpoints", ".hydra"}
    assert wanted <= {path.name for path in folder.iterdir()}


def test_the_help_says_what_to_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["prune.py", "--help"])
    GlobalHydra.instance().clear()
    with suppress(SystemExit):
        main()
    GlobalHydra.instance().clear()
    said = capsys.readouterr().out
    assert "lightning-mask prune model=smollm2 data=reviews_lm method=obs sparsity=0.5" in said
    assert "damping: 0.01" in said


def test_long_names_are_told_apart_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"net.bert.encoder.layer.*.attention.self.{word}.weight" for word in ("query", "key", "value")]
    layers = [LayerReport(name.replace("*", str(i)), 884_736, 442_368, 0.2, 0.1) for name in names for i in (0, 1)]
    _print(Pruned(MaskSet({}), layers), {}, {}, {"before": 0, "after": 0, "prune": 0}, tmp_path)
    told = "".join(line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if line.count("│") > 4)
    assert all(name in told for name in names)
