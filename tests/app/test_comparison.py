"""From results to tables and pictures: the numbers against hand computations, and what is refused or not said."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mask.app.comparison import (
    Row,
    block_and_kind,
    holm,
    jaccard,
    judged,
    markdown_table,
    overlap,
    paired,
    rank,
    report,
    summarise,
    where,
)
from lightning_mask.app.comparison.tables import as_markdown
from lightning_mask.core.maskset import MaskSet


def result(strategy: str, seed: int, score: float | None, density: float | None = None, **more: Any) -> dict[str, Any]:
    known = {"task": "tweets", "metric": "accuracy", "lr": 1e-3, "val_score": 0.5, "active": 50, "total": 1000}
    known |= {"seconds": 20.0, "optimizer_bytes": 400, "masks": None, "folder": "runs/0"}
    return {**known, "strategy": strategy, "seed": seed, "score": score, "density": density, **more}


def runs(strategy: str, scores: Mapping[int, float | None], density: float | None = None, **more: Any) -> list[Any]:
    return [result(strategy, seed, score, density, **more) for seed, score in scores.items()]


def row(rows: list[Row], strategy: str, density: float | None = None) -> Row:
    (found,) = [r for r in rows if r.strategy == strategy and r.density == density]
    return found


DENSE = {0: 0.80, 1: 0.82, 2: 0.84}


def test_mean_and_standard_error_are_those_of_the_hand() -> None:
    found = row(summarise(runs("dense", {0: 0.80, 1: 0.83, 2: 0.83, 3: 0.86})), "dense")
    assert found.mean == pytest.approx(0.83)
    # squares 0.0009 + 0 + 0 + 0.0009 over n - 1 = 3, its root over the root of 4
    assert found.standard_error == pytest.approx(math.sqrt(0.0018 / 3) / 2)


def test_the_interval_is_that_of_the_paired_t() -> None:
    # differences 0.01, 0.02, 0.06: mean 0.03, s = sqrt((4 + 1 + 9) / 2) / 100; t(0.975, 2) = 4.302653 (any table)
    d = paired({0: 0.51, 1: 0.62, 2: 0.76}, {0: 0.5, 1: 0.6, 2: 0.7})
    half = 4.302652729911275 * math.sqrt(7) / 100 / math.sqrt(3)
    assert (d.pairs, d.mean) == (3, pytest.approx(0.03))
    assert (d.low, d.high) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))
    # with two degrees of freedom p = 1 - t / sqrt(t^2 + 2)
    t = 0.03 / (math.sqrt(7) / 100 / math.sqrt(3))
    assert d.p == pytest.approx(1 - t / math.sqrt(t * t + 2))


def test_pairs_are_of_the_seeds_that_both_have() -> None:
    rows = summarise(
        [*runs("dense", {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1}), *runs("fisher", {1: 0.7, 2: 0.9, 4: 0.99}, 0.1)]
    )
    d = row(rows, "fisher", 0.1).differences["dense"]
    assert (d.pairs, d.mean, d.verdict) == (2, pytest.approx(0.15), "too few seeds")
    assert not math.isnan(d.low)
    assert "(2 pairs)" in markdown(rows_of(rows, "fisher"))


def rows_of(rows: list[Row], strategy: str) -> list[Row]:
    return [r for r in rows if r.strategy == strategy]


def markdown(rows: list[Row]) -> str:
    return as_markdown(rows, ("dense", "head", "random"), ())


def test_holm_steps_down() -> None:
    # sorted 0.01, 0.02, 0.03, 0.04: 4 * 0.01, 3 * 0.02, 2 * 0.03, then never less than the one before
    assert holm([0.03, 0.01, math.nan, 0.04, 0.02])[:2] == pytest.approx([0.06, 0.04])
    assert holm([0.03, 0.01, math.nan, 0.04, 0.02])[3:] == pytest.approx([0.06, 0.06])
    assert math.isnan(holm([0.03, 0.01, math.nan])[2])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_verdict_allows_for_the_number_of_comparisons() -> None:
    theirs = dict.fromkeys(range(3), 0.5)
    clear = paired({0: 0.60, 1: 0.61, 2: 0.62}, theirs)  # p = 0.0027
    alone = paired({0: 0.51, 1: 0.514, 2: 0.518}, theirs)  # p = 0.026
    worse = paired({0: 0.40, 1: 0.401, 2: 0.402}, theirs)
    assert [d.verdict for d in judged([clear])] == ["better"]
    assert [d.verdict for d in judged([alone])] == ["better"]
    assert alone.low > 0
    assert [d.verdict for d in judged([clear, alone, worse])] == ["better", "better", "worse"]
    crowd = [paired({0: 0.5, 1: 0.6, 2: 0.4 + i / 100}, theirs) for i in range(5)]
    assert [d.verdict for d in judged([alone, *crowd])] == ["no difference seen"] * 6


def test_too_few_seeds_and_no_spread_give_no_verdict() -> None:
    assert paired({0: 0.9, 1: 0.91}, {0: 0.1, 1: 0.1}).verdict == "too few seeds"
    assert paired({0: 0.9}, {1: 0.1}).verdict == "too few seeds"
    # 0.001 three times over: a grain of the metric, which t would be infinitely sure of
    assert paired({0: 0.801, 1: 0.821, 2: 0.841}, DENSE).verdict == "no spread"
    assert paired(DENSE, DENSE).verdict == "no difference seen"


def test_each_baseline_is_met_at_its_own_density() -> None:
    results = [*runs("dense", DENSE, 1.0), *runs("head", {0: 0.5, 1: 0.53, 2: 0.51}), *runs("fisher", DENSE, 0.01)]
    results += [*runs("random", {0: 0.7, 1: 0.74, 2: 0.7}, 0.01), *runs("random", {0: 0.1, 1: 0.2, 2: 0.1}, 0.05)]
    results += runs("bitfit", {0: 0.61, 1: 0.6, 2: 0.6})
    rows = summarise(results)
    assert row(rows, "fisher", 0.01).differences["random"].mean == pytest.approx(0.82 - 0.71333333)
    assert row(rows, "fisher", 0.01).differences["dense"].mean == 0
    assert row(rows, "bitfit").differences.keys() == {"dense", "head"}  # random at which density?
    assert row(rows, "random", 0.05).differences.keys() == {"dense", "head"}
    assert [r.strategy for r in rows] == ["dense", "head", "random", "random", "bitfit", "fisher"]
    shuffled = summarise(results[::-1])
    assert shuffled == rows


def test_a_ranking_has_groups_without_order_inside() -> None:
    near = [0.803, 0.818, 0.843, 0.861]
    results = runs("zeta", dict(enumerate([0.80, 0.82, 0.84, 0.86])), 0.01) + runs("alpha", dict(enumerate(near)), 0.01)
    low = {0: 0.5, 1: 0.5211, 2: 0.54, 3: 0.5611}
    results += runs("low", low, 0.01) + runs("short", {0: 0.9, 1: 0.95}, 0.01)
    results += runs("lost", {0: 0.9, 1: None, 2: 0.9}, 0.01) + runs("other", low, 0.05)
    first, second = rank(summarise(results))
    assert (first.density, first.groups) == (0.01, [["alpha", "zeta"], ["low"]])
    assert first.unranked == {"too few seeds": ["short"], "not finite": ["lost"]}
    assert (second.density, second.groups) == (0.05, [["other"]])
    text = markdown(summarise(results))
    assert "- 1 %: no difference seen among: alpha, zeta; then low; not finite: lost; too few seeds: short." in text


def test_a_ranking_is_by_the_seeds_that_each_pair_has() -> None:
    far = runs("far", {0: 0.70, 1: 0.711, 2: 0.722}, 0.01)
    lucky = {0: 0.80, 1: 0.81, 2: 0.82, 3: 0.40, 4: 0.41}  # its mean is below that of far
    (found,) = rank(summarise([*runs("lucky", lucky, 0.01), *far]))
    assert found.groups == [["lucky"], ["far"]]
    apart = runs("elsewhere", {2: 0.80, 3: 0.81, 4: 0.82, 5: 0.83}, 0.01)
    (found,) = rank(summarise([*apart, *far, *runs("near", {0: 0.5, 1: 0.512, 2: 0.521}, 0.01)]))
    assert (found.groups, found.unranked) == ([["far"], ["near"]], {"other seeds": ["elsewhere"]})
    # One with few seeds takes none from the others: ten pairs separate good from dense, and the first three would not.
    noise = [0.0, 0.03, 0.04, -0.02, 0.01, -0.03, 0.02, -0.01, 0.0, 0.01]
    dense, good = ({i: m + s * e for i, e in enumerate(noise)} for m, s in ((0.70, 1.0), (0.76, -1.0)))
    three = {seed: dense[seed] - 0.01 * (1 + seed % 2) for seed in (0, 1, 2)}
    (found,) = rank(summarise([*runs("dense", dense), *runs("good", good, 0.01), *runs("late", three, 0.01)]))
    assert found.groups[0][0] == "good"
    assert "dense" not in found.groups[0]
    noisy = {0: 0.80, 1: 0.74, 2: 0.83}  # ahead, and separated from neither of two that are separated
    rows = summarise([*runs("dense", dense), *runs("good", good, 0.01), *runs("late", noisy, 0.01)])
    (found,) = rank(rows)
    assert (found.groups, found.best) == ([["dense", "good", "late"]], ["late"])
    assert "- 1 %: late, and no difference seen from it: dense, good." in markdown(rows)
    same = {seed: score + 0.25 for seed, score in DENSE.items()}
    (found,) = rank(summarise([*runs("same", same, 0.01), *runs("dense", DENSE, 0.01)]))
    assert (found.groups, found.unranked) == ([["same"]], {"no spread against same": ["dense"]})


def test_a_strategy_at_all_of_the_entries_and_at_fewer_has_one_place_in_each_ranking() -> None:
    lower, lowest = ({seed: score - gap * (1 + seed / 100) for seed, score in DENSE.items()} for gap in (0.1, 0.2))
    few = [*runs("dense", DENSE), *runs("a", lower, 0.1), *runs("b", lowest, 0.1)]
    (alone,) = rank(summarise(few))
    ten, whole = rank(summarise([*few, *runs("a", DENSE, 1.0)]))
    assert alone == ten
    assert ten.groups == [["dense"], ["a"], ["b"]]
    assert (whole.density, whole.groups) == (1.0, [["a", "dense"]])


def test_a_lower_score_is_better_where_the_task_says_so() -> None:
    results = runs("dense", DENSE, mode="min") + runs("low", {0: 0.5, 1: 0.521, 2: 0.541}, 0.01, mode="min")
    rows = summarise(results)
    assert row(rows, "low", 0.01).differences["dense"].verdict == "better"
    assert row(rows, "low", 0.01).differences["dense"].mean < 0
    (found,) = rank(rows)
    assert found.groups == [["low"], ["dense"]]
    with pytest.raises(ValueError, match=r"accuracy \(min\) and accuracy \(max\), cannot be compared"):
        summarise([*results, *runs("other", DENSE)])


def test_what_failed_and_a_rate_at_the_end_are_said(tmp_path: Path) -> None:
    results = [*runs("dense", DENSE), *runs("fisher", {0: 0.8, 1: 0.81}, 0.1, lr_at_end=True)]
    results += [result("fisher", 2, None, 0.1, error="OSError: gone"), result("snip", 0, None, 0.1, error="no memory")]
    results[-1]["seed"] = None
    text = report(results, tmp_path).read_text()
    assert "| fisher | 10 % | 2 | 0.8050 ± 0.0050 | 50 | 0.001, at the end |" in text
    assert "\n- fisher at 10 %, seed 2: OSError: gone\n- snip at 10 %: no memory\n" in text
    assert 'A rate with "at the end"' in text
    assert "at the end" not in report(runs("dense", DENSE), tmp_path).read_text()
    assert markdown_table(results).count("\n| fisher |") == 1
    results.append(result("dense", 0, None, task="reviews", error="no data"))
    text = report(results, tmp_path).read_text()
    assert "## reviews\n\nFailed, and so in no mean:\n\n- dense, seed 0: no data\n" in text
    with pytest.raises(ValueError, match="no result"):
        report(results[-2:], tmp_path)


def test_a_score_that_is_not_finite_is_shown_and_takes_part_in_nothing() -> None:
    rows = summarise([*runs("dense", DENSE), *runs("fisher", {0: 0.8, 1: math.nan, 2: math.inf}, 0.1)])
    found = row(rows, "fisher", 0.1)
    assert math.isnan(found.mean)
    assert found.differences["dense"].verdict == "not finite"
    (line,) = [text for text in markdown(rows).splitlines() if text.startswith("| fisher")]
    assert "| 3 (2 not finite) | not finite |" in line


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ([], "no result"),
        (
            [result("dense", 0, 0.5), result("dense", 0, 0.6, lr=1e-2)],
            r"two results of dense with seed 0 \(lr 0.001 and",
        ),
        (
            [result("dense", 0, 0.5), result("head", 0, 0.6, metric="f1")],
            r"different metrics, accuracy \(max\) and f1 \(max\)",
        ),
        ([{"task": "tweets", "seed": 0}], "lacks strategy, density"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(results: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        summarise(results)


def bits(masks: Mapping[str, list[int]]) -> Any:
    return MaskSet({name: torch.tensor(mask).bool() for name, mask in masks.items()}).to_state()["masks"]


def test_jaccard_leaves_out_what_both_train_whole() -> None:
    a = bits(
        {"w": [1, 1, 0, 0, 1, 0, 0, 0, 1, 0], "whole": [1, 1, 1], "half": [1, 1, 1], "none": [0, 0], "lone": [0, 0]}
    )
    b = bits(
        {"w": [1, 0, 1, 0, 1, 0, 0, 0, 0, 0], "whole": [1, 1, 1], "half": [1, 0, 0], "none": [0, 0], "lone": [1, 0]}
    )
    # w: 2 of 5; half: 1 of 3; lone: 0 of 1
    assert jaccard(a, b) == jaccard(b, a) == pytest.approx(3 / 9)
    assert jaccard(a, a) == 1.0
    assert math.isnan(jaccard(bits({"w": [0, 0]}), bits({"w": [0, 0]})))
    with pytest.raises(ValueError, match="different models: whole"):
        jaccard(bits({"w": [0, 0]}), bits({"w": [0, 0], "whole": [1]}))


def masked(folder: Path, name: str, masks: Mapping[str, Any]) -> str:
    path = folder / f"{name}.safetensors"
    MaskSet({key: torch.as_tensor(mask).bool() for key, mask in masks.items()}).save(path)
    return str(path)


def test_overlaps_are_of_the_same_density_and_seed(tmp_path: Path) -> None:
    masks = {"a0": [1, 1, 0, 0], "b0": [1, 0, 1, 0], "a1": [1, 1, 0, 0], "b1": [1, 1, 0, 0], "c1": [0, 0, 1, 1]}
    files = {name: masked(tmp_path, name, {"w": mask}) for name, mask in masks.items()}
    results = [result(name[0], int(name[1]), 0.5, 0.5, masks=path) for name, path in files.items()]
    results += [result("a", 0, 0.5, 0.1, masks=files["a0"]), result("head", 0, 0.5, masks=files["a0"])]
    (found,) = overlap(summarise(results))
    assert list(found.strategies) == ["a", "b", "c"]
    assert found.values[0].tolist() == pytest.approx([1, (1 / 3 + 1) / 2, 0])
    assert found.seeds.tolist() == [[2, 2, 1], [2, 2, 1], [1, 1, 1]]


def test_blocks_and_types_are_read_from_names() -> None:
    bert = {"net.embeddings.word.weight": (9, 4), "net.encoder.layer.0.attention.query.weight": (4, 4)}
    bert |= {"net.encoder.layer.0.norm.weight": (4,), "net.encoder.layer.10.attention.query.weight": (4, 4)}
    bert |= {"net.encoder.layer.10.attention.query.bias": (4,), "head.0.weight": (4, 4), "classifier.weight": (2, 4)}
    assert list(block_and_kind(bert).values()) == [
        ("before", "embeddings.word"),
        ("0", "attention.query"),
        ("0", "norms"),
        ("1", "attention.query"),
        ("1", "biases"),
        ("after", "head.0"),
        ("after", "classifier"),
    ]
    resnet = {f"layer{i}.{j}.conv1.weight": (2, 2, 3, 3) for i in (1, 2) for j in (0, 1)}
    assert list(block_and_kind(resnet).values()) == [(str(i), "conv1") for i in range(4)]
    plain = {"first.weight": (3, 3), "second.weight": (3, 3)}
    assert list(block_and_kind(plain).values()) == [("before", "first"), ("before", "second")]


def test_shares_are_of_the_entries_that_train(tmp_path: Path) -> None:
    one = {"in.weight": [[1, 0]], "layer.0.fc.weight": [[1, 1]], "layer.1.fc.weight": [[1, 0]], "out.weight": [[0, 0]]}
    two = {"in.weight": [[0, 0]], "layer.0.fc.weight": [[1, 0]], "layer.1.fc.weight": [[0, 0]], "out.weight": [[1, 0]]}
    files = [masked(tmp_path, "one", one), masked(tmp_path, "two", two)]
    results = [result("fisher", seed, 0.5, 0.1, masks=path) for seed, path in enumerate(files)]
    (found,) = where(summarise(results))
    assert list(found.blocks) == ["before", "0", "1", "after"]
    assert list(found.kinds) == ["in", "fc", "out"]
    assert found.rows["all entries"] == ([0.25] * 4, [0.25, 0.5, 0.25])
    assert found.rows["fisher"][0] == pytest.approx([1 / 8, (1 / 2 + 1 / 2) / 2, 1 / 8, 1 / 4])
    assert found.rows["fisher"][1] == pytest.approx([1 / 8, (3 / 4 + 1 / 2) / 2, 1 / 4])


def test_a_report_is_a_folder_of_whole_files(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    results = [*runs("dense", DENSE, active=1000), *runs("head", {0: 0.1, 1: 0.11, 2: 0.13}, active=2)]
    for place, strategy in enumerate(("random", "fisher", "snip")):
        for seed, score in DENSE.items():
            masks = {f"layer.{i}.weight": torch.rand(5, 5, generator=generator) < 0.2 for i in range(3)}
            path = masked(tmp_path, f"{strategy}{seed}", masks)
            results.append(result(strategy, seed, score + 0.01 * place * seed, 0.05, masks=path))
    lone = [result("fisher", 0, 0.3, 200, task="reviews", active=None, total=None, lr=None)]
    folder = tmp_path / "deep" / "report"
    table = report(results + lone, folder)
    wanted = {"table.md", "table.csv", "quality.png", "where.png", "overlap.png", "overlap.csv"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert table == folder / "table.md"
    for picture in folder.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert f"({picture.name})" in table.read_text()
    with (folder / "table.csv").open() as file:
        lines = {(line["task"], line["strategy"]): line for line in csv.DictReader(file)}
    assert float(lines["tweets", "fisher"]["mean"]) == pytest.approx(0.83)
    assert float(lines["tweets", "fisher"]["dense_difference"]) == pytest.approx(0.01)
    assert lines["tweets", "fisher"]["active"] == "50"
    assert (lines["reviews", "fisher"]["density"], lines["reviews", "fisher"]["dense_verdict"]) == ("200", "")
    assert "No results of: dense, head, random." in table.read_text()
    with (folder / "overlap.csv").open() as file:
        assert [line["other"] for line in csv.DictReader(file)] == ["fisher", "snip", "snip"]

    report(lone, folder)  # what it has nothing for is not left from the report before
    assert {path.name for path in folder.iterdir()} == {"table.md", "table.csv", "quality.png"}


def test_the_picture_shows_a_score_at_its_density(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from lightning_mask.app.comparison import pictures

    drawn: list[Figure] = []
    monkeypatch.setattr(pictures, "_save", lambda figure, _: drawn.append(figure))
    whole = {"active": 1000, "total": 1000}  # a peer whose masked tensors train whole
    results = (
        runs("dense", DENSE, **whole) + runs("peer", DENSE, 0.1, **whole) + runs("counted", DENSE, 200, active=200)
    )
    pictures.quality(summarise([*results, *runs("bias", DENSE, active=20)]), ["dense"], tmp_path / "quality.png")
    places = [float(container[0].get_xdata()[0]) for container in drawn[0].axes[0].containers]
    # bias, counted, peer: spread a little where a density was chosen
    assert places == pytest.approx([2, 20, 10], rel=0.13)


def test_a_file_that_cannot_be_finished_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    report(runs("dense", DENSE), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}

    def half(figure: Figure, path: Path, **named: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="full"):
        report(runs("dense", {0: 0.1, 1: 0.2, 2: 0.3}), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"table.md", "table.csv", "quality.png"}


def test_the_short_table_marks_what_the_seeds_show() -> None:
    results = runs("dense", DENSE, active=1000) + runs("fisher", {0: 0.7, 1: 0.721, 2: 0.741}, 0.01)
    text = markdown_table(results + runs("fisher", {0: 0.8, 1: 0.83, 2: 0.83}, 0.05))
    head, _, dense, fisher, *_ = text.splitlines()
    assert head == "| tweets: accuracy | its own size | 1 % | 5 % |"
    assert dense == "| dense | 0.8200 ± 0.0115 (100 %) |  |  |"
    assert fisher == "| fisher |  | 0.7207 ± 0.0118 ▼ | 0.8200 ± 0.0100 |"
    assert markdown_table(results, task="tweets").startswith("| accuracy |")
    with pytest.raises(ValueError, match="no result"):
        markdown_table(results, task="reviews")


def test_a_missing_library_is_told_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"matplotlib is missing: pip install 'lightning-mask\[compare\]'"):
        report(runs("dense", DENSE), tmp_path / "report")
    assert not (tmp_path / "report").exists()
