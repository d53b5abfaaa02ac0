"""`lightning-mask mask`: what it shows and combines, and what it refuses."""

from pathlib import Path

import torch

from lightning_mask import MaskSet
from tests.app.commands import Run, bad, bits, files, refused, run, told

__all__ = ["bad", "files", "run"]  # fixtures


def test_show_says_what_is_active(run: Run, files: list[Path]) -> None:
    masks = MaskSet.load(files[0])
    facts = told(run, "mask", "show", files[0])
    assert {k: facts[k] for k in ("hash", "entries", "active", "density", "recipe")} == {
        "hash": masks.hash(), "entries": 81, "active": masks.count(), "density": masks.density(), "recipe": masks.recipe,
    }  # fmt: skip
    assert {row["name"]: row["active"] for row in facts["tensors"]} == {n: int(m.sum()) for n, m in masks.items()}
    assert facts["tensors"][0]["shape"] == [6, 5]
    code, out, _ = run("mask", "show", files[0])
    both = int(masks["net.layer.0.weight"].sum() + masks["net.layer.1.weight"].sum())
    (line,) = [line for line in out.splitlines() if "net.layer.*.weight" in line]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == [
        "net.layer.*.weight", "2", "60", str(both), f"{both / 60:.2%}",
    ]  # fmt: skip
    assert code == 0
    assert masks.hash() in out
    assert "net.layer.1.weight" in run("mask", "show", files[0], "--all")[1]


def test_masks_are_combined_entry_by_entry(run: Run, files: list[Path], tmp_path: Path) -> None:
    a, b, c = (bits(seed) for seed in range(3))
    wanted = {
        ("and", *files): {n: a[n] & b[n] & c[n] for n in a},
        ("or", *files): {n: a[n] | b[n] | c[n] for n in a},
        ("not", files[0]): {n: ~a[n] for n in a},
    }
    for words, masks in wanted.items():
        out = tmp_path / "new" / f"{words[0]}.safetensors"
        facts = told(run, "mask", *words, "-o", out)
        made = MaskSet.load(out)
        assert made == MaskSet(masks)
        assert facts == {
            "out": str(out),
            "hash": made.hash(),
            "entries": 81,
            "active": made.count(),
            "density": made.density(),
        }
    assert MaskSet.load(tmp_path / "new/and.safetensors").recipe["and"][1] == {"score": "fisher", "seed": 1}
    before = (tmp_path / "new/and.safetensors").read_bytes()
    assert "--overwrite" in refused(run, "mask", "not", files[1], "-o", tmp_path / "new/and.safetensors")
    assert (tmp_path / "new/and.safetensors").read_bytes() == before
    assert run("mask", "not", files[1], "-o", tmp_path / "new/and.safetensors", "--overwrite")[0] == 0
    assert MaskSet.load(tmp_path / "new/and.safetensors") == MaskSet({n: ~b[n] for n in b})


def test_overlap_is_jaccard_without_what_is_whole_in_both(run: Run, files: list[Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.safetensors"
    MaskSet({n: torch.zeros_like(m) for n, m in bits(0).items()}).save(nothing)
    facts = told(run, "mask", "overlap", *files, nothing)
    assert facts["files"] == [str(file) for file in [*files, nothing]]
    flat = [torch.cat([m.reshape(-1) for n, m in bits(seed).items() if n != "net.head.weight"]) for seed in range(3)]
    for i, a in enumerate(flat):
        for j, b in enumerate(flat):
            assert facts["jaccard"][i][j] == int((a & b).sum()) / int((a | b).sum())
    assert facts["jaccard"][3] == [0.0, 0.0, 0.0, None]
    code, out, _ = run("mask", "overlap", *files)
    assert code == 0
    assert f"{facts['jaccard'][0][1]:.3f}" in out


def test_bad_masks_are_refused_in_one_line_and_nothing_is_touched(
    run: Run, files: list[Path], bad: dict[str, Path], tmp_path: Path
) -> None:
    target = tmp_path / "target.safetensors"
    target.write_bytes(b"precious")
    before = sorted(tmp_path.iterdir())
    for file in bad.values():
        to = ("-o", target, "--overwrite")
        for words in (["show", file], ["not", file, *to], ["and", files[0], file, *to], ["overlap", file, files[0]]):
            assert str(file) in refused(run, "mask", *words)
    other = tmp_path / "other.safetensors"
    MaskSet({"elsewhere": torch.ones(2, dtype=torch.bool)}).save(other)
    assert "elsewhere" in refused(run, "mask", "or", files[0], other, "-o", target, "--overwrite")
    assert target.read_bytes() == b"precious"
    assert sorted(tmp_path.iterdir()) == sorted([*before, other])
