"""Several tasks in one network: each stays what it was, and is there again when its delta is written."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from lightning.pytorch import seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors.torch import load_file, save_file

from lightning_mask.app import packnet
from lightning_mask.app.train import train
from lightning_mask.core import MaskSet
from lightning_mask.data import debates
from lightning_mask.delta import apply, inspect

TINY = [
    "model=resnet",
    "model.width=4",
    "model.depth=1",
    "trainer.max_steps=3",
    "batches=2",
    "trainer.limit_test_batches=2",
    "scope=['weights:','!${head}']",
]
NORMS = "own=['${head}','type:BatchNorm2d']"


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Two little tasks on digits, in an order of their own each."""

    def make(*overrides: str) -> DictConfig:
        words = [f"+data@tasks.{name}.data=mnist5k" for name in ("first", "second")]
        words += [f"tasks.{name}.data.{key}" for name in ("first", "second") for key in ("train_size=200", "seed=0")]
        with initialize_config_module("lightning_mask.conf", version_base="1.3"):
            cfg = compose(
                "packnet",
                overrides=[f"paths.output_dir={tmp_path / 'run'}", "experiment=none", *TINY, *words, *overrides],
            )
        cfg.tasks.second.data.seed = 1
        return cfg

    return make


def test_each_task_stays_what_it_was(config: Callable[..., DictConfig], tmp_path: Path):
    cfg = config(NORMS, "density=0.2", "score=magnitude", "model.num_classes=null")
    tasks = packnet.packnet(cfg)
    run = tmp_path / "run"
    assert [task.equal for task in tasks] == [True, True]
    assert tasks[0].accuracy["first"] == tasks[0].accuracy["second"]
    assert list(tasks[1].accuracy) == ["second"]
    assert tasks[0].active == tasks[1].active > 0

    masks = {name: MaskSet.load(run / name / "masks.safetensors") for name in ("first", "second")}
    own = [name for name in masks["first"] if bool(masks["first"][name].all())]
    assert {name.rpartition(".")[2] for name in own} == {"weight", "bias"}
    for name in masks["first"]:
        assert name in own or not bool((masks["first"][name] & masks["second"][name]).any())

    seed_everything(cfg.seed, workers=True, verbose=False)
    digits = {name: instantiate(task.data) for name, task in cfg.tasks.items()}
    model = instantiate(cfg.model, num_classes=10, class_names=None)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    for task in tasks:
        delta = run / task.name / "delta.safetensors"
        assert inspect(delta)["metrics"] == {"test/accuracy": task.accuracy[task.name]}
        apply(tmp_path / "base.safetensors", delta, tmp_path / "out.safetensors")
        model.load_state_dict(load_file(tmp_path / "out.safetensors"))
        logits, labels = packnet.predict(cfg, model, digits[task.name])
        assert float((logits.argmax(1) == labels).double().mean()) == task.accuracy[task.name]
    base = load_file(tmp_path / "base.safetensors")
    assert any(
        "running_mean" in name and not torch.equal(base[name], t)
        for name, t in load_file(tmp_path / "out.safetensors").items()
    )
    rows = list(csv.DictReader((run / "accuracies.csv").open()))
    assert [row["task"] for row in rows] == ["first", "second"]
    assert float(rows[0]["after second"]) == tasks[0].accuracy["second"]
    assert rows[1]["after first"] == ""
    assert json.loads((run / "packnet.json").read_text())["tasks"][1]["name"] == "second"


def test_a_task_that_does_not_hold_the_earlier_ones_is_found_out(
    config: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    learn = packnet._learn

    def careless(cfg: DictConfig, name: str, model: torch.nn.Module, *rest: object) -> object:
        made = learn(cfg, name, model, *rest)  # type: ignore[arg-type]
        if name == "second":
            taken = rest[1]
            weight = next(n for n, mask in taken.items() if mask.any())  # type: ignore[attr-defined]
            model.state_dict()[weight][taken[weight]] += 0.5  # type: ignore[index]
        return made

    monkeypatch.setattr(packnet, "_learn", careless)
    with pytest.raises(RuntimeError, match="predictions of first changed"):
        packnet.packnet(config("density=0.2", "score=magnitude"))
    assert json.loads((tmp_path / "run/packnet.json").read_text())["tasks"][0]["equal"] is False


def test_what_cannot_be_packed_is_refused(config: Callable[..., DictConfig]):
    with pytest.raises(ValueError, match=r"density=0.6 for each of 2 tasks is more than there is"):
        packnet.packnet(config("density=0.6"))
    one = config()
    with open_dict(one.tasks):
        del one.tasks.second
    with pytest.raises(ValueError, match="fewer than two tasks"):
        packnet.packnet(one)
    with (
        pytest.raises(ValueError, match=r"give it to scripts/packnet.py"),
        initialize_config_module("lightning_mask.conf", version_base="1.3"),
    ):
        train(compose("train", overrides=["experiment=packnet"]))


def test_the_experiment_is_of_three_text_tasks():
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        cfg = compose("packnet", overrides=["experiment=packnet", "hydra.run.dir=x"])
    assert [task.data.source._target_.rpartition(".")[2] for task in cfg.tasks.values()] == [
        "tweets",
        "reviews",
        "debates",
    ]
    assert OmegaConf.to_container(cfg.own) == ["net.classifier", "type:LayerNorm"]
    splits = debates()
    assert splits.class_names == ["Democratic", "Moderator", "Republican"]
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1122
    assert len(splits.test) > 200
    assert not {text.casefold() for text in splits.train.texts} & {text.casefold() for text in splits.test.texts}
