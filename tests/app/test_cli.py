"""The console command: what it prints, what it writes, what it refuses, and how it ends."""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from lightning_mask import MaskSet
from lightning_mask.app import errors, launch
from lightning_mask.app.cli.program import program
from lightning_mask.app.cli.words import completions
from tests.app.commands import Run, files, refused, run, told
from tests.app.conftest import TINY, command

__all__ = ["files", "run"]  # fixtures

BIN = Path(sys.executable).with_name("lightning-mask")


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
        launch.run(job, "export", words)
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
    done = command(str(BIN), "train", *words, "seed=3", *TWO, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout
    summary = json.loads((tmp_path / folder / "summary.json").read_text())
    assert (summary["seed"], summary["world_size"], summary["mask"]["held_changed"]) == (3, 2, 0)
    assert [path.name for path in tmp_path.iterdir()] == [folder.partition("/")[0]]
