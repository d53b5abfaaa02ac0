"""scripts/benchmark.py in a process of its own: that it measures, prints and writes; never how fast anything is."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))  # as for a script that lies there

from benchmark import pair, scaling

from tests.app.conftest import REPO, command

WAYS = {"PhaseUnfreeze (ours)", "BackboneFinetuning"}


def test_a_section_is_printed_and_written(tmp_path: Path) -> None:
    script = str(REPO / "scripts/benchmark.py")
    words = ["phases", "--rounds", "1", "--steps", "2", "--output", "out.json"]
    done = command(sys.executable, script, *words, cwd=tmp_path, OMP_WAIT_POLICY="passive")  # others run beside it
    assert done.returncode == 0, done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"], "one file, under its final name"
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results) == {"torch", "machine", "phases", "mask changes", "goals", "seconds"}
    phases, changes, goals = results["phases"], results["mask changes"], results["goals"]
    keys = {"way", "last layer + head ms", "everything ms", "optimizer MB", "gradient MB"}
    assert all(set(row) == keys for row in phases)
    assert {row["way"] for row in phases} - {"finetuning-scheduler"} == WAYS
    assert len({(row["optimizer MB"], row["gradient MB"]) for row in phases}) == 1, "all ended by training the same"
    assert len(changes) == 3
    assert all(set(row) == {"change", "ms", "steps"} for row in changes)
    assert [set(row) for row in goals] == [{"what", "goal at most", "measured", "met"}]
    assert set(results["seconds"]) == {"phases"}
    for word in ("PhaseUnfreeze (ours)", "everything ms", "PruneMask goes a step up its ramp", "Goals"):
        assert word in done.stdout


def test_a_profile_says_what_each_way_spends_time_on(tmp_path: Path) -> None:
    script = str(REPO / "scripts/benchmark.py")
    words = ["profile", "--rounds", "1", "--steps", "2", "--output", "out.json"]
    done = command(sys.executable, script, *words, cwd=tmp_path, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stdout
    rows = {row["way"]: row for row in json.loads((tmp_path / "out.json").read_text())["profile"]}
    floor = next(way for way in rows if way.startswith("floor"))
    for row in rows.values():
        assert min(row["forward"], row["backward"], row["optimizer"], row["zero_grad"]) > 0, row
        assert row["step ms"] > row["forward"] + row["backward"]
    masked = {way for way, row in rows.items() if row["mask"] > 0}
    restored = {way for way, row in rows.items() if row["restore"] > 0}
    assert masked == restored == {way for way in rows if "ours" in way or "restore" in way}
    assert {way for way, row in rows.items() if row["callbacks"] > 0} == {way for way in rows if "ours" in way}
    assert floor not in masked
    assert "Where the time of a step goes" in done.stdout


def test_a_projection_is_the_ring_worked_out_by_hand() -> None:
    rows = {(row["GPUs"], row["network"]): row for row in scaling.projection(90e6, 0.9e6, compute_ms=50.0)}
    eight = rows[8, "10 Gbit/s"]
    # 4 all-reduces (25 MiB each) of 14 hops of 10 us; and 14/8 of 90 MB = 157.5 MB at 1.25 MB a millisecond
    assert eight["dense: wire ms"] == pytest.approx(0.56 + 126.0)
    assert eight["ours: wire ms"] == pytest.approx(0.56 + 1.26)
    assert eight["dense: step ms"] == pytest.approx(176.56)
    assert eight["times faster"] == pytest.approx(176.56 / 51.82)
    many = rows[1024, "400 Gbit/s"]
    assert many["dense: wire ms"] == pytest.approx(4 * 2046 * 0.01 + 2 * 1023 / 1024 * 90e6 / 5e7)
    assert {gpus for gpus, _ in rows} == set(scaling.GPUS)
    assert (min(scaling.GPUS), max(scaling.GPUS)) == (8, 1024)


def test_it_is_said_why_there_are_no_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert pair.why_no_hosts() == "there is no ip (package iproute2)"


def test_a_projection_needs_a_time_of_computing(tmp_path: Path) -> None:
    done = command(sys.executable, str(REPO / "scripts/benchmark.py"), "scaling", "--compute-ms", "0", cwd=tmp_path)
    assert done.returncode == 2
    assert "--compute-ms must be above 0, and is 0" in done.stdout
