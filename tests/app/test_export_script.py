"""Exporting a run: from its folder to files that score what it scored."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file

from lightning_mask import MaskSet
from lightning_mask.app.export import export, load_run
from lightning_mask.app.train import train
from lightning_mask.export import load_physical, load_sparse
from tests.app.conftest import REPO, TINY, command, train_command

Config = Callable[..., DictConfig]
PRUNED = ["mask=prune_magnitude", "mask.structure=row", "mask.sparsity=0.6", "logger=none"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that pruned rows of a small residual network."""
    folder = tmp_path_factory.mktemp("runs")
    done = train_command(*TINY, *PRUNED, f"hydra.run.dir={folder}/run", cwd=folder)
    assert done.returncode == 0, done.stdout
    return folder / "run"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        return compose("export", overrides=["repeats=1", *overrides])


@pytest.mark.slow
def test_a_smaller_network_scores_what_the_run_scored(run: Path, tmp_path: Path) -> None:
    done = command(sys.executable, str(REPO / "scripts/export.py"), f"run={run}", "format=physical", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert list(tmp_path.iterdir()) == [], "an export leaves nothing where it was typed"
    folder = run / "export/physical"
    assert sorted(f.name for f in folder.iterdir()) == ["model.json", "model.pt2", "model.safetensors"]
    lines = {words[1]: words for words in (line.split() for line in done.stdout.splitlines()) if len(words) > 5}
    before, after = (int(lines["entries"][i].replace(",", "")) for i in (3, 5))
    assert after < before
    scored = json.loads((run / "summary.json").read_text())["metrics"]["test/accuracy"]
    assert lines["test/accuracy"][3] == lines["test/accuracy"][5] == f"{scored:.4f}"

    loaded = load_run(run, None, 4)
    small = load_physical(folder, loaded.net)
    assert sum(p.numel() for p in small.parameters()) == after
    batch = torch.randn(3, 1, 28, 28)
    program = torch.export.load(folder / "model.pt2").module()
    torch.testing.assert_close(program(pixel_values=batch), small.eval()(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_every_format_is_what_the_run_has(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    net = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
    scored = json.loads((run / "summary.json").read_text())["metrics"]["test/loss"]

    dense = export(composed(f"run={run}", f"out={tmp_path}/dense.safetensors"))
    there = load_file(tmp_path / "dense.safetensors")
    assert there.keys() == net.keys()
    assert all(torch.equal(there[name], tensor) for name, tensor in net.items())
    assert dense["before"]["test/loss"] == dense["after"]["test/loss"] == pytest.approx(scored, abs=1e-6)

    sparse = export(composed(f"run={run}", "format=sparse", f"out={tmp_path}/sparse.safetensors", "score=false"))
    there = load_sparse(tmp_path / "sparse.safetensors")
    assert all(torch.equal(there[name], tensor) for name, tensor in net.items())
    assert "test/loss" not in sparse["after"]
    assert sparse["after"]["bytes"] == (tmp_path / "sparse.safetensors").stat().st_size < dense["after"]["bytes"]

    onnx = export(composed(f"run={run}", "format=onnx", f"out={tmp_path}/model.onnx"))
    assert onnx["after"]["test/accuracy"] == onnx["before"]["test/accuracy"]
    assert onnx["after"]["test/loss"] == pytest.approx(onnx["before"]["test/loss"], abs=1e-4)
    assert onnx["after"]["entries"] < onnx["before"]["entries"]
    said = capsys.readouterr().out
    assert said.count("test/accuracy") == 2
    assert "last.ckpt" in said


def test_what_cannot_be_exported_is_refused_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, *overrides: str) -> None:
        with pytest.raises(error, match=match):
            export(composed(f"out={tmp_path}/out", *overrides))
        assert not (tmp_path / "out").exists()

    refused(ValueError, "run has no value yet")
    refused(ValueError, "format='zip' is unknown; there are dense, sparse", f"run={run}", "format=zip")
    refused(ValueError, "examples=1 must be a whole number from 2", f"run={run}", "examples=1")
    refused(FileNotFoundError, "no folder run=", f"run={tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    refused(ValueError, "folder of no run", f"run={tmp_path}/empty")
    refused(FileNotFoundError, "no checkpoint weights=other.ckpt.*last.ckpt", f"run={run}", "weights=other.ckpt")
    refused(ValueError, "No Linear layer has at most two entries", f"run={run}", "format=2to4")


def test_weights_from_before_pruning_are_refused(config: Config, tmp_path: Path) -> None:
    words = ["mask=prune_gradual", "mask.start='3 steps'", "mask.end='4 steps'", "mask.every='1 steps'", "logger=none"]
    cfg = config(*TINY, *words, "callbacks.last.every_n_steps=null", "test=false")
    train(cfg)
    run = tmp_path / "run"
    (run / ".hydra").mkdir()
    cfg.paths.output_dir = "???"
    OmegaConf.save(cfg, run / ".hydra/config.yaml")
    best = next(run.glob("checkpoints/best*.ckpt"))
    early = torch.load(best, weights_only=True)
    assert not MaskSet.load(run / "masks.safetensors")["net.stem.0.weight"].all()
    with torch.no_grad():
        early["state_dict"]["net.stem.0.weight"].fill_(1.0)
    torch.save(early, run / "checkpoints/early.ckpt")
    out = f"out={tmp_path}/out"
    with pytest.raises(ValueError, match=r"early\.ckpt has .* entries that are not zero.*weights=last"):
        export(composed(f"run={run}", f"weights={run}/checkpoints/early.ckpt", out))
    with pytest.raises(ValueError, match="Nothing to remove"):
        export(composed(f"run={run}", "format=physical", out))
    assert not (tmp_path / "out").exists()
    full = export(composed(f"run={run}", "format=onnx", out, "score=false"))
    assert full["after"]["entries"] == full["before"]["entries"]
