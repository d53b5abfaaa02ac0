"""Programs and ONNX files of smaller networks: what runs them elsewhere gives what the network gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pruned_nets import bert, images, llama, logits, resnet, tokens, zero_channels
from safetensors.torch import save_file
from torch import nn

from lightning_mask.export import Inputs, load_onnx, save_onnx, save_program, shrink

PLAIN = """
import sys
import torch
from safetensors.torch import load_file, save_file
run = torch.export.load("model.pt2").module()
save_file({"out": run(**load_file("inputs.safetensors"))}, "out.safetensors")
print(sorted(name for name in ("lightning_mask", "transformers", "lightning") if name in sys.modules))
"""


def small_bert() -> tuple[nn.Module, Inputs]:
    model, inputs = bert(), Inputs(kwargs=tokens())
    zero_channels(model, inputs)
    return shrink(model, inputs), inputs


def test_a_program_runs_in_plain_torch_on_other_batches_and_lengths(tmp_path: Path):
    small, inputs = small_bert()
    save_program(small, inputs, tmp_path / "model.pt2")
    given = {"input_ids": torch.randint(20, (7, 11)), "attention_mask": torch.ones(7, 11, dtype=torch.int64)}
    given["attention_mask"][2, 5:] = 0
    save_file(given, tmp_path / "inputs.safetensors")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PLAIN],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    from safetensors.torch import load_file

    found = load_file(tmp_path / "out.safetensors")["out"]
    torch.testing.assert_close(found, logits(small, **given), rtol=1e-4, atol=1e-5)


def test_onnx_runs_on_other_batches_and_lengths(tmp_path: Path):
    small, inputs = small_bert()
    save_onnx(small, inputs, tmp_path / "model.onnx")
    given = {"input_ids": torch.randint(20, (5, 9)), "attention_mask": torch.ones(5, 9, dtype=torch.int64)}
    found = load_onnx(tmp_path / "model.onnx")(given)
    torch.testing.assert_close(found, logits(small, **given), rtol=1e-4, atol=1e-5)


def test_programs_of_images_and_of_language_models(tmp_path: Path):
    model, x = resnet(), images()
    save_onnx(model, Inputs((x,)), tmp_path / "model.onnx")
    more = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(load_onnx(tmp_path / "model.onnx")({"pixel_values": more}), model(more))
    save_program(model, Inputs((x,)), tmp_path / "model.pt2")
    save_program(llama(), Inputs(kwargs={**tokens(), "use_cache": False}), tmp_path / "llama.pt2")
    run = torch.export.load(tmp_path / "llama.pt2").module()
    ids = torch.randint(20, (2, 13))
    found = run(input_ids=ids, attention_mask=torch.ones_like(ids))
    torch.testing.assert_close(found, logits(llama(), input_ids=ids), rtol=1e-4, atol=1e-5)


def test_a_file_that_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, x = resnet(), images()
    made = torch.export.export
    other = resnet()
    with torch.no_grad():
        other.classifier.bias += 1.0

    def of_another(net: nn.Module, *args: object, **kwargs: object) -> object:
        net.net.load_state_dict(other.state_dict())
        return made(net, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", of_another)
    with pytest.raises(RuntimeError, match="outputs differ from the model's on pixel_values"):
        save_program(model, Inputs((x,)), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_code_that_cannot_be_followed_is_named(tmp_path: Path):
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return y if float(y.sum()) > 0 else -y

    with pytest.raises(RuntimeError, match=r"torch\.export cannot follow the code of Random"):
        save_program(Random(), Inputs((torch.ones(2, 3),)), tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_onnxruntime_cannot_run_is_said_in_one_line_and_not_kept(tmp_path: Path):
    path = tmp_path / "model.onnx"
    with pytest.raises(
        ValueError, match=r"^onnxruntime cannot run '.*' \(.*NOT_IMPLEMENTED.*in a precision that it has not"
    ):
        save_onnx(nn.Linear(3, 3).bfloat16(), Inputs((torch.ones(2, 3, dtype=torch.bfloat16),)), path)
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="it is damaged"):
        load_onnx(path)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_onnx_the_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"{package}, which is not installed: pip install 'lightning-mask\[export\]'"
    ):
        save_onnx(resnet(), Inputs((images(),)), tmp_path / "model.onnx")
