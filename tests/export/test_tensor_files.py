"""Dense and sparse files: what comes back is what was saved, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pruned_nets import llama
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor

from lightning_mask.export import layers_2to4, load_semi_structured, load_sparse, save_dense, save_sparse
from lightning_mask.export.semi_structured import require_cuda, save_semi_structured, semi_structured
from lightning_mask.export.sparse import _hash


def pruned(shape: tuple[int, ...], sparsity: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(shape, generator=generator)
        .masked_fill(torch.rand(shape, generator=generator) < sparsity, 0)
        .to(dtype)
    )


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_dense_file_holds_every_entry_and_what_is_tied_once(tmp_path: Path):
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] = 0.0
    save_dense(model, tmp_path / "deep/dense.safetensors")
    there = load_file(tmp_path / "deep/dense.safetensors")
    assert set(model.state_dict()) - set(there) == {"lm_head.weight"}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in there.items())
    other = llama()
    load_model(other, tmp_path / "deep/dense.safetensors")
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_sparse_file_loads_equal_bit_for_bit(tmp_path: Path):
    state = {
        "a.weight": pruned((33, 17), 0.9),
        "a.bits": pruned((40, 40), 0.5, torch.bfloat16),
        "bits:a.weight": pruned((5, 3, 2), 0.9, torch.float16),
        "few": pruned((30, 30), 0.01),
        "numbers": pruned((100,), 0.9).mul(100).to(torch.int64),
        "flags": torch.rand(64) < 0.5,
        "all zero": torch.zeros(9, 9),
        "one": torch.tensor(0.0),
        "empty": torch.zeros(0, 3),
        "odd": torch.tensor([-0.0, 0.0, float("nan"), float("inf"), 1e-45] + [0.0] * 60),
        "turned": pruned((12, 20), 0.8).t(),
    }
    state["tied"] = state["a.weight"]
    compressed = save_sparse(state, tmp_path / "sparse.safetensors")
    assert set(state) - set(compressed) == {"few", "empty", "tied"}
    back = load_sparse(tmp_path / "sparse.safetensors")
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype)
        assert bits(back[name]) == bits(tensor), name
    assert back["tied"] is back["a.weight"]


def test_a_sparse_file_takes_the_values_and_a_bit_for_each_entry(tmp_path: Path):
    tensor = pruned((1000, 800), 0.9)
    save_sparse({"w": tensor}, tmp_path / "sparse.safetensors")
    size = (tmp_path / "sparse.safetensors").stat().st_size
    assert size <= 4 * int(tensor.count_nonzero()) + 100_000 + 1024


def test_a_sparse_file_that_would_be_no_smaller_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="No tensor has enough zeros"):
        save_sparse({"w": pruned((30, 30), 0.01)}, tmp_path / "sparse.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sparse.safetensors"
    save_sparse({"w": pruned((30, 30), 0.9)}, path)
    before = path.read_bytes()

    def broken(*_: object) -> dict[str, Tensor]:
        return {"w": torch.ones(30, 30)}

    monkeypatch.setattr("lightning_mask.export.sparse.load_sparse", broken)
    with pytest.raises(RuntimeError, match="w did not load equal"):
        save_sparse({"w": pruned((30, 30), 0.8)}, path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


def test_a_folder_in_the_place_of_the_file_is_refused_before_anything_is_written(tmp_path: Path):
    for save in (lambda: save_dense(llama(), tmp_path), lambda: save_sparse({"w": torch.zeros(30)}, tmp_path)):
        with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
            save()
    assert list(tmp_path.iterdir()) == []
    assert not [f for f in tmp_path.parent.iterdir() if f.name.endswith(".tmp")]


def test_damaged_and_foreign_files_are_refused(tmp_path: Path):
    path = tmp_path / "sparse.safetensors"
    with pytest.raises(FileNotFoundError, match="no sparse file"):
        load_sparse(path)
    save_file({"w": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="not a sparse file of this package"):
        load_sparse(path)
    save_sparse({"w": pruned((30, 30), 0.9)}, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        load_sparse(path)


def test_a_buffer_that_is_a_part_of_a_weight_and_one_that_holds_nan_are_written_as_they_are(tmp_path: Path):
    model = torch.nn.Linear(6, 4)
    with torch.no_grad():
        model.weight[:, 1:] = 0
    model.register_buffer("first", model.weight.detach()[:2])
    model.register_buffer("whole", model.weight.detach().view(24))
    model.register_buffer("seen", torch.full((3,), float("nan")))
    save_dense(model, tmp_path / "dense.safetensors")
    save_sparse(model.state_dict(), tmp_path / "sparse.safetensors")
    for back in (load_file(tmp_path / "dense.safetensors"), load_sparse(tmp_path / "sparse.safetensors")):
        assert back.keys() == model.state_dict().keys()
        assert all(bits(back[name]) == bits(tensor) for name, tensor in model.state_dict().items())


def test_a_bit_that_is_not_what_was_written_is_noticed_wherever_it_lies(tmp_path: Path):
    path = tmp_path / "sparse.safetensors"
    save_sparse({"w": pruned((9, 9), 0.9), "b": torch.ones(3, dtype=torch.bfloat16)}, path)
    written = path.read_bytes()
    for place in range(len(written)):
        path.write_bytes(written[:place] + bytes([written[place] ^ 1]) + written[place + 1 :])
        with pytest.raises(ValueError, match=r"is damaged|not a sparse file"):
            load_sparse(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda header, content: header.update(shapes="[]"),
        lambda header, content: header.update(shapes='{"w": "ab"}'),
        lambda header, content: header.update(shapes='{"w": [1000000000, 1000000000]}'),
        lambda header, content: header.update(shapes='{"w": [30, 31]}'),
        lambda header, content: header.update(aliases="null"),
        lambda header, content: content.update({"bits:w": content["bits:w"][:-1].clone()}),
        lambda header, content: content.update({"bits:w": content["bits:w"].float()}),
        lambda header, content: content.update({"values:w": content["values:w"][:1].clone()}),
        lambda header, content: content.pop("values:w"),
    ],
)
def test_a_sparse_file_whose_parts_do_not_go_together_is_refused(tmp_path: Path, damage: Callable[..., object]):
    path = tmp_path / "sparse.safetensors"
    save_sparse({"w": pruned((30, 30), 0.9)}, path)
    with safe_open(path, "pt") as file:
        header, content = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert json.loads(header["shapes"]) == {"w": [30, 30]}
    damage(header, content)
    save_file(content, path, metadata=header | {"hash": _hash(content, header)})
    with pytest.raises(ValueError, match=r"is damaged \("):
        load_sparse(path)


# 2:4.


def two_to_four(rows: int, columns: int) -> torch.nn.Linear:
    torch.manual_seed(0)
    layer = torch.nn.Linear(columns, rows)
    with torch.no_grad():
        fours = layer.weight.view(-1, 4)
        fours.scatter_(1, fours.abs().topk(2, dim=1, largest=False).indices, 0.0)
    return layer


def test_layers_with_two_zeros_in_each_four_are_found():
    model = torch.nn.Sequential(two_to_four(64, 128), torch.nn.Linear(64, 64), two_to_four(32, 64), two_to_four(6, 32))
    assert layers_2to4(model) == ["0", "2"]
    with torch.no_grad():
        model[0].weight[5, 8:12] = 1.0
        model[2].weight[0, :3] = 1.0
    with pytest.raises(ValueError, match=r"3\.weight of 6 x 32 fits, but the kernels take multiples of 32 x 64"):
        layers_2to4(model)
    with pytest.raises(ValueError, match=r"nearest: 1 of 2,048 fours of 0\.weight have more than two.*sparsity='2:4'"):
        layers_2to4(model[:1])
    with pytest.raises(ValueError, match="has none whose rows"):
        layers_2to4(torch.nn.Linear(3, 3))


def test_a_2to4_file_holds_half_of_the_values(tmp_path: Path):
    model = torch.nn.Sequential(two_to_four(64, 128))
    path = tmp_path / "2to4.safetensors"
    assert save_semi_structured(model, path) == ["0"]
    back = load_sparse(path)
    assert torch.equal(back["0.weight"], model[0].weight.half())
    assert path.stat().st_size < 2 * 64 * 128 * (1 / 2 + 1 / 16) + 2048
    save_sparse({"0.weight": model[0].weight}, path)
    with pytest.raises(ValueError, match="without 2:4 layers"):
        load_semi_structured(path, model)


def test_without_a_gpu_2to4_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA device, and there is none here"):
        semi_structured(torch.nn.Sequential(two_to_four(64, 128)))
    with pytest.raises(RuntimeError, match="format=sparse"):
        require_cuda()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_weights_compute_what_dense_ones_do(tmp_path: Path, dtype: torch.dtype):
    model = torch.nn.Sequential(two_to_four(256, 512), torch.nn.ReLU(), torch.nn.Linear(256, 64), two_to_four(64, 64))
    x = torch.randn(128, 512).to("cuda", dtype)
    save_semi_structured(model, tmp_path / "2to4.safetensors", dtype)
    made = load_semi_structured(tmp_path / "2to4.safetensors", model)
    assert isinstance(made[0].weight, torch.sparse.SparseSemiStructuredTensor)
    assert isinstance(made[3].weight, torch.sparse.SparseSemiStructuredTensor)
    assert torch.equal(made[2].weight, model[2].weight.to("cuda", dtype))
    with torch.no_grad():
        expected = model.to("cuda", dtype)(x)
        torch.testing.assert_close(made(x), expected, rtol=2e-2, atol=2e-2)
