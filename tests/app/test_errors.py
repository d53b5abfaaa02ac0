"""A wrong command line and a bad value: one line on standard error, exit code 2."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from lightning_mask.app import errors
from lightning_mask.app.summary import write_json
from lightning_mask.app.train import main, train
from lightning_mask.data.images import Normalise
from tests.app.conftest import TINY

CASES = [
    (["mask=fishr"], ["mask has no option 'fishr'", "nearest: fisher", "prune_gradual"]),
    (["mask.densty=0.1"], ["no key 'mask.densty'", "mask.density"]),
    (["density=0.1"], ["no key 'density'", "mask.density"]),
    (["weight_decay=0.1"], ["optimizer.weight_decay"]),
    (["trainer.max_stepz=1"], ["trainer.max_steps"]),
    (["mask=null"], ["mask=none"]),
    (["trainer.max_steps"], ["missing EQUAL"]),
    (["mask=[fisher,head]"], ["mask=fisher +mask@callbacks.second=prune_magnitude"]),
    (["ckpt_path=epoch=1.ckpt"], ["""'ckpt_path="epoch=1.ckpt"'"""]),
    (["data.source.path=my rows (1).csv"], ["""'data.source.path="my rows (1).csv"'"""]),
    (["mask = fisher"], ["no spaces", " mask=fisher."]),
    (["data=csv"], ["data.source.path has no value yet"]),
    (["model=hf"], ["model.model has no value yet"]),
    (["data=csv", "data.source.path=/no/rows.csv"], ["/no/rows.csv"]),
    (["data=mnist5k"], ["TextClassifier does not go with ImageData", "model=resnet, model=efficientnet_lite0"]),
    (["data=tweets", "model=smollm2"], ["CausalLM does not go with TextData", "model=minilm"]),
    (["data=reviews_lm"], ["TextClassifier does not go with LanguageData", "model=smollm2"]),
    (["experiment=smollm2_reviews", "data.prompt=What?"], ["prompt must have {text} in it"]),
    (["ckpt_path=/no/such.ckpt"], ["/no/such.ckpt", "ckpt_path=auto"]),
    (["initial_checkpoint=/no/such.ckpt"], ["There is no file initial_checkpoint=/no/such.ckpt"]),
    (["train=false"], ["ckpt_path="]),
    (
        ["model.pretrained=false", "data=csv", "data.source.path=rows.csv", "data.max_length=1024"],
        ["data.max_length=1024", "model.model=minilm has 512 positions"],
    ),
    (["train=false", "test=false"], ["nothing to do"]),
    (["seed=null"], ["seed"]),
    ([*TINY, "mask.density=2.0"], ["density=2.0"]),
    ([*TINY, "mask.train=[net.clasifier]"], ["net.clasifier", "net.classifier"]),
    ([*TINY, "mask.score=fishr"], ["fishr", "fisher"]),
    ([*TINY, "mask=prune_gradual", "mask.sparsity=1.0"], ["sparsity=1.0"]),
    ([*TINY, "+optimizer.nesterov=true"], ["nesterov"]),
    ([*TINY, "trainer.precision=7"], ["7"]),
    ([*TINY, "optimized_metric=test/acc"], ["optimized_metric"]),
    ([*TINY, "+optimized_metric=test/acc"], ["test/acc", "test/accuracy"]),
    ([*TINY, "last_layers=2"], ["last_layers=2 changes nothing"]),
    ([*TINY, "optimizer.lr=0.1", "lr=0.2"], ["lr=0.2 changes nothing"]),
    ([*TINY, "+callbacks.two.train=head"], ["callbacks.two says no _target_"]),
    ([*TINY, "paths.log_dir=a_file"], ["a_file/smoke", "Not a directory", "paths.log_dir"]),
    ([*TINY, "lr=abc"], ["optimizer.lr='abc' must be a number"]),
    ([*TINY, "data.batch_size=abc"], ["data.batch_size='abc' must be a whole number"]),
    ([*TINY, "data.train_size=1.5"], ["data.train_size=1.5 must be a whole number or null"]),
    ([*TINY, "model.width=abc"], ["model.width='abc' must be a whole number"]),
    ([*TINY, "mask.density=0.5%"], ["mask.density='0.5%' must be a number"]),
    ([*TINY, "callbacks.report.check_held=1"], ["callbacks.report.check_held=1 must be true or false"]),
    (
        [*TINY, "mask=unfreeze_on_plateau", "mask.phases.0.until.monitor=val/los", "trainer.max_epochs=1"],
        ["monitors 'val/los'", "val/loss"],
    ),
    ([*TINY, "model.num_classes=4"], ["model.num_classes=4", "10 classes"]),
]


def run_main(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["train.py", *overrides])
    with pytest.raises(SystemExit) as end:
        main()
    GlobalHydra.instance().clear()
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(("overrides", "words"), CASES, ids=[c[0][-1] for c in CASES])
def test_one_line_says_what_is_wrong(
    overrides: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").touch()
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"row {i},{i % 2}\n" for i in range(40)))
    monkeypatch.delenv(errors.FULL, raising=False)
    at_work = "mask=unfreeze_on_plateau" in overrides  # what is logged shows when it trains
    assert run_main(overrides, monkeypatch) == (1 if at_work else 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line and line.strip()]
    said = [line for line in lines if line.startswith("error: ")]
    assert len(said) == 1
    assert "Traceback" not in "".join(lines)
    for word in words:
        assert word in said[0]
    assert errors.FULL not in os.environ, "a process that is started later would inherit it"


def test_an_error_of_torch_at_work_for_us_is_not_about_input() -> None:
    three_channels = Normalise([0.5] * 3, [0.5] * 3)
    with pytest.raises(RuntimeError) as caught:
        three_channels([(torch.zeros(2, 4, 4), torch.tensor(0))])
    assert not errors.is_about_input(caught.value)


def test_the_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(errors.FULL, "1")
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=null"])
    GlobalHydra.instance().clear()
    with pytest.raises(ValueError, match="seed"):
        main()
    GlobalHydra.instance().clear()


def test_train_raises_for_a_caller(config: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match="ckpt_path"):
        train(config("train=false"))


def test_a_json_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("inf")], "z": "ü"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, None], "z": "ü"}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text())["z"] == "ü"
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"]
