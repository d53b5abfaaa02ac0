"""`lightning-mask delta`: what it writes, compares and merges, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_mask import MaskSet
from lightning_mask.delta import inspect, save_delta
from tests.app.commands import Run, bad, bits, files, refused, run, told

__all__ = ["bad", "files", "run"]  # fixtures


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """A base and two tuned models as ``save_pretrained`` leaves them, the deltas of both, and the base as one file."""
    base = {"body.weight": torch.arange(40.0).view(8, 5), "body.bias": torch.ones(8), "head.weight": torch.zeros(2, 8)}
    a, b = ({name: tensor.clone() for name, tensor in base.items()} for _ in range(2))
    a["body.weight"][0, :2] = torch.tensor([0.5, -1e-30])
    a["head.weight"] += 1
    b["body.weight"][7, 4] = 9.0
    made = {name: tmp_path / name for name in ("base", "a", "b")}
    for (name, folder), tensors in zip(tuple(made.items()), (base, a, b), strict=True):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model": "little"}))
        made[f"{name}.safetensors"] = tmp_path / f"{name}.safetensors"
        shutil.copy(folder / "model.safetensors", made[f"{name}.safetensors"])
        if name != "base":
            made[f"delta_{name}"] = tmp_path / f"delta_{name}.safetensors"
            save_delta(made[f"delta_{name}"], made["base"], folder, originals=name == "a")
    return made


def same(a: Path, b: Path) -> bool:
    """Whether two checkpoints have the same bits, read without the code under test."""
    one, other = (load_file(path / "model.safetensors" if path.is_dir() else path) for path in (a, b))
    return one.keys() == other.keys() and all(
        torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)) for name, tensor in one.items()
    )


def test_apply_gives_the_tuned_model_and_revert_the_base(run: Run, models: dict[str, Path], tmp_path: Path) -> None:
    untouched = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    delta = models["delta_a"]
    # Without --out: a name of its own in this folder, in the form of what was given.
    assert run("delta", "apply", f"{models['base']}/", delta) == (0, "written: base-tuned\n", "")
    assert same(Path("base-tuned"), models["a"])
    assert json.loads(Path("base-tuned/config.json").read_text()) == {"model": "little"}
    assert told(run, "delta", "apply", models["base.safetensors"], delta)["out"] == "base-tuned.safetensors"
    assert same(Path("base-tuned.safetensors"), models["a"])
    assert run("delta", "revert", "base-tuned", delta) == (0, "written: base-tuned-reverted\n", "")
    assert same(Path("base-tuned-reverted"), models["base"])
    # The other delta has no originals.
    assert "base" in refused(run, "delta", "revert", models["b"], models["delta_b"])
    back = told(run, "delta", "revert", models["b"], models["delta_b"], "--base", models["base"], "-o", "deep/er")
    assert back == {"tuned": str(models["b"]), "delta": str(models["delta_b"]), "out": "deep/er"}
    assert same(Path("deep/er"), models["base"])
    # A second time, it is there already; in place, it has to be said.
    assert "--overwrite" in refused(run, "delta", "apply", models["base"], delta)
    assert "--overwrite" in refused(run, "delta", "apply", models["base"], delta, "-o", models["base"])
    assert {path: path.read_bytes() for path in untouched} == untouched
    assert run("delta", "apply", models["base"], delta, "-o", models["base"], "--overwrite")[0] == 0
    assert same(models["base"], models["a"])


def test_another_base_is_refused_by_its_content(run: Run, models: dict[str, Path]) -> None:
    words = ["delta", "apply", models["b"], models["delta_a"], "-o", "out"]
    assert str(models["b"]) in refused(run, *words)
    assert not Path("out").exists()
    assert run(*words, "--force")[0] == 0
    forced = load_file("out/model.safetensors")["body.weight"]
    assert (forced[0, 0], forced[7, 4]) == (0.5, 9.0)


def test_inspect_and_save_say_what_a_delta_has(run: Run, models: dict[str, Path]) -> None:
    facts = told(run, "delta", "inspect", models["delta_a"])
    assert facts == {"delta": str(models["delta_a"]), **json.loads(json.dumps(inspect(models["delta_a"])))}
    assert (facts["active"], facts["total"]) == (18, 64)
    assert run("delta", "hash", models["base"]) == (0, f"{facts['base']}\n", "")
    assert told(run, "delta", "hash", models["base.safetensors"])["hash"] == facts["base"]
    code, out, _ = run("delta", "inspect", models["delta_a"])
    assert code == 0
    assert facts["base"] in out
    (line,) = [line for line in out.splitlines() if "body.weight" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")][:5] == ["body.weight", "1", "40", "2", "5.00%"]
    words = ["delta", "save", models["base"], models["a"], "-o", "mine.safetensors", "--originals"]
    made = told(run, *words)
    assert (made["out"], made["active"], made["hash"]) == ("mine.safetensors", 18, facts["hash"])
    assert "--overwrite" in refused(run, *words)
    masks = {
        name: torch.zeros(shape, dtype=torch.bool) for name, shape in (("body.weight", (8, 5)), ("body.bias", (8,)))
    }
    MaskSet(masks).save("masks.safetensors")
    said = refused(
        run, "delta", "save", models["base"], models["a"], "-o", "held.safetensors", "--masks", "masks.safetensors"
    )
    assert "body.weight" in said


def test_diff_counts_bits_and_ends_with_0_unless_asked(run: Run, models: dict[str, Path]) -> None:
    facts = told(run, "delta", "diff", models["base"], models["a.safetensors"])
    assert (facts["equal"], facts["entries"], facts["changed"]) == (False, 64, 18)
    assert {row["name"]: row["changed"] for row in facts["tensors"]} == {
        "body.weight": 2, "body.bias": 0, "head.weight": 16,
    }  # fmt: skip
    code, out, _ = run("delta", "diff", models["base"], models["a"])
    assert code == 0
    assert "2 of 3 tensors differ, in 18 of 64 entries" in out
    assert "body.bias" not in out
    assert "body.bias" in run("delta", "diff", models["base"], models["a"], "--all")[1]
    assert run("delta", "diff", models["base"], models["a"], "--exit-code")[0] == 1
    equal = run("delta", "diff", models["base"], models["base.safetensors"], "--exit-code")
    assert equal == (0, "0 of 3 tensors differ, in 0 of 64 entries\n", "")


def test_merge_unites_and_says_what_to_do_about_common_entries(
    run: Run, models: dict[str, Path], tmp_path: Path
) -> None:
    facts = told(
        run, "delta", "merge", models["delta_a"], models["delta_b"], "-o", "both.safetensors", "--base", models["base"]
    )
    assert (facts["out"], facts["active"]) == ("both.safetensors", 19)
    assert run("delta", "apply", models["base"], "both.safetensors", "-o", "both")[0] == 0
    both, a = load_file("both/model.safetensors"), load_file(models["a.safetensors"])
    a["body.weight"][7, 4] = 9.0
    assert all(torch.equal(both[name], tensor) for name, tensor in a.items())
    c = {**load_file(models["base.safetensors"]), "head.weight": torch.full((2, 8), 3.0)}
    save_file(c, tmp_path / "c.safetensors")
    save_delta(tmp_path / "delta_c.safetensors", models["base"], tmp_path / "c.safetensors")
    words = ["delta", "merge", models["delta_a"], "delta_c.safetensors", "-o", "mean.safetensors"]
    assert "head.weight" in refused(run, *words)
    assert not Path("mean.safetensors").exists()
    assert run(*words, "--how", "mean", "--base", models["base"])[0] == 0
    assert run("delta", "apply", models["base"], "mean.safetensors", "-o", "mean")[0] == 0
    assert load_file("mean/model.safetensors")["head.weight"].unique().tolist() == [2.0]


def test_bad_deltas_and_checkpoints_are_refused_and_the_target_is_untouched(
    run: Run, models: dict[str, Path], bad: dict[str, Path], tmp_path: Path
) -> None:
    good = models["delta_a"].read_bytes()
    flipped = bytearray(good)
    flipped[-2] ^= 4
    for name, content in {"cut": good[:-1], "head": good[:20], "flipped": bytes(flipped)}.items():
        bad[name].write_bytes(content)
    bad["masks"] = tmp_path / "a_mask.bad"
    MaskSet(bits(0)).save(bad["masks"])
    Path("target").mkdir()
    shutil.copy(models["base.safetensors"], "target/model.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    target, base = Path("target"), models["base"]
    for file in bad.values():
        for words in (
            ["inspect", file],
            ["apply", "target", file, "-o", target, "--overwrite"],
            ["revert", models["a"], file, "-o", "new", "--base", base],
            ["merge", models["delta_b"], file, "-o", models["delta_a"], "--overwrite", "--base", base],
        ):
            assert str(file) in refused(run, "delta", *words)
    for name in ("text", "empty", "missing", "folder"):
        for words in (
            ["apply", bad[name], models["delta_a"], "-o", "new"],
            ["diff", base, bad[name]],
            ["save", base, bad[name], "-o", "new"],
        ):
            assert str(bad[name]) in refused(run, "delta", *words)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
