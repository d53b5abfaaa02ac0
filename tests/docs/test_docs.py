"""The pages say what is so: their code runs and prints what they say, the notebook runs, and the site builds."""

import contextlib
import shlex
import subprocess
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import pytest
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from pages import DOCS, blocks, run

from lightning_mask.app.cli.program import program

README = DOCS.parent / "README.md"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md") if blocks(page))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_prints_what_the_page_says(page: str) -> None:
    for block, printed in run(DOCS / page):
        if block.prints is not None:
            assert printed == block.prints, f"{page}, line {block.line}"


@pytest.mark.slow
def test_the_code_of_the_readme_runs_and_prints_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of training and one of testing: 30 and a whole test set take minutes."""

    class Short(Trainer):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given, fast_dev_run=True, enable_progress_bar=False)

    monkeypatch.setattr("lightning.pytorch.Trainer", Short)
    training, *others = run(README)
    assert "MaskSet(105 tensors, 114,721 of 22,714,371 entries active)" in training[1]
    said = [line for _, printed in others for line in printed.splitlines()]
    assert said
    assert all(f"`{line}`" in README.read_text() for line in said)


def test_every_guide_and_how_to_has_code_or_commands() -> None:
    for folder in ("guide", "how_to"):
        for page in (DOCS / folder).glob("*.md"):
            assert "```python" in page.read_text() or "```console" in page.read_text(), page.name
    assert len(PAGES) >= 8


def test_the_commands_of_the_pages_are_understood() -> None:
    """Hydra composes their words, and what else follows ``lightning-mask`` are commands and options that there are."""
    lines = [
        shlex.split(line.removeprefix("$ ").replace("<run>", "run"), comments=True)
        for page in (README, *DOCS.rglob("*.md"))
        for line in page.read_text().splitlines()
        if line.startswith("$ ")
    ]
    checked = 0
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        for words in lines:
            known = [
                i for i, word in enumerate(words) if word in ("lightning-mask", "scripts/train.sh", "scripts/train.py")
            ]
            if not known:
                continue
            name, *rest = takewhile(lambda word: word != "-m", words[known[0] :])  # a sweep's values follow
            name, *rest = rest if name == "lightning-mask" else ("train", *rest)
            if name in ("train", "compare", "prune", "export", "packnet"):
                compose(name, overrides=rest, return_hydra_config=True)
            else:
                command, context = program, click.Context(program)
                while isinstance(command, click.Group):
                    _, command, rest = command.resolve_command(context, [name, *rest])
                    name, *rest = rest if isinstance(command, click.Group) else (name, *rest)
                with contextlib.suppress(click.BadParameter):  # a file that is not there
                    command.make_context(name, rest, parent=context)
            checked += 1
    assert checked > 30


@pytest.mark.slow
def test_the_notebook_runs_from_start_to_end() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(DOCS / "tutorial.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=800, kernel_name="python3", resources={"metadata": {"path": "."}}
    ).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "held entries that moved: 0" in printed


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "callbacks.html").read_text()
    assert 'id="lightning_mask.FreezeMask"' in reference
    pages = {page.relative_to(tmp_path / "site").as_posix() for page in (tmp_path / "site").rglob("*.html")}
    assert pages >= {f"{page.removesuffix('.md')}.html" for page in PAGES}
