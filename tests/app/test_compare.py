"""Comparisons: what runs, what does not run again, how a rate is found, and what a failure costs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lightning_mask.app.auto import CHOICE
from lightning_mask.app.compare import cells, check, compare, first_rung, progress, rate, write
from lightning_mask.app.trials import Trial, run_trials

BROKEN = "+strategies.broken={overrides:['mask=random','mask.scope=[nothing.here]'],share:null}"
Config = Callable[..., DictConfig]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    def make(*overrides: str, experiment: str = "compare_smoke") -> DictConfig:
        words = [f"experiment={experiment}", f"paths.output_dir={tmp_path}", *overrides]
        with initialize_config_module("lightning_mask.conf", version_base="1.3"):
            return compose("compare", overrides=words)

    return make


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("trial.json")}


def test_a_comparison_from_start_to_report(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compare(config(BROKEN), tmp_path)
    runs = {(r["strategy"], r["density"], r["seed"]) for r in rows}
    assert runs == {(s, d, seed) for s, d in (("dense", None), ("head", None), ("random", 0.1)) for seed in (0, 1)}
    assert all(0 <= r["score"] <= 1 and r["held_changed"] in (0, None) and r["optimizer_bytes"] > 0 for r in rows)
    assert {r["strategy"] for r in rows if r["masks"] is not None and Path(r["masks"]).exists()} >= {"head", "random"}
    by = {r["strategy"]: r for r in rows}
    assert by["head"]["active"] < by["random"]["active"] < by["dense"]["active"] == by["dense"]["total"]

    said = capsys.readouterr().out
    assert "failed: digits, broken 0.1:" in said
    assert "nothing.here" in said
    table = (tmp_path / "table.md").read_text()
    assert all(name in table for name in ("dense", "head", "random"))
    assert "\n- broken at 10 %: " in table
    stored = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [r for r in stored if r["error"] is None] == rows
    assert [r["strategy"] for r in stored if r["error"] is not None] == ["broken"]
    rates = json.loads((tmp_path / "rates.json").read_text())["digits"]
    assert rates["head"]["lr"] == by["head"]["lr"]
    assert rates["broken 0.1"]["lr"] is None

    before = stamps(tmp_path)
    assert compare(config(BROKEN), tmp_path) == rows
    assert stamps(tmp_path) == before

    more = compare(config(BROKEN, "seeds=[0,1,2]"), tmp_path)
    added = stamps(tmp_path)
    assert {name: added[name] for name in before} == before
    assert all(name.endswith("seed-2/trial.json") for name in set(added) - set(before))
    assert len(more) == len(rows) + 3

    assert compare(config(BROKEN, "seeds=[0]", "report_only=true"), tmp_path) == [r for r in rows if r["seed"] == 0]


@pytest.mark.timeout(300)
def test_runs_that_a_further_rate_asks_for_again_are_not_run_again(config: Config, tmp_path: Path) -> None:
    """With one rate the seeds run at once; when more rates are tried and it stays the best, their results are there."""
    words = ["~strategies.head", "~strategies.random", "baselines=[dense]", "seeds=[0]", "tasks.digits.lr=1e-8"]
    (row,) = compare(config(*words, "tuning.points=1"), tmp_path)
    before = stamps(tmp_path)
    (tuned,) = compare(config(*words, "tuning.points=2"), tmp_path)
    added = sorted(set(stamps(tmp_path)) - set(before))
    assert {name: stamps(tmp_path)[name] for name in before} == before
    assert tuned["lr"] == row["lr"] == 1e-8, "of rates that change nothing the larger counts"
    assert {**tuned, "lr_at_end": False} == row
    assert [name.split("/")[-2] for name in added] == [f"lr-{lr}-seed-1000" for lr in ("1e-08", "3e-09")]


def test_a_budget_of_nothing_runs_nothing(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(config("budget=0"), tmp_path) == []
    assert stamps(tmp_path) == {}
    assert "12 trials to run" in capsys.readouterr().out


def test_a_trial_runs_again_when_its_config_or_its_result_is_another(tmp_path: Path) -> None:
    ran: list[str] = []

    def run(*words: str, **how: Any) -> dict[str, Any]:
        trial = Trial(
            ("experiment=smoke", "mask=head", "trainer.max_steps=1", "test=false", *words), tmp_path / "one's own"
        )
        return run_trials([trial], told=lambda trial, result: ran.append(trial.folder.name), **how)[0]

    first = run()
    assert first["error"] is None
    assert first["metrics"]["val/accuracy"] >= 0
    assert run() == first
    assert run("tags=[a]") == first
    assert len(ran) == 1
    failed = run("mask.train=[nothing.here]")
    assert "nothing.here" in failed["error"]
    assert failed["metrics"] == {}
    assert run("mask.train=[nothing.here]") == failed
    assert len(ran) == 2
    run("mask.train=[nothing.here]", retry_failed=True)
    assert len(ran) == 3
    (tmp_path / "one's own/trial.json").write_text("{")
    assert run()["error"] is None
    assert len(ran) == 4


def test_an_interrupted_trial_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(cfg: DictConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mask.app.train.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_trials([Trial(("experiment=smoke",), tmp_path / "run")])
    assert stamps(tmp_path) == {}


def test_two_trials_do_not_share_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="share a folder"):
        run_trials([Trial(("seed=1",), tmp_path / "a"), Trial(("seed=2",), tmp_path / "a")])


def test_rates() -> None:
    assert [rate(r) for r in range(-8, -3)] == [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert rate(first_rung(1e-4, 1.0, 0.4)) == 1e-4
    assert rate(first_rung(1e-4, 0.005, 0.4)) == 1e-3  # 8.3e-4
    rungs = [first_rung(1e-4, share, 0.4) for share in (1.0, 0.1, 0.01, 0.001, 1e-4)]
    assert rungs == sorted(rungs)
    assert rungs[0] < rungs[-1]


def test_the_best_rate_is_looked_for_beyond_an_end_of_the_grid(config: Config, tmp_path: Path) -> None:
    cell = cells(config("tuning.points=3", "tuning.widen=2"), tmp_path)[0]
    middle = rate(cell.start)

    def after(scores: dict[float, float | None]) -> Any:
        results: dict[Path, dict[str, Any]] = {}
        while (known := progress(cell, results)).rung is None and known.error is None:
            for trial in known.next:
                lr = float(next(w for w in trial.overrides if w.startswith("lr=")).removeprefix("lr="))
                assert "seed=1000" in trial.overrides
                figures = {"val/accuracy": scores[lr]}
                results[trial.folder] = {"error": None, "metrics": figures, "folder": str(trial.folder)}
        return known

    inside = after({rate(cell.start - 1): 0.1, middle: 0.3, rate(cell.start + 1): 0.2})
    assert (inside.rung, len(inside.scores)) == (cell.start, 3)
    assert [t.folder.name for t in inside.next] == [f"lr-{middle:g}-seed-{seed}" for seed in (0, 1)]
    rising = after({rate(cell.start + step): step / 10 + 0.5 for step in range(-1, 6)})
    assert (rising.rung, len(rising.scores)) == (cell.start + 3, 5)
    flat = after({rate(cell.start + step): 0.5 + 0.1 * (step == 2) for step in range(-1, 4)})
    assert flat.rung == cell.start + 2, "rates that change nothing are too small"
    top = after({rate(cell.start - 1): 0.1, middle: 0.2, rate(cell.start + 1): 0.3, rate(cell.start + 2): None})
    assert (top.rung, len(top.scores)) == (cell.start + 1, 4)
    assert top.scores[cell.start + 2] is None
    assert after(dict.fromkeys((rate(cell.start + step) for step in (-1, 0, 1)), None)).error is not None
    cell = dataclasses.replace(cell, mode="min")
    falling = after({rate(cell.start + step): 0.5 - step / 10 if step < 2 else None for step in range(-1, 3)})
    assert (falling.rung, falling.scores[cell.start + 2]) == (cell.start + 1, None)


def test_a_run_that_failed_while_the_rate_was_sought_is_named(config: Config, tmp_path: Path) -> None:
    cell = cells(config("tuning.points=3", "tuning.widen=0"), tmp_path)[0]
    results: dict[Path, dict[str, Any]] = {}
    for rung, error, score in [(-1, None, 0.6), (0, "RuntimeError: worker killed", None), (1, None, 0.61)]:
        folder = cell.trial(cell.start + rung, 1000, tuning=True).folder
        metrics = {} if score is None else {"val/accuracy": score}
        results[folder] = {"error": error, "metrics": metrics, "folder": str(folder)}
    (row,) = write([cell], results, tmp_path)
    assert row["error"] == f"lr-{rate(cell.start):g}-seed-1000: RuntimeError: worker killed"
    stored = json.loads((tmp_path / "rates.json").read_text())[cell.task][cell.name]
    assert stored["lr"] == rate(cell.start + 1)


def test_a_budget_is_not_for_a_launcher_that_begins_everything_at_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = OmegaConf.create({"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"})
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: OmegaConf.create({"launcher": launcher}))
    with pytest.raises(ValueError, match=r"budget=60: a launcher begins all runs .* leave budget out, or the launcher"):
        compare(config("budget=60"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_that_finds_its_own_rate_is_given_one(config: Config, tmp_path: Path) -> None:
    auto = "+strategies.auto={overrides:['mask=auto'],share:0.005,tuned:false}"
    found = cells(config("tuning.points=3", "tuning.widen=2", auto), tmp_path)
    assert [(cell.points, cell.widen) for cell in found if cell.strategy == "auto"] == [(1, 0)]
    assert {(cell.points, cell.widen) for cell in found if cell.strategy != "auto"} == {(3, 2)}
    (cell,) = [cell for cell in found if cell.strategy == "auto"]
    results = {}
    for seed, lr in zip(cell.seeds, (0.5, 0.25), strict=True):
        folder = cell.trial(cell.start, seed, tuning=False).folder
        folder.mkdir(parents=True)
        (folder / CHOICE).write_text(json.dumps({"choice": {"lr": lr}, "seconds": 60.0}))
        figures = {"val/accuracy": 0.5, "test/accuracy": 0.5}
        known = {"error": None, "metrics": figures, "mask": {}, "seconds": {"fit": 20.0}, "folder": str(folder)}
        results[folder] = known
    rows = write([cell], results, tmp_path)
    assert [(row["lr"], row["seconds"], row["lr_at_end"]) for row in rows] == [(0.5, 80.0, False), (0.25, 80.0, False)]


def test_what_cannot_be_compared_is_refused(config: Config) -> None:
    for words, message in [
        (["seeds=[0,1000]"], "tuning.seeds share 1000"),
        (["seeds=[0,0]"], "none twice"),
        (["densities=[2]"], "must be a share"),
        (["baselines=[heads]"], "no strategy 'heads'"),
        (["strategies.head.share=0.0"], "strategies.head.share"),
        (["~strategies.head.share"], "lacks share"),
        (["+strategies.head.takes=mask.sparsity"], "strategies.head.takes='mask.sparsity' must be a word with"),
        (["+tasks.digits.mode=lower"], r"tasks\.digits\.mode='lower' must be max"),
        (["tasks={}"], "tasks is empty"),
    ]:
        cfg = config(*(w for w in words if w != "tasks={}"))
        if "tasks={}" in words:
            OmegaConf.set_struct(cfg, False)
            cfg.tasks = {}
        with pytest.raises(ValueError, match=message):
            check(cfg)


@pytest.mark.parametrize(
    "experiment", ["compare_text", "compare_image", "compare_pruning", "compare_shifts", "compare_smoke"]
)
def test_every_cell_of_an_experiment_composes(experiment: str, config: Config, tmp_path: Path) -> None:
    cfg = config(experiment=experiment)
    check(cfg)
    for cell in cells(cfg, tmp_path):
        with initialize_config_module("lightning_mask.conf", version_base="1.3"):
            made = compose("train", overrides=cell.trial(cell.start, 0, tuning=False).words)
        assert made.trainer.max_steps == cfg.steps
        assert made.optimizer.lr == rate(cell.start)
        if cell.density is not None:
            setting = made.callbacks.peer if "peer" in made.callbacks else made.mask
            taken = 1 - setting.sparsity if "sparsity" in setting else setting.density
            assert taken == pytest.approx(cell.density, rel=1e-9)
