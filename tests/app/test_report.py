"""`report.html`, of real runs and of folders that lack this or that."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

from lightning_mask import MaskSet
from lightning_mask.app.report import try_report, write_report
from lightning_mask.app.train import train
from tests.app.browser import CHROMIUM, browser
from tests.app.conftest import TINY

Config = Callable[..., DictConfig]
TENSORS = {"net.h.0.q.weight": (8, 4), "net.h.1.q.weight": (8, 4), "net.head.bias": (3,)}


class Reader(HTMLParser):
    """The elements of a page, its words, and every address in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.words = ""
        self._style = False
        self.feed(page.read_text(encoding="utf-8"))
        self.words = " ".join(self.words.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.words += f" {data}"
        self._style = False


def folder_of_a_run(folder: Path, *, accuracy: float = 0.5, started: float = 1e9, **config: Any) -> Path:
    """Write what a run leaves."""
    (folder / ".hydra").mkdir(parents=True)
    tensors = [
        {"name": name, "shape": shape, "active": 3, "density": 0.1, "held_by": "compact"}
        for name, shape in TENSORS.items()
    ]
    mask = {
        "active": 9,
        "total": 67,
        "density": 9 / 67,
        "sparsity": None,
        "held_checked": 58,
        "held_changed": 0,
        "steps": 20,
    }
    phases = [{"phase": i, "name": n, "step": 10 * i, "reason": "start"} for i, n in enumerate(("masked", "lifted"))]
    summary = {
        "task_name": "digits",
        "metrics": {"test/accuracy": accuracy, "test/loss": 1.5},
        "mask": {**mask, "seconds_per_step": 0.1, "phases": phases, "tensors": tensors},
        "confusion_matrix": {"classes": ["cat", "dog"], "rows_true": [[7, 3], [2, 8]]},
        "versions": {"torch": "2.13.0"},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / ".hydra/config.yaml").write_text(yaml.safe_dump({"lr": 0.001, "seed": 0, **config}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["epoch", "lr-AdamW/pg1", "mask/phase", "step", "train/loss"])
        rows.writerows([0, 0.001, step // 10, step, 2 - step / 20] for step in range(20))
    for sign in ("summary.json", ".hydra/config.yaml", "metrics.csv"):
        os.utime(folder / sign, (started, started))
    return folder


def test_a_run_leaves_its_page(config: Config, tmp_path: Path) -> None:
    first = train(
        config(*TINY, "mask=mask_then_lift", "mask.phases.0.batches=1", f"paths.output_dir={tmp_path / 'first'}")
    )
    os.utime(tmp_path / "first/summary.json", (1e9, 1e9))
    os.utime(tmp_path / "first/metrics.csv", (1e9, 1e9))
    os.utime(tmp_path / "first/masks.safetensors", (1e9, 1e9))
    metrics = train(config(*TINY, "mask=prune_magnitude", "mask.sparsity=0.5"))
    pages = [Reader(tmp_path / name / "report.html") for name in ("first", "run")]
    for page, figures in zip(pages, (first, metrics), strict=True):
        assert f"{figures['test/accuracy']:.4g}" in page.words
        assert {"net.classifier.weight", "net.layers.*.*", "train/loss", "lr-AdamW", "torch"} <= set(page.words.split())
        assert not [address for address in page.addresses if not address.startswith("data:")]
        assert not {"script", "img", "iframe", "object"} & set(page.tags)
        assert page.tags.count("svg") > 3
    assert "phase masked" in pages[0].words
    assert "phase lifted" in pages[0].words
    assert "The run before is" not in pages[0].words
    assert "Sparsity over time" in pages[1].words
    assert "The run before is first" in pages[1].words


def test_each_phase_shows_what_it_trained(config: Config, tmp_path: Path) -> None:
    words = ["logger=none", "test=false", "report=false"]
    train(config(*TINY, *words, "mask=gradual_unfreeze", "mask.every='1 steps'"))
    assert not (tmp_path / "run/report.html").exists()
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    phases, held = summary["mask"]["phases"], summary["mask"]["phase_active"]
    assert [each["phase"] for each in held] == [phase["phase"] for phase in phases]
    totals = [sum(each["active"].values()) for each in held]
    assert totals == sorted(set(totals)), "each phase trains more than the one before"
    assert totals[0] == 170
    assert totals[-1] == summary["mask"]["active"]
    page = Reader(write_report(tmp_path / "run"))
    assert all(f"phase {phase['name']}" in page.words for phase in phases)
    assert "There are no curves" in page.words


def test_the_newest_older_run_is_compared_with_and_differences_are_named(tmp_path: Path) -> None:
    folder_of_a_run(tmp_path / "old", accuracy=0.1, started=1e9)
    folder_of_a_run(tmp_path / "before", accuracy=0.4, started=2e9, mask={"score": "fisher"}, lr=0.002)
    run = folder_of_a_run(tmp_path / "run", accuracy=0.55, started=3e9, mask={"score": "snip"})
    folder_of_a_run(tmp_path / "later", started=4e9)
    (tmp_path / "other").mkdir()
    page = Reader(write_report(run))
    assert "The run before is before" in page.words
    for row in ("test/accuracy 0.4 0.55 +0.15", "lr 0.002 0.001", "mask.score fisher snip"):
        assert row in page.words
    assert "seed 0" not in page.words.split("What was done differently")[1].split("Configuration")[0]
    assert "The run before is old" in Reader(write_report(run, previous=tmp_path / "old")).words
    assert "The run before" not in Reader(write_report(tmp_path / "old")).words
    (tmp_path / "before/summary.json").write_text('{"metrics"')
    assert "The run before is old" in Reader(write_report(run)).words, "a damaged neighbour is passed over"


def test_names_are_text_whatever_they_hold(tmp_path: Path) -> None:
    evil = """<script>alert('1')</script><img src=x onerror=alert(2)>"&amp;\ud800"""
    run = folder_of_a_run(tmp_path / "<b onclick=x>run", **{"a<script>": evil[:-1]})
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"task_name": evil, "tags": [evil], "overrides": [evil], "tested": evil, "versions": {evil: evil}}
    summary["metrics"][f"test/{evil}"] = 1
    summary["mask"]["phases"][0] |= {"name": evil, "reason": evil}
    summary["mask"]["tensors"][0] |= {"name": f"h.0.{evil}", "held_by": evil}
    summary["confusion_matrix"]["classes"][0] = evil
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "metrics.csv").write_text("step," + '"<script>x</script>"\n0,1\n1,2\n')
    before = folder_of_a_run(tmp_path / "<script>before", **{"b<script>": evil[:-1]})
    page = Reader(write_report(run, previous=before))
    assert not {"script", "img"} & set(page.tags)
    assert not page.handlers
    assert page.words.count("<script>alert('1')</script><img src=x onerror=alert(2)>\"&amp;") > 8


def test_a_page_is_made_of_what_there_is(tmp_path: Path) -> None:
    whole = folder_of_a_run(tmp_path / "whole/run")
    MaskSet({name: torch.ones(shape, dtype=torch.bool) for name, shape in TENSORS.items()}).save(
        whole / "masks.safetensors"
    )
    parts = {"summary.json": "digits", ".hydra": "Configuration", "metrics.csv": "learning rate"}
    for left_out, word in parts.items():
        run = tmp_path / left_out.strip(".") / "run"
        shutil.copytree(whole, run)
        shutil.rmtree(run / left_out) if left_out == ".hydra" else (run / left_out).unlink()
        words = Reader(write_report(run)).words
        assert word not in words
        assert all(other in words for name, other in parts.items() if name != left_out)
        assert "net.head.bias" in words
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(whole / "masks.safetensors", alone)
    assert "67" in Reader(write_report(alone)).words


def test_a_run_that_was_killed(tmp_path: Path) -> None:
    run = folder_of_a_run(tmp_path / "run")
    (run / "summary.json").unlink()
    content = (run / "metrics.csv").read_text()
    (run / "metrics.csv").write_text(content[: content.rindex(",")])  # the last line is not whole
    (run / "phases.yaml").write_text(
        yaml.safe_dump([{"name": "masked", "until": "50%"}, {"name": "lifted", "lr_scale": 0.1}])
    )
    words = Reader(write_report(run)).words
    assert "no summary.json" in words
    assert "19 steps" in words
    assert "masked 0" in words
    assert "lifted 10" in words


def test_the_figures_of_a_run_that_went_on_in_its_folder(tmp_path: Path) -> None:
    from lightning_mask.app.report.reading import read_run

    run = folder_of_a_run(tmp_path / "run")
    (run / "metrics.csv").rename(run / "metrics.1.csv")
    (run / "metrics.csv").write_text("step,train/loss,val/loss\n15,0.5,\n16,nan,0.25\n17,inf,\n18,,\n")
    figures = read_run(run)
    assert [step for step, _ in figures.figures["train/loss"]] == list(range(16)), "what was done twice counts once"
    assert figures.figures["train/loss"][-1] == (15, 0.5)
    assert figures.figures["val/loss"] == [(16, 0.25)]
    assert figures.gaps == {"train/loss": 2}
    assert "not finite are left out: 2 of train/loss" in Reader(write_report(run)).words


def test_what_is_no_run_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    run = folder_of_a_run(tmp_path / "run")
    damaged = {
        "json": "{",
        "list": "[1]",
        "words": '{"mask": {"active": "many"}}',
        "rows": '{"mask": {"tensors": [{}]}}',
    }
    for name, content in damaged.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text(content)
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv/metrics.csv").write_text("a,b\n1,2\n")
    for name, message in (
        ("nowhere", "nowhere is no folder"),
        ("empty", "empty is no folder of a run"),
        *((name, f"{name}.summary.json is damaged") for name in damaged),
        ("csv", "metrics.csv is damaged"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            write_report(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / name / "report.html").exists()
        with pytest.raises(ValueError, match=message):
            write_report(run, previous=tmp_path / name)
    with pytest.raises(ValueError, match="is the run itself"):
        write_report(run, previous=tmp_path / "empty/../run")
    assert not (run / "report.html").exists()


def test_whatever_is_wrong_in_a_file_the_page_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    run = folder_of_a_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"tags": ["a"], "overrides": ["seed=1"], "seconds": {"all": 3.0}}
    summary["mask"] |= {"sparsity": 0.5, "phase_active": [{"phase": 0, "active": {"net.head.bias": 3}}]}
    phases = [{"name": "masked", "lr_scale": {"head": 2.0}}, {"name": "lifted"}]
    refused: list[tuple[str, str]] = []
    for name, content, write in (("summary.json", summary, json.dumps), ("phases.yaml", phases, yaml.safe_dump)):
        for place, key in places(content):
            value = place[key]
            for wrong in (None, "word", [None], 10**400):
                place[key] = wrong
                (run / name).write_text(write(content))
                try:
                    write_report(run)
                except ValueError as error:
                    refused.append((name, str(error)))
            place[key] = value
        (run / name).write_text(write(content))
        write_report(run)
    assert len(refused) > 100
    assert [line for name, line in refused if f"{run / name} is damaged" not in line or "\n" in line] == []
    for name, content in (("metrics.csv", "step,a\ninf,3\n"), (".hydra/config.yaml", "&x {a: *x}")):
        before = (run / name).read_text()
        (run / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            write_report(run)
        (run / name).write_text(before)


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every mapping and list in plain values, with each of its keys; of a list, the first."""
    keys = list(node) if isinstance(node, dict) else [0] if isinstance(node, list) and node else []
    return [place for key in keys for place in ((node, key), *places(node[key]))]


def test_a_tensor_that_no_update_touches_has_a_line_of_its_own(tmp_path: Path) -> None:
    """As those that ERK leaves dense."""
    run = folder_of_a_run(tmp_path / "run")
    rows = [
        f"{step},{name},{share}"
        for step in (0, 5)
        for name, share in (("", step / 20), ("dense", 0), ("rises", step / 10))
    ]
    (run / "sparsity.csv").write_text("\n".join(["step,tensor,sparsity", *rows]))
    assert (
        "from the first step on the left to the last one on the right. dense 0 % rises 50 %"
        in Reader(write_report(run)).words
    )


def test_a_page_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    run = folder_of_a_run(tmp_path / "run")
    (run / "report.html").mkdir()
    with pytest.warns(UserWarning, match=r"report\.html was not written"):
        try_report(run)
    assert not [file for file in run.iterdir() if file.name.endswith(".tmp")]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
def test_a_browser_shows_the_page_at_the_width_of_a_desk_and_of_a_phone(tmp_path: Path) -> None:
    """Wide content scrolls in a frame of its own; the page is never wider than the window, and nothing is complained of."""
    run = folder_of_a_run(tmp_path / "run", started=2e9, words="w" * 300)
    summary = json.loads((run / "summary.json").read_text())
    summary["overrides"] = ["mask.train=" + "x" * 200]
    summary["mask"]["phases"][0]["name"] = "a phase of a long name " * 8
    summary["mask"]["tensors"] += [
        {
            "name": f"net.deep.{i}.{'attention' * 9}.weight",
            "shape": [4, 4],
            "active": i % 17,
            "density": 0.1,
            "held_by": "dense",
        }
        for i in range(48)
    ]
    names = [f"the class number {i}" for i in range(24)]
    summary["confusion_matrix"] = {"classes": names, "rows_true": [[i * j for j in range(24)] for i in range(24)]}
    (run / "summary.json").write_text(json.dumps(summary))
    rows = [f"{step},{name},{step / 20}" for step in range(20) for name in ("", *TENSORS)]
    (run / "sparsity.csv").write_text("\n".join(["step,tensor,sparsity", *rows]))
    page_file = write_report(run, previous=folder_of_a_run(tmp_path / "before"))
    with browser(tmp_path / "profile") as page:
        for width in (1280, 390):
            page.open(page_file, width)
            assert page.value("document.title") == "digits · run"
            assert page.value("innerWidth") == width
            assert page.value("document.documentElement.scrollWidth") <= width
            seen = "[...document.querySelectorAll('section')].every(s => s.getBoundingClientRect().height > 60)"
            assert page.value(seen)
            assert page.value("document.querySelectorAll('.plot path.curve').length") >= 2
            hidden = (
                "[...document.querySelectorAll('h1,h2,.tile b')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
            )
            assert page.value(hidden) == 0
            assert page.complaints() == []
        cut = "e => e.querySelector('.names') && e.scrollWidth > e.clientWidth + 1"
        assert page.value(f"[...document.querySelectorAll('.wide')].filter({cut}).length") == 0
        light = page.value("getComputedStyle(document.body).backgroundColor")
        page.open(page_file, 390, dark=True)
        assert page.value("getComputedStyle(document.body).backgroundColor") != light
