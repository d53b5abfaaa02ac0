"""The console command: what it prints, what it writes, what it refuses, and how it ends."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file

from lightning_mask import MaskSet
from lightning_mask.app import errors, launch
from lightning_mask.app.cli.program import program
from lightning_mask.app.cli.words import completions
from lightning_mask.app.train import config_path
from lightning_mask.delta import inspect, save_delta
from tests.app.conftest import TINY, command

BIN = Path(sys.executable).with_name("lightning-mask")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in a folder of the test's own; give exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(errors.FULL, raising=False)

    def ran(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            program([str(word) for word in words], prog_name="lightning-mask")
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return ran


def told(run: Run, *words: Any) -> Any:
    """What a command that ends well says as JSON."""
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), (words, out, err)
    return json.loads(out)


def refused(run: Run, *words: Any) -> str:
    """The one line that a command says to bad input."""
    code, out, err = run(*words)
    assert (code, out) == (2, ""), (words, out, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def bits(seed: int, density: float = 0.3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"net.layer.0.weight": (6, 5), "net.layer.1.weight": (6, 5), "net.layer.1.bias": (6,)}
    masks = {name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()}
    return {**masks, "net.head.weight": torch.ones(3, 5, dtype=torch.bool)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Three files of masks of one model."""
    paths = [tmp_path / f"{name}.safetensors" for name in "abc"]
    for seed, path in enumerate(paths):
        MaskSet(bits(seed), {"score": "fisher", "seed": seed}).save(path)
    return paths


# Masks.


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


@pytest.fixture
def bad(files: list[Path], tmp_path: Path) -> dict[str, Path]:
    """Files that are none of ours, or none any more."""
    good = files[0].read_bytes()
    flipped = bytearray(good)
    flipped[-1] ^= 0x80
    contents = {"cut": good[:-3], "head": good[:20], "flipped": bytes(flipped), "text": b"hello\n", "empty": b""}
    made = {name: tmp_path / f"{name}.bad" for name in contents}
    for name, content in contents.items():
        made[name].write_bytes(content)
    made["foreign"] = tmp_path / "foreign.bad"
    save_file({"w": torch.zeros(3)}, made["foreign"])
    made["folder"] = tmp_path / "folder.bad"
    made["folder"].mkdir()
    made["missing"] = tmp_path / "missing.bad"
    return made


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


# Deltas.


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


# The command itself.


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with the words that lead there."""
    for name, each in group.commands.items():
        yield (*words, name), each
        if isinstance(each, click.Group):
            yield from commands(each, (*words, name))


def test_help_teaches_at_every_level_and_lists_all_commands(run: Run) -> None:
    there = [(words, each) for words, each in commands(program) if each.add_help_option]
    assert {words for words, _ in commands(program)} >= {
        *((name,) for name in ("train", "compare", "prune", "export", "report")),
        *(("delta", name) for name in ("inspect", "apply", "revert", "diff", "merge")),
        *(("mask", name) for name in ("show", "and", "or", "not", "overlap")),
    }
    for words, each in there:
        code, out, err = run(*words, "--help")
        assert (code, err) == (0, "")
        assert f"  lightning-mask {' '.join(words)}" in out.partition("Example")[2], f"{words}: no example"
        for option in each.params:
            assert not isinstance(option, click.Option) or option.help, f"{words} {option.name}: no help"
    said = run("--help")[1]
    assert all(f"\n  {name} " in said for name in program.commands)


def test_wrong_use_is_told_with_exit_code_2(run: Run, files: list[Path]) -> None:
    for words in (
        ["mask", "and", files[0], "-o", "x"],
        ["mask", "overlap", files[0]],
        ["mask", "not", files[0]],
        ["delta", "merge", files[0], "-o", "x"],
        ["delta", "merge", files[0], files[1], "-o", "x", "--density", "0"],
        ["nonsense"],
        ["mask", "show", files[0], "--jsn"],
    ):
        code, out, err = run(*words)
        assert (code, out) == (2, ""), words
        assert "Usage: lightning-mask" in err
    assert not Path("x").exists()


def test_what_fails_at_work_is_not_bad_input(
    run: Run, files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device", "x"), RuntimeError("did not load equal")):
        with pytest.raises(SystemExit) as end:
            errors.stop(error)
        assert end.value.code == 1
        assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setenv(errors.FULL, "1")
    with pytest.raises(FileNotFoundError):
        program(["mask", "show", "nowhere"])
    monkeypatch.delenv(errors.FULL)
    monkeypatch.setattr(MaskSet, "hash", lambda self: 1 // 0)
    with pytest.raises(ZeroDivisionError):  # a defect keeps its traceback
        program(["mask", "show", str(files[0])])


def test_help_needs_neither_torch_nor_lightning_nor_hydra(tmp_path: Path) -> None:
    code = """
import contextlib, io, sys
from lightning_mask.app.cli.program import program

def all_help(group, words):
    for name, each in group.commands.items():
        if each.add_help_option:
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
                program([*words, name, "--help"])
            assert "Usage:" in said.getvalue()
        if hasattr(each, "commands"):
            all_help(each, [*words, name])

all_help(program, [])
heavy = {"torch", "lightning", "hydra", "omegaconf", "numpy", "rich", "yaml", "safetensors"} & sys.modules.keys()
sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = command(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    version = command(str(BIN), "--version", cwd=tmp_path)
    assert version.stdout == "lightning-mask 0.1.0\n"


# Hydra's words.


def test_words_go_to_hydra_and_every_job_sees_the_whole_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def job(cfg: DictConfig) -> None:
        seen.append((cfg.run, sys.argv))

    for words in (["run=x", "--config-dir", "."], ["--multirun", "run=x,y", f"hydra.sweep.dir={tmp_path}"]):
        whole = ["lightning-mask", "export", *words]
        monkeypatch.setattr(sys, "argv", whole)
        GlobalHydra.instance().clear()
        launch.run(job, config_path(), "export", words)
        assert sys.argv is whole
        assert all(argv is whole for _, argv in seen)
        assert [run for run, _ in seen] == (["x", "y"] if "--multirun" in words else ["x"])
        seen.clear()


def test_what_a_run_leaves_can_be_looked_at(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = list(sys.argv)
    GlobalHydra.instance().clear()
    code, out, _ = run("train", *TINY, "hydra.run.dir=runs/one", "test=false")
    assert code == 0
    assert "runs/one" in out
    assert sys.argv == argv
    page = Path("runs/one/report.html")
    page.unlink(missing_ok=True)
    shown: list[str] = []
    monkeypatch.setattr(click, "launch", shown.append)
    assert told(run, "report", "runs/one") == {"run": "runs/one", "report": str(page)}
    assert page.read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    assert shown == []
    assert run("report", "runs/one", "--open") == (0, f"{page}\n", "")
    assert shown == [str(page)]
    before = page.read_bytes()
    for words in (["runs/one", "--previous", "runs/one"], ["runs"], ["nowhere"]):
        assert words[-1] in refused(run, "report", *words)
    assert page.read_bytes() == before
    summary = json.loads(Path("runs/one/summary.json").read_text())
    assert told(run, "mask", "show", "runs/one/masks.safetensors")["active"] == summary["mask"]["active"]


def test_a_wrong_word_of_hydra_ends_with_exit_code_2(run: Run) -> None:
    argv = list(sys.argv)
    for name, word, way_out in (("train", "mask=fischer", "fisher"), ("prune", "methd=obs", "method")):
        GlobalHydra.instance().clear()
        assert way_out in refused(run, name, word)
    assert sys.argv == argv
    assert not list(Path.cwd().iterdir())


def test_hydras_words_are_completed() -> None:
    assert completions("train", "trainer=ddp") == ["trainer=ddp", "trainer=ddp_cpu"]
    assert completions("train", "se") == ["seed=0"]
    assert {"mask=fisher", "mask=head"} < set(completions("train", "mask"))
    assert {"mask=", "model=", "seed="} < set(completions("train", ""))
    assert completions("export", "format=") == ["format=dense"]
    assert completions("train", "mask.density=") == completions("train", "nope") == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_and_words(tmp_path: Path) -> None:
    script = """
eval "$(lightning-mask --show-completion bash)"
complete -p lightning-mask > /dev/null || exit 1
try() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); _lightning_mask_completion "$1"; echo "${COMPREPLY[@]}"; }
try lightning-mask de
try lightning-mask mask ov
try lightning-mask train mask = prune_m
try lightning-mask train seed=1 mas
"""
    done = command("bash", "-c", script, cwd=tmp_path, PATH=f"{BIN.parent}{os.pathsep}{os.environ['PATH']}")
    commands, below, option, group = done.stdout.splitlines()
    assert (commands, below, option) == ("delta", "overlap", "prune_magnitude prune_movement")
    assert {"mask=fisher", "mask=head"} < set(group.split())
    for shell in ("zsh", "fish"):
        assert "_LIGHTNING_MASK_COMPLETE" in command(str(BIN), "--show-completion", shell, cwd=tmp_path).stdout


TWO = [*TINY, "trainer=ddp_cpu", "logger=none", "test=false", "trainer.max_steps=2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "folder"),
    [(["hydra.run.dir=one"], "one"), (["--multirun", "hydra.sweep.dir=two"], "two/0")],
    ids=["run", "sweep"],
)
def test_train_starts_all_ranks(words: list[str], folder: str, tmp_path: Path) -> None:
    done = command(str(BIN), "train", *words, "seed=3", *TWO, cwd=tmp_path, timeout=280, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / folder / "summary.json").read_text())
    assert (summary["seed"], summary["world_size"], summary["mask"]["held_changed"]) == (3, 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == [folder.partition("/")[0]]
