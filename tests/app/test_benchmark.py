"""scripts/benchmark.py in a process of its own: that it measures, prints and writes; never how fast anything is."""

import json
import sys
from pathlib import Path

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
