"""How the console command is run in tests, and the files that it is given."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lightning_mask import MaskSet
from lightning_mask.app import errors
from lightning_mask.app.cli.program import program

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
