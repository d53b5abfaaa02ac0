"""A delta onto its base is the tuned model, and off again the base, bit for bit, whatever they are and lie in."""

import ctypes
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from odd_states import bits, odd, read, same, tuned, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_mask.core import Context, MaskEngine, MaskSet, Selection
from lightning_mask.core.selection import select
from lightning_mask.delta import Delta, apply, content_hash, diff, inspect, items, revert, save_delta


@pytest.mark.parametrize("form", ["safetensors", "pt", "ckpt", "folder", "shards"])
def test_apply_gives_the_tuned_model_and_revert_the_base(form: str, tmp_path: Path):
    base, after = odd(), tuned(odd())
    there = write(base, form, tmp_path / "base")
    for originals in (True, False):
        delta = tmp_path / f"delta-{originals}.safetensors"
        save_delta(delta, there, write(after, "safetensors", tmp_path / "tuned"), originals=originals)
        out, back = (tmp_path / f"{word}-{originals}{there.suffix}" for word in ("out", "back"))
        apply(there, delta, out)
        assert same(read(out), after)
        revert(out, delta, back, base=None if originals else there)
        assert same(read(back), base)
    if there.is_dir():
        assert (out / "deep/words.txt").read_text() == "words"
        assert {p.name for p in out.iterdir()} == {p.name for p in there.iterdir()}
    if form == "ckpt":
        content = torch.load(out, weights_only=True)
        assert content["loops"] == {"step": 5}
        assert content["epoch"] == 3
    apply(there, delta, there)
    assert same(read(there), after)  # in its own place
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob(".*"))


def test_each_tensor_takes_the_form_that_fits(tmp_path: Path):
    save_delta(tmp_path / "d.safetensors", odd(), tuned(odd()))
    forms = {row["name"]: row["form"] for row in inspect(tmp_path / "d.safetensors")["tensors"]}
    assert forms == {
        "body.weight": "entries",
        "body.odd": "entries",
        "body.brain": "rows",
        "body.half": "entries",
        "body.eight": "entries",
        "body.double": "whole",
        "body.complex": "entries",
        "body.running_mean": "whole",
        "body.num_batches_tracked": "whole",
        "body.flags": "entries",
        "body.scalar": "whole",
        "body.empty": "none",
        "body.turned": "rows",
        "body.still": "none",
        "head.weight": "whole",
    }


def test_an_empty_delta_is_one(tmp_path: Path):
    base = write(odd(), "safetensors", tmp_path)
    save_delta(tmp_path / "d.safetensors", base, base, originals=True)
    facts = inspect(tmp_path / "d.safetensors")
    assert facts["active"] == 0
    assert facts["density"] == 0
    apply(base, tmp_path / "d.safetensors", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), odd())
    revert(base, tmp_path / "d.safetensors", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), odd())


def test_the_file_can_be_read_without_this_package(tmp_path: Path):
    base, after = odd(), tuned(odd())
    save_delta(tmp_path / "d.safetensors", base, after, metrics={"test/accuracy": 0.5})
    with safe_open(tmp_path / "d.safetensors", "pt") as there:
        words = there.metadata()
        names, counts = json.loads(words["names"]), json.loads(words["counts"])
        at = names.index("body.weight")
        begin = sum(c for c, letter in zip(counts[:at], words["forms"], strict=False) if letter in "er")
        indices = there.get_tensor("indices")[begin : begin + counts[at]]
    assert indices.dtype == torch.int32
    assert torch.equal(indices.long(), (base["body.weight"] != after["body.weight"]).view(-1).nonzero().view(-1))
    assert json.loads(words["metrics"]) == {"test/accuracy": 0.5}
    assert json.loads(words["versions"])["torch"] == torch.__version__


def test_long_tensors_have_long_indices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (items, sys.modules["lightning_mask.delta.saving"]):
        monkeypatch.setattr(module, "LONG", 500)  # for 2^31, of which a test cannot have a tensor
    base = write(odd(), "safetensors", tmp_path)
    save_delta(tmp_path / "d.safetensors", base, tuned(odd()), originals=True)
    there = load_file(tmp_path / "d.safetensors")
    assert there["indices.long"].dtype == torch.int64
    assert len(there["indices.long"]) == 50
    apply(base, tmp_path / "d.safetensors", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), tuned(odd()))


class Net(nn.Module):
    """With statistics, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.BatchNorm1d(16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.norm(self.embed(words).mean(1))))


def trained(model: nn.Module, masks: MaskSet) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine = MaskEngine(model, optimizer, masks)
    for step in range(4):
        words = torch.randint(0, 50, (8, 5), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(words), words[:, 0]).backward()
        engine.after_backward()
        optimizer.step()
    engine.release()
    return model


def test_a_real_training_comes_back_with_its_statistics_and_ties(tmp_path: Path):
    torch.manual_seed(0)
    model = Net()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    masks = select(
        Selection(train=["body.bias", "norm"], score="random", density=0.1, scope=["embed", "body.weight"]),
        model,
        Context(model),
    )
    masks.save(tmp_path / "masks.safetensors")
    trained(model, masks)
    d = tmp_path / "d.safetensors"
    save_delta(d, tmp_path / "base.pt", model, tmp_path / "masks.safetensors", originals=True)
    facts = inspect(d)
    rows = {row["name"]: (row["form"], row["active"]) for row in facts["tensors"]}
    assert rows["norm.running_var"] == ("whole", 16)
    assert rows["norm.num_batches_tracked"] == ("whole", 1)
    assert rows["embed.weight"][0] == rows["body.weight"][0] == "drawn"  # the recipe says where
    assert rows["body.bias"] == ("whole", 16)
    assert "head.weight" not in rows
    assert facts["active"] == masks.count() + 16 + 16 + 1  # mean, variance, batches
    assert "indices" not in load_file(d)

    apply(tmp_path / "base.pt", d, tmp_path / "out.pt")
    other = Net()
    other.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert same(other.state_dict(), model.state_dict())
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    assert content["head.weight"].data_ptr() == content["embed.weight"].data_ptr()
    assert content._metadata["norm"] == {"version": 2}
    revert(tmp_path / "out.pt", d, tmp_path / "back.pt")
    assert same(
        torch.load(tmp_path / "back.pt", weights_only=True), torch.load(tmp_path / "base.pt", weights_only=True)
    )

    untied = {n: t for n, t in torch.load(tmp_path / "base.pt", weights_only=True).items() if n != "embed.weight"}
    save_file(untied, tmp_path / "kept_the_other_name.safetensors")
    apply(tmp_path / "kept_the_other_name.safetensors", d, tmp_path / "named.safetensors")
    assert torch.equal(load_file(tmp_path / "named.safetensors")["head.weight"], model.embed.weight)


def test_masks_say_what_is_active_even_where_nothing_changed(tmp_path: Path):
    base = {"w": torch.zeros(10, 10), "v": torch.ones(4)}
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask.view(-1)[[3, 50, 99]] = True
    after = {"w": base["w"].clone(), "v": base["v"]}
    after["w"].view(-1)[50] = 1
    masks = MaskSet({"w": mask, "v": torch.zeros(4, dtype=torch.bool)}, {"score": "snip"})
    save_delta(tmp_path / "d.safetensors", base, after, masks)
    delta = Delta.load(tmp_path / "d.safetensors")
    assert delta.parts["w"].indices.tolist() == [3, 50, 99]
    assert inspect(tmp_path / "d.safetensors")["recipe"] == {"score": "snip"}


def test_a_recipe_that_does_not_give_the_masks_is_not_relied_on(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Linear(30, 20)
    masks = select(Selection(score="random", density=0.1, scope=["weight"]), model, Context(model))
    other = MaskSet({**masks, "weight": masks["weight"].roll(1)}, masks.recipe)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = {name: torch.where(other[name], tensor + 1, tensor) for name, tensor in base.items()}
    save_delta(tmp_path / "d.safetensors", base, after, other)
    save_file(base, tmp_path / "base.safetensors")
    apply(tmp_path / "base.safetensors", tmp_path / "d.safetensors", tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), after)


def test_prefixes_are_found_on_either_side(tmp_path: Path):
    base, after = odd(), tuned(odd())
    plain, prefixed = write(base, "safetensors", tmp_path), {f"net.model.{name}": t for name, t in base.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "run.ckpt")
    save_delta(tmp_path / "of_plain.safetensors", plain, after)
    apply(tmp_path / "run.ckpt", tmp_path / "of_plain.safetensors", tmp_path / "tuned.ckpt")
    assert same(read(tmp_path / "tuned.ckpt"), {f"net.model.{name}": tensor for name, tensor in after.items()})
    save_delta(tmp_path / "of_run.safetensors", plain, tmp_path / "tuned.ckpt")
    apply(plain, tmp_path / "of_run.safetensors", tmp_path / "tuned.safetensors")
    assert same(load_file(tmp_path / "tuned.safetensors"), after)
    assert all(row.status == "equal" for row in diff(tmp_path / "tuned.safetensors", tmp_path / "tuned.ckpt"))


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_a_head_that_the_base_lacks_is_added_and_taken_off(form: str, tmp_path: Path):
    start, after = odd(), tuned(odd())
    body = {name.removeprefix("body."): tensor for name, tensor in start.items() if name.startswith("body.")}
    base = write(body | {"unknown": torch.ones(2)}, form, tmp_path / "base")
    named = [{f"net.{name}": tensor for name, tensor in state.items()} for state in (start, after)]
    save_delta(tmp_path / "d.safetensors", *named)
    apply(base, tmp_path / "d.safetensors", tmp_path / "out")
    wanted = {name.removeprefix("body."): tensor for name, tensor in after.items()} | {"unknown": torch.ones(2)}
    assert same(read(tmp_path / "out"), wanted)
    if form == "shards":
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == wanted.keys()
        assert index["metadata"]["total_size"] == sum(len(bits(tensor)) for tensor in wanted.values())
    revert(tmp_path / "out", tmp_path / "d.safetensors", tmp_path / "back", base=base)
    assert same(read(tmp_path / "back"), read(base))


def test_a_delta_names_its_base_by_a_hash_that_the_base_alone_gives(tmp_path: Path):
    base = write(odd() | {"unknown": torch.ones(2)}, "shards", tmp_path / "base")
    after = {f"net.{name}": tensor for name, tensor in (tuned(odd()) | {"head.bias": torch.zeros(3)}).items()}
    save_delta(tmp_path / "d.safetensors", base, after)
    named = {f"net.model.{name}": tensor for name, tensor in read(base).items()}
    assert inspect(tmp_path / "d.safetensors")["base"] == content_hash(base) == content_hash(named)
    named["net.other"] = named.pop("net.model.unknown")
    assert content_hash(named) != content_hash(base)


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_weights_in_further_forms_are_not_taken_along(form: str, tmp_path: Path):
    base = write(odd(), form, tmp_path / "base")
    torch.save({"stale": torch.ones(2)}, base / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"stale": "pytorch_model-00001-of-00001.bin"}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    stale = ["tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.fp16.safetensors", "onnx/model_qint8.onnx"]
    stale += ["consolidated.00.pth", "openvino/openvino_model.bin"]
    stale += ["model.safetensors.index.json"] if form == "folder" else []
    kept = ["training_args.bin", "tokenizer.model", "adapter_model.safetensors", "2_Dense/model.safetensors"]
    for name in (*stale, *kept):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    save_delta(tmp_path / "d.safetensors", base, tuned(odd()), originals=True)
    apply(base, tmp_path / "d.safetensors", tmp_path / "out")
    assert same(read(tmp_path / "out"), tuned(odd()))
    stale += ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    assert not [name for name in stale if (tmp_path / "out" / name).exists()]
    assert [name for name in kept if (tmp_path / "out" / name).read_text() == name] == kept
    revert(tmp_path / "out", tmp_path / "d.safetensors", tmp_path / "back")
    assert same(read(tmp_path / "back"), odd())


@contextmanager
def anonymous_memory(most: list[int]) -> Iterator[None]:
    """Append the growth of memory that is not a file's, in bytes, at its highest, looked at every millisecond."""

    def now() -> int:
        words = Path("/proc/self/status").read_text().split()
        return int(words[words.index("RssAnon:") + 1]) * 1024

    ctypes.CDLL(None).malloc_trim(0)  # what was freed before could be used again unseen
    done, before, seen = threading.Event(), now(), []

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(now())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    most.append(max([*seen, now()]) - before)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_memory_stays_at_a_few_tensors(form: str, tmp_path: Path):
    base = {f"layer.{i}.weight": torch.randn(1024, 512) for i in range(20)}
    path = write(base, form, tmp_path / "base")
    after = write({name: tensor + 1 for name, tensor in base.items()}, form, tmp_path / "after")
    del base
    most: list[int] = []
    with anonymous_memory(most):
        save_delta(tmp_path / "d.safetensors", path, after, originals=True)
    with anonymous_memory(most):
        apply(path, tmp_path / "d.safetensors", tmp_path / f"out{path.suffix}")
    with anonymous_memory(most):
        revert(tmp_path / f"out{path.suffix}", tmp_path / "d.safetensors", tmp_path / f"back{path.suffix}")
    with anonymous_memory(most):
        diff(path, after)
    assert max(most) < 8 << 21, most  # eight of twenty tensors of 2 MiB
