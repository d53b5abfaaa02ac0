"""State dicts with everything in them that a file format trips over, and the forms that a checkpoint comes in."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

NAN_WITH_PAYLOAD = torch.tensor([0x7FC12345, 0x7FA00001, -0x3FFFFF], dtype=torch.int32).view(
    torch.float32
)  # one signals


def odd() -> dict[str, Tensor]:
    """A base: many dtypes, shapes and bit patterns."""
    torch.manual_seed(0)
    return {
        "body.weight": torch.randn(40, 30),
        "body.odd": torch.cat([NAN_WITH_PAYLOAD, torch.tensor([-0.0, 0.0, float("inf"), 1e-45]), torch.zeros(60)]),
        "body.brain": torch.randn(33, 7).bfloat16(),
        "body.half": torch.randn(5, 3, 2).half(),
        "body.eight": torch.randn(64).to(torch.float8_e4m3fn),
        "body.double": torch.randn(9, 9).double(),
        "body.complex": torch.randn(6, 4, dtype=torch.complex64),
        "body.running_mean": torch.zeros(12),
        "body.num_batches_tracked": torch.tensor(0),
        "body.flags": torch.rand(64) < 0.5,
        "body.scalar": torch.tensor(1.5),
        "body.empty": torch.zeros(0, 3),
        "body.turned": torch.randn(12, 20).t(),
        "body.still": torch.randn(17),
        "head.weight": torch.randn(3, 30),
    }


def tuned(base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What training could have made of it: a few entries, rows, whole tensors, statistics."""
    torch.manual_seed(1)
    made = {name: tensor.clone() for name, tensor in base.items()}
    made["body.weight"].view(-1)[torch.randperm(1200)[:50]] = torch.randn(50)
    made["body.odd"].view(torch.int32)[[0, 3, 4, 9]] = torch.tensor([0x7FC54321, 0, -(2**31), 0x7F800001]).int()
    made["body.brain"][[2, 30]] += 1
    made["body.half"].view(torch.int16)[1, 1, 1] = 0x7E05
    made["body.eight"].view(torch.uint8)[7] ^= 1
    made["body.double"] += 1e-12
    made["body.complex"][3, 2] = complex(-0.0, 1)
    made["body.running_mean"] += 0.25
    made["body.num_batches_tracked"] += 7
    made["body.flags"][5] = ~made["body.flags"][5]
    made["body.scalar"] -= 2
    made["body.turned"][3] = 0
    made["head.weight"] += 0.1
    return made


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two state dicts have the same names, shapes, dtypes and bits."""
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and bits(a[n]) == bits(b[n]) for n in a
    )


def write(state: Mapping[str, Tensor], form: str, folder: Path) -> Path:
    """Write a state dict as ``"safetensors"``, ``"pt"``, ``"ckpt"``, ``"folder"`` or ``"shards"``; return where."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: tensor.contiguous() for name, tensor in state.items()}
    if form == "safetensors":
        save_file(plain, folder / "model.st.safetensors", metadata={"format": "pt"})
        return folder / "model.st.safetensors"
    if form == "pt":
        torch.save(dict(state), folder / "model.pt")
        return folder / "model.pt"
    if form == "ckpt":
        torch.save({"epoch": 3, "state_dict": dict(state), "loops": {"step": 5}}, folder / "last.ckpt")
        return folder / "last.ckpt"
    (folder / "hf" / "deep").mkdir(parents=True)
    (folder / "hf/config.json").write_text("{}")
    (folder / "hf/deep/words.txt").write_text("words")
    if form == "folder":
        save_file(plain, folder / "hf/model.safetensors", metadata={"format": "pt"})
        return folder / "hf"
    names = list(plain)
    parts = {"model-00001-of-00002.safetensors": names[:6], "model-00002-of-00002.safetensors": names[6:]}
    for file, mine in parts.items():
        save_file({name: plain[name] for name in mine}, folder / "hf" / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {n: file for file, mine in parts.items() for n in mine}}
    (folder / "hf/model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "hf"


def read(path: Path) -> dict[str, Tensor]:
    """Read what :func:`write` wrote, by other means than ours."""
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        files = (
            sorted(set(json.loads(index.read_text())["weight_map"].values()))
            if index.exists()
            else ["model.safetensors"]
        )
        return {name: tensor for file in files for name, tensor in load_file(path / file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    content = torch.load(path, weights_only=True)
    return content.get("state_dict", content)
