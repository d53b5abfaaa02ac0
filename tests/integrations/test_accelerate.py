"""accelerate: prepared optimizers, and two real processes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lightning_mask.core import Context, MaskEngine, Selection
from lightning_mask.core.selection import select

HERE = Path(__file__).parent
REPO = HERE.parents[1]


def together(*words: str, cwd: Path, processes: int = 2) -> str:
    """Run a script on several processes of one machine; return what they print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("PYTHONPATH", str(REPO))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("engine", ["dense", "compact"])
def test_the_engine_may_be_made_before_or_after_prepare(tiny: Callable[[], nn.Module], order: str, engine: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = select(Selection(train="classifier", score="random", density=0.1), model, Context(model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)
    held = MaskEngine(model, optimizer, masks, engine=engine) if order == "before" else None
    model, optimizer = accelerator.prepare(model, optimizer)
    held = held or MaskEngine(accelerator.unwrap_model(model), optimizer, masks, engine=engine)
    ids = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        accelerator.backward(model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss)
        held.after_backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, mask in masks.items():
        after = model.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(after[mask], before[name][mask])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["accelerate", "trainer"])
def test_two_processes(case: str, tmp_path: Path) -> None:
    said = together(str(HERE / "accelerate_cases.py"), case, str(tmp_path), cwd=tmp_path)
    assert said.count(f"done {case}") == 2


@pytest.mark.slow
def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    said = together(str(REPO / "docs/examples/accelerate_loop.py"), "--steps=1", cwd=tmp_path, processes=1)
    assert "entries train; held entries changed: 0" in said
    assert {"config.json", "model.safetensors"} <= {file.name for file in (tmp_path / "accelerate_model").iterdir()}
