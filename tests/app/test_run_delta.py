"""What a training run leaves as its delta: with it the base becomes the model that was tested, and is it again without."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, seed_everything
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import Tensor

from lightning_mask.app.parts import make_model
from lightning_mask.app.train import train
from lightning_mask.core import MaskSet
from lightning_mask.data.pretrained import checkpoint
from lightning_mask.delta import apply, content_hash, diff, inspect, revert
from tests.app.conftest import TINY

Config = Callable[..., DictConfig]


def base_of(cfg: DictConfig) -> dict[str, Tensor]:
    """What the run started from."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    return make_model(cfg, instantiate(cfg.data)).state_dict()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_the_delta_of_the_weights_that_were_tested(config: Config, tmp_path: Path):
    cfg = config(*TINY, "mask.density=0.02")
    metrics = train(cfg)
    run = tmp_path / "run"
    facts, masks = inspect(run / "delta.safetensors"), MaskSet.load(run / "masks.safetensors")
    save_file(base_of(cfg), tmp_path / "base.safetensors")
    assert facts["base"] == content_hash(tmp_path / "base.safetensors")
    assert facts["metrics"] == {name: value for name, value in metrics.items() if name.startswith("test/")} != {}
    assert facts["recipe"]["score"] == "fisher"
    rows = {row["name"]: row for row in facts["tensors"]}
    assert {name: row["active"] for name, row in rows.items() if name in masks} == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    apply(tmp_path / "base.safetensors", run / "delta.safetensors", tmp_path / "tuned.safetensors")
    best = next((run / "checkpoints").glob("best*.ckpt"))
    assert all(row.status == "equal" for row in diff(best, tmp_path / "tuned.safetensors"))
    statistics = {name.rpartition(".")[2] for name, row in rows.items() if name not in masks and row["active"]}
    assert statistics == {"running_mean", "running_var", "num_batches_tracked"}
    revert(best, run / "delta.safetensors", tmp_path / "back.ckpt", base=tmp_path / "base.safetensors")
    assert equal(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], base_of(cfg))

    # Going on: the same base, and all that changed since.
    (tmp_path / "run").rename(tmp_path / "first")
    last = tmp_path / "first/checkpoints/last.ckpt"
    longer = config(*TINY, "mask.density=0.02", "trainer.max_steps=6", f"ckpt_path={last}")
    train(longer)
    assert inspect(run / "delta.safetensors")["base"] == facts["base"]
    assert inspect(run / "delta.safetensors")["active"] >= facts["active"] - 10


def test_which_runs_leave_a_delta(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "run/delta.safetensors"
    quick = [
        *TINY,
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "trainer.limit_test_batches=1",
        "callbacks.best=null",
    ]
    for words in (["mask=none"], ["mask=prune_magnitude"], ["mask=head", "delta=false"]):
        train(config(*quick, *words))
        assert not file.exists(), words
    train(config(*quick, "mask=none", "delta=true"))
    assert inspect(file)["density"] > 0.9
    train(config(*quick, "mask=random", "mask.density=0.1"))
    forms = {row["form"] for row in inspect(file)["tensors"] if row["name"].endswith("conv1.weight")}
    assert forms == {"drawn"}
    with pytest.raises(ValueError, match="delta='perhaps' must be auto, true or false"):
        train(config(*quick, "delta=perhaps"))


@pytest.mark.slow
def test_the_delta_of_minilm_goes_onto_its_published_folder(config: Config, tmp_path: Path):
    """The whole story on the real model: small, exact, and what comes out loads in transformers."""
    from transformers import AutoModelForSequenceClassification

    words = ["model=minilm", "data=tweets", "mask=magnitude", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    words += ["data.train_size=64", "data.max_length=8", "data.batch_size=8", "trainer.limit_val_batches=1"]
    cfg = config(*words, "trainer.limit_test_batches=1", "callbacks.progress.refresh_rate=0", "mask.allocation=uniform")
    train(cfg)
    delta, minilm = tmp_path / "run/delta.safetensors", Path(checkpoint("minilm"))
    facts = inspect(delta)
    assert 0.005 <= facts["density"] < 0.0052
    assert facts["bytes"] == delta.stat().st_size <= 8.1 * facts["active"]
    assert {row["form"] for row in facts["tensors"]} == {"entries", "whole"}  # of no tensor is nothing there

    apply(minilm, delta, tmp_path / "tuned")
    best = torch.load(next((tmp_path / "run/checkpoints").glob("best*.ckpt")), weights_only=True)["state_dict"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", num_labels=3)
    assert equal({f"net.{name}": tensor for name, tensor in loaded.state_dict().items()}, best)
    revert(tmp_path / "tuned", delta, tmp_path / "back", base=minilm)
    assert content_hash(tmp_path / "back") == content_hash(minilm)
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((minilm / "config.json").read_text())


class Removes(Callback):
    """Removes a file when training ends."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, *_: object) -> None:
        self.path.unlink()


def test_a_start_that_is_gone_by_the_end_costs_the_delta_alone(
    config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    train(config(*TINY, "trainer.max_steps=1", "test=false"))
    start = (tmp_path / "run/checkpoints/last.ckpt").rename(tmp_path / "start.ckpt")
    words = ["mask=head", "trainer.max_steps=1", f"initial_checkpoint={start}", f"paths.output_dir={tmp_path / 'on'}"]
    words += [f"+callbacks.removes._target_={__name__}.Removes", f"+callbacks.removes.path={start}"]
    with caplog.at_level("INFO"):
        assert "test/accuracy" in train(config(*TINY, *words))
    assert {"summary.json", "report.html"} <= {file.name for file in (tmp_path / "on").iterdir()}
    assert not (tmp_path / "on/delta.safetensors").exists()
    assert "no delta.safetensors: " in caplog.text
