"""`mask=auto`: what is chosen follows from the trials by the rule that is told, and the trials see training data alone."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, open_dict

from lightning_mask.app import auto
from lightning_mask.app.auto import choose, wait_for
from lightning_mask.app.auto.budget import exceeds
from lightning_mask.app.auto.halving import Setting
from lightning_mask.app.auto.settings import all_settings
from lightning_mask.app.auto.trial import hold_out, outcome_of, run_length
from lightning_mask.app.parts import make_model
from lightning_mask.app.train import train
from lightning_mask.data import ImageData, mnist5k
from lightning_mask.tasks import ImageClassifier
from tests.app.conftest import REPO, TINY, command

Config = Callable[..., DictConfig]

HEAD = 170
BODY = 5142 - HEAD
QUICK = [*TINY, "mask=auto", "mask.steps=3", "mask.eta=2", "mask.minutes=60", "mask.widen=0", "trainer.max_steps=12"]
NONE = [f"~mask.candidates.{name}" for name in ("none", "random", "bitfit", "gradient", "magnitude")]
FEW = [*QUICK, *NONE, "mask.densities=[0.01,0.1]", "mask.rates=[1,10]"]


@pytest.fixture(autouse=True)
def _one_thread_and_one_reading_of_the_digits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    splits = _SPLITS[0] if _SPLITS else mnist5k()
    _SPLITS[:] = [splits]
    monkeypatch.setattr("lightning_mask.data.mnist5k", lambda **options: splits)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


_SPLITS: list[Any] = []


def record_of(cfg: DictConfig) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((Path(cfg.paths.output_dir) / "auto.json").read_text())
    return loaded


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["strategy"], row["density"], row["lr"]


class Witness:
    """Notes the images that trials train on and are judged by, as bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: set[bytes] = set()
        self.judged: set[bytes] = set()
        self.trials = 0
        run, inside = auto.run_quietly, [False]

        def trial(*arguments: Any) -> Any:
            self.trials += 1
            inside[0] = True
            try:
                return run(*arguments)
            finally:
                inside[0] = False

        def noting(step: Any, seen: set[bytes]) -> Any:
            def noted(module: ImageClassifier, batch: dict[str, torch.Tensor], *rest: Any) -> Any:
                if inside[0]:
                    scale = module.trainer.datamodule._normalise  # type: ignore[attr-defined]
                    pixels = (batch["pixel_values"] * scale.deviation + scale.mean) * 255
                    seen.update(image.numpy().tobytes() for image in pixels.round().to(torch.uint8))
                return step(module, batch, *rest)

            return noted

        monkeypatch.setattr(auto, "run_quietly", trial)
        monkeypatch.setattr(ImageClassifier, "mask_loss", noting(ImageClassifier.mask_loss, self.trained))
        monkeypatch.setattr(ImageClassifier, "validation_step", noting(ImageClassifier.validation_step, self.judged))
        monkeypatch.setattr(ImageClassifier, "test_step", noting(ImageClassifier.test_step, self.judged))


def test_the_choice_follows_from_the_trials_and_they_see_training_data_alone(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    witness = Witness(monkeypatch)
    cfg = config(
        *FEW, "+mask.candidates.norms={mask:layernorm}", "+mask.candidates.rows={mask:snip,with:{structure:row}}"
    )
    metrics = train(cfg)
    record = record_of(cfg)
    choice = record["choice"]

    # The trials: all settings, then the better half of those before with twice the steps, until one would be left; after
    # the first ones, the best of each strategy is among them.
    rungs = record["rungs"]
    assert [rung["steps"] for rung in rungs] == [3, 6, 12]
    assert {key(row) for row in rungs[0]["trials"]} == {
        *(("fisher", d, lr) for d in (0.01, 0.1) for lr in (0.003, 0.03)),
        *(("rows", d, lr) for d in (0.01, 0.1) for lr in (0.003, 0.03)),
        *(("head", None, lr) for lr in (0.003, 0.03)),
    }
    for before, after in pairwise(rungs):
        ranked = sorted(before["trials"], key=lambda row: (row["score"], row["entries"]))
        half = math.ceil(len(ranked) / 2)
        if before is rungs[0]:
            each = [next(row for row in ranked if row["strategy"] == name) for name in ("fisher", "rows", "head")]
            ranked = [*each, *(row for row in ranked if row not in each)]
        went_on, then = {key(row) for row in ranked[:half]}, {key(row): row["score"] for row in before["trials"]}
        found = {key(row): row["score"] for row in after["trials"]}
        assert went_on <= found.keys()
        # What is worse than it was before is followed by its next smaller rate.
        assert len(found) - len(went_on) <= sum(found[one] > then[one] for one in found)
    assert sum(len(rung["trials"]) for rung in rungs) == witness.trials >= 10 + 5 + 3
    counted = {("head", None): HEAD, ("fisher", 0.01): HEAD + 50, ("fisher", 0.1): HEAD + 497}
    for row in (row for rung in rungs for row in rung["trials"]):
        assert row["entries"] == counted.get((row["strategy"], row["density"]), row["entries"])
    (dropped,) = record["left_out"]
    assert dropped["name"] == "norms"
    assert "LayerNorm" in dropped["why"]

    # The figures: the mean loss of the held-out examples, and the error of a paired difference of means.
    folder = Path(cfg.paths.output_dir)
    losses = {
        key(row): torch.tensor(json.loads((folder / row["folder"] / "losses.json").read_text())["losses"])
        for row in rungs[-1]["trials"]
    }
    best, *others = rungs[-1]["trials"]
    like = [best]
    for row in rungs[-1]["trials"]:
        assert row["score"] == pytest.approx(float(losses[key(row)].mean()), rel=1e-5)
    for row in others:
        d = losses[key(row)] - losses[key(best)]
        assert row["standard_error"] == pytest.approx(float(d.std() / len(d) ** 0.5), rel=1e-4)
        like += [row] if row["difference"] <= row["standard_error"] else []
    assert key(choice) == key(best)
    assert ("no difference seen" in choice["reason"]) == (len(like) > 1)

    # What they saw.
    splits = _SPLITS[0]
    images = [image.numpy().tobytes() for image in splits.images]
    mine = ImageData(source=lambda: splits, train_size=500)._load()["train"].tensors[0]
    held_back = {images[i] for i in [*splits.validation, *splits.test]}
    assert record["judged_by"] == {"monitor": "val/loss", "mode": "min", "examples": 100, "from": "of the training set"}
    assert len(witness.judged) == 100
    assert len(witness.trained) > 300
    assert not witness.judged & witness.trained
    assert not (witness.judged | witness.trained) & held_back
    assert witness.judged | witness.trained <= {image.numpy().tobytes() for image in mine}

    # The run that follows is the one with that mask and rate, on the whole training set.
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["auto"]["strategy"] == choice["strategy"]
    assert summary["auto"]["reason"] == choice["reason"]
    strategy = {"rows": ["mask=snip", "mask.structure=row"]}.get(choice["strategy"], [f"mask={choice['strategy']}"])
    density = [] if choice["density"] is None else [f"mask.density={choice['density']}"]
    plain = [*TINY, "trainer.max_steps=12", *strategy, *density, f"lr={choice['lr']}"]
    assert train(config(*plain, f"paths.output_dir={tmp_path / 'plain'}")) == metrics
    assert choice["reason"] in capsys.readouterr().out.replace("\n", " ")

    # A run that goes on keeps it, and so do the other ranks: without another trial.
    before = witness.trials
    again = config(*FEW, "ckpt_path=last", "trainer.max_steps=14")
    train(again)
    assert record_of(again)["choice"] == choice
    moved = choose(
        config(*FEW, f"ckpt_path={folder / 'checkpoints/last.ckpt'}", f"paths.output_dir={tmp_path / 'new'}")
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    for other in (moved, choose(again)):
        assert (other.mask, other.lr) == (choice["mask"], choice["lr"])
    assert witness.trials == before


@pytest.mark.slow
def test_a_choice_that_is_killed_goes_on_where_it_was(config: Config, tmp_path: Path) -> None:
    run, words = tmp_path / "run", [*FEW, "mask.densities=[0.01]", "logger=none", "test=false"]
    script = [sys.executable, str(REPO / "scripts/train.py"), *words, "ckpt_path=last", f"hydra.run.dir={run}"]
    unfinished, file = run / "auto_trials.json", run / "auto.json"
    log = tmp_path / "killed.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            script,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            if unfinished.exists() and len(json.loads(unfinished.read_text())) >= 2:
                break
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL, log.read_text()
    assert not file.exists()
    done = json.loads(unfinished.read_text())
    assert 2 <= len(done) < 4 + 2
    kept = {folder: stamps(folder) for folder in (Path(result["folder"]) for result in done.values())}
    halfway = [folder for folder in (run / "auto").iterdir() if folder not in kept]

    again = command(*script, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert again.returncode == 0, again.stdout
    assert f"its trials in {unfinished} ({len(done)}) are not run again" in again.stdout.replace("\n", " ")
    assert {folder: stamps(folder) for folder in kept} == kept
    assert not unfinished.exists()
    record = json.loads(file.read_text())
    trials = [row for rung in record["rungs"] for row in rung["trials"]]
    assert len(trials) == 4 + 2 == len(list((run / "auto").iterdir()))
    assert all((folder / "trial.json").exists() for folder in halfway)
    earlier = sum(result["wall_seconds"] for result in done.values())
    assert record["seconds"] > earlier + sum(row["seconds"] for row in trials if run / row["folder"] not in kept)

    whole = config(*words)
    with open_dict(whole):
        whole.paths.output_dir = str(tmp_path / "whole")
    choose(whole)
    assert figures(record_of(whole)) == figures(record)
    assert json.loads((run / "summary.json").read_text())["auto"]["reason"] == record["choice"]["reason"]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def figures(record: dict[str, Any]) -> Any:
    """What a choice says, without the time that it took."""
    if isinstance(record, dict):
        return {name: figures(value) for name, value in record.items() if name not in ("seconds", "run")}
    return [figures(value) for value in record] if isinstance(record, list) else record


def test_of_an_interrupted_choice_what_is_not_the_same_runs_again(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[str] = []
    broken: list[int] = []
    real = auto.run_quietly

    def trial(cfg: DictConfig, folder: Path) -> dict[str, Any]:
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(folder.name)
        result = real(cfg, folder)
        return {**result, "metrics": {}, "mask": {}, "error": "broke"} if len(ran) in broken else result

    def interrupted(*words: str) -> list[str]:
        ran[:] = []
        with pytest.raises(KeyboardInterrupt):
            choose(config(*FEW, *words))
        return list(ran)

    monkeypatch.setattr(auto, "run_quietly", trial)
    folders, unfinished = tmp_path / "run" / "auto", tmp_path / "run" / "auto_trials.json"
    broken[:] = [2]
    one, two, three, four = interrupted()
    assert len(json.loads(unfinished.read_text())) == 3
    shutil.rmtree(folders / three)
    broken[:] = []
    assert interrupted()[:2] == [two, three], "what failed, and what is lost"
    assert not {one, four} & set(ran)

    content = json.loads(unfinished.read_text())
    assert len(content) == 3 + 1 + 2  # the last two of the first round
    assert interrupted("optimizer.weight_decay=0.5") == [one, two, three, four], "another config"
    unfinished.write_text(json.dumps({key: {**row, "wall_seconds": 100.0} for key, row in content.items()}))
    ran[:] = []
    with pytest.raises(ValueError, match=r"mask.minutes=1 is too short: a trial of 3 steps takes 100 s"):
        choose(config(*FEW, "mask.minutes=1"))
    assert not ran, "time that was spent counts"


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["trainer.max_steps=12", "trainer.max_epochs=1000"], 12),
        (["trainer.max_steps=-1", "trainer.max_epochs=2"], 2 * 7),  # of 100 / 16 batches
        (["trainer.max_steps=300", "trainer.max_epochs=2", "devices=2"], 2 * 4),
        (["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.accumulate_grad_batches=3"], 2 * 3),
        (["trainer.max_steps=-1", "trainer.max_epochs=2", "trainer.limit_train_batches=0.5"], 2 * 3),
        (["trainer.max_steps=-1", "trainer.max_epochs=2", "devices=auto"], None),
        (["trainer.max_steps=-1", "trainer.max_epochs=-1"], None),
    ],
)
def test_no_trial_is_longer_than_the_run_by_its_steps_or_its_epochs(
    words: list[str], steps: int | None, config: Config
) -> None:
    cfg = config(*FEW, "data.train_size=100", "data.batch_size=16", *words)
    assert run_length(cfg, instantiate(cfg.data)) == steps


def test_ranks_wait_for_the_first_of_their_own_launch(tmp_path: Path, config: Config) -> None:
    with pytest.raises(TimeoutError, match="one folder that they share"):
        wait_for(tmp_path / "auto.json", "", 0)
    (tmp_path / "auto.json").write_text('{"run": "yesterday"}')
    with pytest.raises(TimeoutError):
        wait_for(tmp_path / "auto.json", "today", 0)
    assert wait_for(tmp_path / "auto.json", "yesterday", 0) == {"run": "yesterday"}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    with pytest.raises(FileNotFoundError, match=r"auto\.json that says what mask=auto chose: name the strategy"):
        choose(config(*QUICK, "ckpt_path=last"))


def settings_of(cfg: DictConfig) -> tuple[list[Setting], list[dict[str, str]]]:
    made: Any = instantiate(cfg.mask)
    return all_settings(cfg, made, make_model(cfg.copy(), instantiate(cfg.data)))


def test_a_budget_leaves_out_what_exceeds_it_and_is_filled(config: Config) -> None:
    common = [*QUICK, "mask.rates=null", "mask.candidates.magnitude=null", "mask.densities=[0.01,0.1]"]
    for budget, limit in ((400, 400), (400 / 5142, 400), ("'3600 B'", 405)):  # AdamW: 8 bytes, a tenth is kept back
        settings, left_out = settings_of(config(*common, f"mask.budget={budget}"))
        assert [(s.strategy, s.density, s.entries) for s in settings if s.strategy in ("head", "fisher", "bitfit")] == [
            ("fisher", 0.01, HEAD + 50),
            ("head", None, HEAD),
            ("bitfit", None, 254),
            ("fisher", limit - HEAD, limit),
        ]
        assert [row["name"] for row in left_out] == ["none"]
    assert {s.lr for s in settings} == {None}
    settings, left_out = settings_of(
        config(*common, "mask.budget='0.001 MB'", "optimizer=sgd", "optimizer.momentum=0.0", "optimizer.nesterov=false")
    )
    assert not left_out  # no state at all
    phases = [
        f"+mask.candidates.{name}={{mask:{name}}}" for name in ("mask_then_lift", "gradual_unfreeze", "child_tuning_f")
    ]
    _, left_out = settings_of(config(*common, *phases, "mask.budget=400"))
    assert {row["name"].split()[0] for row in left_out} == {
        "none", "mask_then_lift", "gradual_unfreeze", "child_tuning_f"
    }  # fmt: skip
    units = "{structure:row,scope:[net.layers.2.*.conv2.weight]}"
    rows = f"+mask.candidates.rows={{mask:gradient,with:{units},densities:[0.9]}}"
    for budget in (400, 480, 700, 740, 750):  # a row has 144 entries
        settings, _ = settings_of(config(*common, rows, f"mask.budget={budget}"))
        (filled,) = [s for s in settings if s.strategy == "rows"]
        assert filled.entries == HEAD + (budget - HEAD) // 144 * 144
    with pytest.raises(ValueError, match=r"less than any candidate needs: head trains 170.*net\.classifier"):
        settings_of(config(*common, "mask.budget=100"))
    for wrong in ("'10 apples'", "0", "1.5", "-3"):
        with pytest.raises(ValueError, match=r"mask\.budget="):
            settings_of(config(*common, f"mask.budget={wrong}"))


def test_what_a_trial_shows_to_exceed_the_budget_is_not_chosen() -> None:
    lifted = {"active": 50, "most_active": 150, "total": 1000}
    assert exceeds(150, lifted) is None
    assert exceeds(0.15, lifted) is None
    assert exceeds(149, lifted) == "150 entries are more than the budget of 149"
    assert exceeds(0.149, lifted) == "150 entries are more than the budget of 149"
    assert exceeds("100 B", {**lifted, "optimizer_bytes": 101}) == (
        "101 bytes of optimizer state are more than the budget of 100"
    )
    for budget, facts in ((None, lifted), ("100 B", lifted), (10, {})):
        assert exceeds(budget, facts) is None


def test_only_a_figure_that_is_not_finite_counts_as_diverged(config: Config, tmp_path: Path) -> None:
    given = instantiate(config(*FEW, "mask.budget=100").mask)

    def after(metrics: dict[str, float], error: str | None = None, active: int = 50) -> tuple[Any, ...]:
        result = {
            "metrics": metrics,
            "error": error,
            "mask": {"active": active, "most_active": active},
            "wall_seconds": 1.0,
        }
        made = outcome_of(given, Setting("a", None, 1.0, None, {}), 3, result, tmp_path)
        return made.score, made.error, made.diverged

    assert after({"val/loss": 0.5}) == (0.5, None, False)
    assert after({"val/loss": math.nan}) == (None, "val/loss is not finite", True)
    assert after({"other": 1.0})[::2] == (None, False)
    assert after({}, "RuntimeError: no memory") == (None, "RuntimeError: no memory", False)
    assert after({"val/loss": 0.5}, active=101)[::2] == (None, False)


def test_bad_input_is_refused_before_any_trial(
    config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a trial ran")

    monkeypatch.setattr(auto, "run_quietly", never)
    for words, match in (
        (["mask.candidates=null"], "candidates is empty"),
        ([f"mask.candidates.{name}=null" for name in ("fisher", "head")], "candidates is empty"),
        (["+mask.candidates.x={strategy:head}"], r"candidates\.x=.* must have .*mask"),
        (["mask.eta=1"], "eta=1 must be at least 2"),
        (["mask.steps=two"], r"mask\.steps='two' must be a whole number"),
        (["mask.mode=lowest"], "mode='lowest' must be min or max"),
        (["data.hold_out=0.2"], "hold_out=0.2 and mask=auto exclude each other"),
        (["optimizer.lr=1e-3"], "finds the learning rate by way of lr"),
        (
            ["mask.candidates.fisher.mask=nothing", "+mask.candidates.head.with={color:red}"],
            r"no candidate can be tried \(fisher: .*'nothing'.*head: mask=head has no value 'color'",
        ),
    ):
        with pytest.raises(Exception, match=match):
            train(config(*FEW, *words))

    class WithoutHoldOut(ImageData):
        def __init__(self, seed: int = 0) -> None:
            super().__init__(source=lambda: _SPLITS[0], seed=seed)

    monkeypatch.setattr("lightning_mask.data.ImageData", WithoutHoldOut)
    cfg = config(*FEW, "~data", "+data._target_=lightning_mask.data.ImageData")
    with caplog.at_level("INFO"):
        assert hold_out(cfg, instantiate(cfg.mask), WithoutHoldOut()) is None
    assert "ImageData takes no hold_out, so that the trials are judged by its validation set" in caplog.text


@pytest.mark.slow
def test_ranks_of_torchrun_take_the_choice_of_the_first(tmp_path: Path) -> None:
    words = [
        *FEW,
        "trainer=ddp_cpu",
        "logger=none",
        "test=false",
        "mask.densities=[0.01]",
        "mask.rates=[1]",
        "mask.widen=1",
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    run = command(*torchrun, str(REPO / "scripts/train.py"), *words, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stdout
    (file,) = tmp_path.rglob("auto.json")
    summary, record = (json.loads(path.read_text()) for path in (file.parent / "summary.json", file))
    assert summary["world_size"] == 2
    assert summary["auto"]["strategy"] == record["choice"]["strategy"]
    first, last = record["rungs"]
    assert [row["lr"] for row in first["trials"]] == [0.003, 0.003]
    rates = [row["lr"] for row in last["trials"]]
    assert sorted(rates) == [0.003, 0.003, 0.009], "of the better one, which had the largest rate, a larger one"
    assert run.stdout.count("mask=auto chose") == 1
