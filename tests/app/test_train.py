"""`train(cfg)` on real data: a few steps of each kind of run, in one process."""

import csv
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import DictConfig
from safetensors import safe_open

from lightning_mask import MaskSet
from lightning_mask.app.checkpoints import load_weights
from lightning_mask.app.train import train
from lightning_mask.tasks import ImageClassifier
from tests.app.conftest import TINY

Config = Callable[..., DictConfig]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def summary_of(cfg: DictConfig) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(cfg.paths.output_dir) / "summary.json").read_text())
    return loaded


def test_a_run_leaves_its_facts_in_its_folder(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = config(*TINY, "seed=3", "tags=[first]")
    metrics = train(cfg)
    folder = Path(cfg.paths.output_dir)
    assert {"test/accuracy", "test/macro_f1", "val/loss", "train/loss"} <= set(metrics)

    summary = summary_of(cfg)
    assert summary["metrics"]["test/accuracy"] == metrics["test/accuracy"]
    assert summary["seed"] == 3
    assert summary["tags"] == ["first"]
    assert summary["world_size"] == 1
    assert summary["versions"]["torch"] == torch.__version__
    mask = summary["mask"]
    assert mask["held_changed"] == 0
    assert mask["held_checked"] == mask["total"] - mask["active"] > 0
    assert mask["steps"] == 4
    assert sum(sum(row) for row in summary["confusion_matrix"]["rows_true"]) == 500

    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert {"train/loss", "val/accuracy", "mask/density", "test/accuracy"} <= set(rows[0])
    assert MaskSet.load(folder / "masks.safetensors").count() == mask["active"]
    with safe_open(folder / "masks.safetensors", "pt") as file:
        assert file.metadata()
    assert not [f for f in folder.rglob("*") if f.name.startswith(".summary")], "a temporary file was left"

    printed = capsys.readouterr().out
    assert f"0 of {mask['held_checked']:,}" in printed
    assert "What trains and what is held" in printed
    assert f"{metrics['test/accuracy']:.4f}" in printed


def test_checkpoints_load_without_unpickling_and_resume(config: Config) -> None:
    cfg = config(*TINY)
    train(cfg)
    checkpoints = Path(cfg.paths.output_dir) / "checkpoints"
    assert (checkpoints / "last.ckpt").exists()
    assert list(checkpoints.glob("best-*.ckpt"))
    for file in checkpoints.glob("*.ckpt"):
        content = torch.load(file, weights_only=True)
        assert all(name.startswith(("net.", "metrics.")) for name in content["state_dict"])
        assert not [name for name in content["state_dict"] if "mask" in name]
        assert isinstance(ImageClassifier.load_from_checkpoint(file, weights_only=True), ImageClassifier)

    again = config(*TINY, "trainer.max_steps=6", "ckpt_path=last")
    train(again)
    assert summary_of(again)["mask"]["steps"] == 6
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 6
    assert {"metrics.csv", "metrics.1.csv"} <= {f.name for f in checkpoints.parent.iterdir()}

    tested = config(*TINY, "train=false", f"ckpt_path={checkpoints / 'last.ckpt'}")
    page = checkpoints.parent / "report.html"
    page.unlink()
    assert set(train(tested)) == {"test/loss", "test/accuracy", "test/macro_f1"}
    assert page.exists(), "there are no steps to draw, which is no reason for no page"


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config: Config, tmp_path: Path) -> None:
    plain = [*TINY, "scheduler=none", "trainer.val_check_interval=3"]  # a schedule would know how long the run is
    places = [f"paths.output_dir={tmp_path / name}" for name in ("whole", "first", "second")]
    whole = train(config(*plain, "trainer.max_steps=11", places[0]))
    train(config(*plain, "trainer.max_steps=4", places[1]))
    start = tmp_path / "first/checkpoints/last.ckpt"
    resumed = train(config(*plain, "trainer.max_steps=11", places[2], f"ckpt_path={start}"))
    ends = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "second")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole["val/loss"] == resumed["val/loss"]


@pytest.mark.parametrize("mask", ["fisher", "none"])
def test_a_run_with_a_schedule_goes_on_in_the_middle_of_an_epoch(config: Config, tmp_path: Path, mask: str) -> None:
    words = [*TINY, f"mask={mask}", "trainer.val_check_interval=3", "trainer.max_steps=10", "test=false"]
    places = [f"paths.output_dir={tmp_path / name}" for name in ("whole", "second")]
    whole = train(config(*words, "callbacks.best.save_top_k=-1", places[0]))
    start = tmp_path / "whole/checkpoints/best-000006.ckpt"
    resumed = train(config(*words, places[1], f"ckpt_path={start}"))
    ends = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "second")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert whole["val/loss"] == resumed["val/loss"]


def test_another_run_s_weights_are_a_start(config: Config, tmp_path: Path) -> None:
    before = tmp_path / "run/checkpoints/last.ckpt"
    train(config(*TINY, "test=false"))
    words = [
        "seed=7",
        "mask=head",
        "trainer.max_steps=2",
        f"initial_checkpoint={before}",
        f"paths.output_dir={tmp_path / 'on'}",
    ]
    cfg = config(*TINY, *words)
    train(cfg)
    old, new = (torch.load(f, weights_only=True) for f in (before, tmp_path / "on/checkpoints/last.ckpt"))
    assert new["global_step"] == 2, "the other run's four steps are not taken along"
    held = {n for n in new["state_dict"] if n.startswith("net.") and not n.startswith("net.classifier")}
    assert all(torch.equal(new["state_dict"][name], old["state_dict"][name]) for name in held)
    assert not torch.equal(new["state_dict"]["net.classifier.weight"], old["state_dict"]["net.classifier.weight"])
    assert summary_of(cfg)["mask"]["held_changed"] == 0

    with pytest.raises(ValueError, match=r"initial_checkpoint=.*last.ckpt is of another model: net.stem.0.weight"):
        train(config(*TINY, "model.width=8", *words))


def test_weights_of_a_part_are_enough_where_the_module_says_so(tmp_path: Path) -> None:
    model = BoringModel()
    model.strict_loading = False
    weight = torch.full_like(model.layer.weight, 0.5)
    torch.save({"state_dict": {"layer.weight": weight}}, tmp_path / "part.ckpt")
    torch.save({"state_dict": {"other": weight}}, tmp_path / "other.ckpt")
    load_weights(tmp_path / "part.ckpt", model)
    assert torch.equal(model.layer.weight, weight)
    with pytest.raises(ValueError, match=r"weights=.*part.ckpt is of another model: .*layer.bias"):
        load_weights(tmp_path / "part.ckpt", model, "weights", strict=True)
    with pytest.raises(ValueError, match=r"ckpt_path=.*other.ckpt is of another model: it has no tensor of this one"):
        load_weights(tmp_path / "other.ckpt", model)


def test_a_run_shorter_than_the_interval_is_validated_at_its_end(config: Config) -> None:
    cfg = config(*TINY, "trainer.val_check_interval=150", "trainer.accumulate_grad_batches=2", "data.batch_size=32")
    assert "val/accuracy" in train(cfg)
    assert summary_of(cfg)["tested"] == "best: best-000004.ckpt"


def test_a_checkpoint_is_replaced_whole(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def temporary_files_are_on_another_file_system(source: str, target: str) -> None:
        if Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link", source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", temporary_files_are_on_another_file_system)
    train(config(*TINY, "test=false"))
    last = tmp_path / "run/checkpoints/last.ckpt"
    os.link(last, tmp_path / "first.ckpt")
    train(config(*TINY, "test=false", "trainer.max_steps=6", "ckpt_path=last"))
    assert torch.load(last, weights_only=True)["global_step"] == 6
    assert torch.load(tmp_path / "first.ckpt", weights_only=True)["global_step"] == 4, "it was written over"
    assert not [file for file in last.parent.iterdir() if file.suffix != ".ckpt"]


def test_a_checkpoint_that_is_not_one_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    train(config(*TINY, "test=false"))
    content = (tmp_path / "run/checkpoints/last.ckpt").read_bytes()
    (tmp_path / "half.ckpt").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.ckpt").write_text("some words")
    torch.save({"state_dict": {}, "by": ImageClassifier}, tmp_path / "objects.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    (tmp_path / "whole.ckpt").write_bytes(content)
    for name, words, message in (
        ("half", [], "half.ckpt is damaged"),
        ("text", [], "text.ckpt is damaged, or no checkpoint"),
        ("objects", [], "objects.ckpt holds Python objects .*ImageClassifier.*not loaded"),
        ("list", [], "list.ckpt is not a checkpoint of Lightning's"),
        (
            "whole",
            ["model.width=8"],
            r"another model: net.stem.0.weight is \(4, 1, 3, 3\) there and \(8, 1, 3, 3\) here",
        ),
        ("whole", ["train=false", "model.depth=2"], r"another model: net.layers.0.1.conv1.weight is missing there"),
    ):
        places = [f"ckpt_path={tmp_path / name}.ckpt", f"paths.output_dir={tmp_path / 'other'}"]
        with pytest.raises(ValueError, match=message) as caught:
            train(config(*TINY, *words, *places))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "other/metrics.csv").exists()


def test_last_says_when_there_is_none(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(FileNotFoundError, match=r"ckpt_path=last: there is no .*last\.ckpt"):
        train(config(*TINY, "ckpt_path=last", "train=false"))
    with caplog.at_level("INFO"):
        train(config(*TINY, "ckpt_path=last", "test=false"))
    said = f"no last.ckpt in {tmp_path / 'run/checkpoints'}: starting from the beginning"
    assert [record.getMessage() for record in caplog.records].count(said) == 1


def test_a_resumed_run_still_knows_its_best_weights(config: Config, tmp_path: Path) -> None:
    # The highest loss is the first one, so the best weights are from before the resume.
    plain = [*TINY, "scheduler=none", "callbacks.best.monitor=val/loss", "callbacks.best.mode=max"]
    places = [f"paths.output_dir={tmp_path / name}" for name in ("whole", "first", "second", "third")]
    whole = train(config(*plain, "trainer.max_steps=8", places[0]))
    train(config(*plain, "trainer.max_steps=4", places[1]))
    start = f"ckpt_path={tmp_path / 'first/checkpoints/last.ckpt'}"
    resumed = train(config(*plain, "trainer.max_steps=8", places[2], start))
    assert all(resumed[name] == whole[name] for name in whole if name.startswith(("test/", "val/")))
    (best,) = (tmp_path / "first/checkpoints").glob("best-*.ckpt")
    best.unlink()
    cfg = config(*plain, "trainer.max_steps=8", places[3], start)
    train(cfg)
    assert summary_of(cfg)["tested"].startswith("best: best-00000")
    assert list((tmp_path / "third/checkpoints").glob("best-*.ckpt"))


def test_the_same_seed_gives_the_same_figures_and_another_gives_others(config: Config) -> None:
    first, again, other = (train(config(*TINY, f"seed={seed}")) for seed in (1, 1, 2))
    assert first == again
    assert first["train/loss"] != other["train/loss"]


@pytest.mark.parametrize(
    ("overrides", "active"),
    [
        (["mask=none"], 1.0),
        (["mask=head"], None),
        (["mask=last_layers"], None),
        (["mask=bitfit"], None),
        (["mask=random", "mask.density=100"], None),
        (["mask=magnitude"], None),
        (["mask=gradient", "mask.batches=1"], None),
        (["mask=mask_then_lift", "mask.phases.0.batches=1"], 1.0),
        (["mask=gradual_unfreeze", "mask.every='1 steps'"], None),
        (["mask=unfreeze_on_plateau"], None),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_strategy_runs_and_holds(overrides: list[str], active: float | None, config: Config) -> None:
    base = [o for o in TINY if not o.startswith("experiment")]
    cfg = config(
        "model=resnet", "data=mnist5k", "model.width=4", "model.depth=1", "data.train_size=500", *base, *overrides
    )
    train(cfg)
    mask = summary_of(cfg)["mask"]
    assert mask["held_changed"] == 0
    assert active is None or mask["active"] == active * mask["total"]
    if overrides == ["mask=head"]:
        assert mask["active"] == 170
    if overrides[0] == "mask=mask_then_lift":
        assert [p["step"] for p in mask["phases"]][-1] == 2
    if overrides[0] == "mask=random":
        assert mask["active"] == 270


@pytest.mark.parametrize(
    ("overrides", "sparsity"),
    [
        (["mask=prune_gradual", "mask.sparsity=0.9", "mask.allocation=global"], 0.9),
        (["mask=prune_magnitude", "mask.sparsity=0.5"], 0.5),
        (["mask=prune_random", "mask.sparsity=0.25", "mask.allocation=global"], 0.25),
        (["mask=rigl", "mask.sparsity=0.5", "mask.every='1 steps'"], 0.5),
        (["mask=prune_magnitude", "mask.sparsity='2:4'", "mask.scope=[net.layers.1,'!type:BatchNorm2d']"], 0.5),
    ],
)
def test_pruning_ends_at_the_exact_sparsity_and_tests_the_pruned_weights(
    overrides: list[str], sparsity: float, config: Config
) -> None:
    base = [o for o in TINY if not o.startswith("experiment")]
    cfg = config(
        "model=resnet", "data=mnist5k", "model.width=4", "model.depth=1", "data.train_size=500", *base, *overrides
    )
    train(cfg)
    summary = summary_of(cfg)
    weights = torch.load(Path(cfg.paths.output_dir) / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    masks = MaskSet.load(Path(cfg.paths.output_dir) / "masks.safetensors")
    pruned = {name: mask for name, mask in masks.items() if not mask.all()}
    zeros = sum(int((weights[name] == 0).sum()) for name in pruned)
    assert zeros == sum(int((~mask).sum()) for mask in pruned.values())
    assert summary["mask"]["sparsity"] == pytest.approx(sparsity, abs=1e-3)
    assert summary["tested"].startswith("last")
    with (Path(cfg.paths.output_dir) / "sparsity.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {row["tensor"]: float(row["sparsity"]) for row in rows if row["step"] == rows[-1]["step"]}
    assert last.pop("") == pytest.approx(summary["mask"]["sparsity"], abs=1e-6)
    assert last == {name: pytest.approx(1 - float(masks[name].float().mean()), abs=1e-6) for name in last}
    assert (Path(cfg.paths.output_dir) / "sparsity.png").read_bytes().startswith(b"\x89PNG")


def test_the_phases_of_a_run_can_be_given_back(config: Config, tmp_path: Path) -> None:
    words = [*TINY, "logger=none", "test=false", "mask=gradual_unfreeze"]
    first = config(*words, "mask.every='1 steps'")
    train(first)
    back = [f"mask.phases={tmp_path / 'run/phases.yaml'}", "mask.every=null", "mask.lr_decay=1"]
    again = config(*words, *back, f"paths.output_dir={tmp_path / 'again'}")
    train(again)
    assert summary_of(again)["mask"]["phases"] == summary_of(first)["mask"]["phases"]
    ends = [
        torch.load(tmp_path / n / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for n in ("run", "again")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_two_masks_compose_from_the_command_line(config: Config) -> None:
    cfg = config(*TINY, "mask.density=0.9", "+mask@callbacks.prune=prune_magnitude", "callbacks.prune.sparsity=0.25")
    train(cfg)
    mask = summary_of(cfg)["mask"]
    assert mask["sparsity"] == pytest.approx(0.25, abs=1e-3)
    assert mask["held_changed"] == 0


@pytest.mark.slow
def test_the_default_model_learns_real_tweets_behind_a_mask(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    few = [
        "data.train_size=256",
        "data.max_length=16",
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "mask.batches=2",
    ]
    cfg = config(
        "trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "callbacks.progress.refresh_rate=0", *few
    )
    metrics = train(cfg)
    summary = summary_of(cfg)
    assert summary["mask"]["total"] == 22_714_371
    assert summary["mask"]["active"] == 1155 + int(0.005 * (22_714_371 - 1155) + 0.5)
    assert summary["mask"]["held_changed"] == 0
    assert summary["confusion_matrix"]["classes"] == ["negative", "neutral", "positive"]
    assert 0 <= metrics["test/accuracy"] <= 1
    for file in (Path(cfg.paths.output_dir) / "checkpoints").glob("*.ckpt"):
        torch.load(file, weights_only=True)


def test_a_set_that_is_too_small_is_refused_before_training(config: Config, tmp_path: Path) -> None:
    for words, message in (
        (["data.source.test=0"], "no example in the test set: .*data.source.test=0.1.*test=false"),
        (["data.source.validation=0"], "no example in the validation set: .*trainer.limit_val_batches=0"),
    ):
        with pytest.raises(ValueError, match=message):
            train(config(*TINY, *words))
    assert not (tmp_path / "run/checkpoints").exists()
    without = ["data.source.test=0", "test=false", "data.source.validation=0", "trainer.limit_val_batches=0"]
    assert "train/loss" in train(config(*TINY, *without))


def test_the_facts_of_training_outlive_a_test_that_fails(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(ImageClassifier, "test_step", fails)
    cfg = config(*TINY)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(cfg)
    assert summary_of(cfg)["mask"]["steps"] == 4
    assert summary_of(cfg)["tested"] is None


def test_debug_modes_run(config: Config) -> None:
    for debug in ("fast_dev_run", "limit", "overfit"):
        cfg = config(*TINY[:2], f"debug={debug}", "data.train_size=200", "trainer.max_steps=6", "test=false")
        assert "train/loss" in train(cfg)


def test_mixed_precision_trains_with_and_without_clipping(config: Config, tmp_path: Path) -> None:
    ends = []
    for name, clip in (("plain", "null"), ("clipped", "0.01")):
        words = ["trainer.precision=bf16-mixed", f"trainer.gradient_clip_val={clip}", "optimizer=sgd", "test=false"]
        cfg = config(*TINY, *words, f"paths.output_dir={tmp_path / name}")
        train(cfg)
        assert summary_of(cfg)["mask"]["held_changed"] == 0
        ends.append(torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
    assert any(not torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    train(config(*TINY, "trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0", "test=false"))


def test_no_callbacks_and_no_logger_is_a_plain_run(config: Config) -> None:
    cfg = config(*TINY[:1], *TINY[2:], "callbacks=none", "logger=none", "mask=none", "test=false")
    assert "train/loss" in train(cfg)
    assert summary_of(cfg)["mask"] == {}
    assert sorted(f.name for f in Path(cfg.paths.output_dir).iterdir()) == ["report.html", "summary.json"]


def test_a_csv_of_the_user(config: Config, tmp_path: Path) -> None:
    rows = [f"{'good' if i % 2 else 'bad'} thing number {i},{'pos' if i % 2 else 'neg'}" for i in range(60)]
    (tmp_path / "rows.csv").write_text("review,mood\n" + "\n".join(rows) + "\n")
    words = [
        "data=csv",
        f"data.source.path={tmp_path / 'rows.csv'}",
        "data.source.text_column=review",
        "data.source.label_column=mood",
    ]
    cfg = config(*words, "mask=head", *TINY[1:], "data.max_length=8", "data.batch_size=4", "model.pretrained=false")
    train(cfg)
    assert summary_of(cfg)["confusion_matrix"]["classes"] == ["neg", "pos"]
