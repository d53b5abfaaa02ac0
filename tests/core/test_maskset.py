import hashlib
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_mask.core import Context, MaskSet, Selection
from lightning_mask.core.selection import select


def draw(shape: tuple[int, ...], density: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


ODD = {
    "matrix": draw((5, 7)),
    "vector": draw((13,)),
    "zero-dim on": torch.tensor(True),
    "zero-dim off": torch.tensor(False),
    "no entries": torch.zeros(0, 3, dtype=torch.bool),
    "size one": torch.tensor([[[True]]]),
    "row": draw((1, 9)),
    "column": draw((9, 1), seed=1),
    "all": torch.ones(4, 3, dtype=torch.bool),
    "none": torch.zeros(4, 3, dtype=torch.bool),
    "expanded all": torch.tensor(True).expand(6, 2),
    "expanded in part": torch.tensor([True, False]).expand(3, 2),
    "transposed": draw((4, 6), seed=2).t(),
    "channels last": draw((2, 3, 4, 4), seed=3).contiguous(memory_format=torch.channels_last),
    "slice": draw((8, 8), seed=4)[::2, 1::3],
    "last bit of a byte": torch.tensor([False] * 7 + [True]),
    "ninth bit": torch.tensor([False] * 8 + [True]),
    "name/with.odd|letters é": draw((3,)),
}


def test_algebra_is_that_of_sets():
    a = {name: m.contiguous() for name, m in ODD.items()}
    b = {name: draw(tuple(m.shape), 0.4, seed=9) for name, m in ODD.items()}
    one, two = MaskSet(a), MaskSet(b)
    for name in ODD:
        assert torch.equal((one & two)[name], a[name] & b[name]), name
        assert torch.equal((one | two)[name], a[name] | b[name]), name
        assert torch.equal((~one)[name], ~a[name]), name
        assert (one & two)[name].dtype == torch.bool
    assert ~~one == one
    assert ~(one & two) == ~one | ~two
    assert one.count() == sum(int(m.sum()) for m in a.values())
    assert one.numel() == sum(m.numel() for m in a.values())
    assert one.density() == one.count() / one.numel()
    assert MaskSet({}).density() == 0.0
    assert list(one) == list(ODD)


def test_masks_of_different_tensors_or_shapes_are_not_combined():
    one = MaskSet({"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"only one of them has b"):
        _ = one & MaskSet({"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"b: mask shapes differ, \(2,\) and \(1,\)"):
        _ = one | MaskSet({"a": torch.ones(2, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.tensor([0.0, 0.5]), "zeros and ones"),
        (torch.tensor([0.0, float("nan")]), "zeros and ones"),
        (torch.tensor([0, 2]), "zeros and ones"),
        ([True, False], "boolean tensor"),
        (True, "boolean tensor"),
    ],
)
def test_what_is_no_mask_is_refused_by_name(value: object, says: str):
    with pytest.raises(ValueError, match=r"layer\.weight") as error:
        MaskSet({"layer.weight": value})  # type: ignore[dict-item]
    assert says in str(error.value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32, torch.bfloat16])
def test_zeros_and_ones_of_any_dtype_are_masks(dtype: torch.dtype):
    mask = draw((4, 4))
    assert torch.equal(MaskSet({"w": mask.to(dtype)})["w"], mask)


def test_equality_is_by_names_and_bits():
    masks = MaskSet(ODD)
    assert masks == MaskSet({name: ODD[name].clone() for name in reversed(ODD)})
    assert masks != ~masks
    assert masks != MaskSet({})
    assert (masks == 3) is False
    with pytest.raises(TypeError, match="unhashable"):
        hash(masks)


def test_a_uniform_mask_takes_one_byte():
    for value in (True, False):
        mask = MaskSet({"w": torch.full((1000, 1000), value)})["w"]
        assert mask.untyped_storage().nbytes() == 1
        assert torch.equal(mask, torch.full((1000, 1000), value))


# Hash.


def test_the_hash_is_this_number():
    """Written down, so that a change of the hash is seen: files and checkpoints of before would not load."""
    masks = MaskSet({"b": torch.tensor([[True, False], [True, True]]), "a": torch.ones(3, dtype=torch.bool)})
    digests = {
        "a": hashlib.sha256(b"a|[3]|all").hexdigest(),
        "b": hashlib.sha256(b"b|[2, 2]|" + bytes([0b10110000])).hexdigest(),
    }
    assert masks.digests() == digests
    assert masks.hash() == hashlib.sha256(f"a{digests['a']}b{digests['b']}".encode()).hexdigest()


def test_the_hash_is_of_the_content_alone():
    masks = MaskSet(ODD)
    assert masks.hash() == MaskSet({n: ODD[n] for n in reversed(ODD)}).hash(), "order"
    assert masks.hash() == MaskSet({n: m.clone(memory_format=torch.contiguous_format) for n, m in ODD.items()}).hash()
    assert masks.hash() == MaskSet({n: m.float() for n, m in ODD.items()}).hash(), "dtype"
    assert masks.hash() == masks.to("cpu").hash() == MaskSet.from_state(masks.to_state()).hash()
    assert masks.hash() == MaskSet(ODD, {"score": "magnitude"}).hash(), "recipe"


def test_the_hash_tells_names_shapes_and_every_bit_apart():
    base = draw((3, 4))
    sets = [
        MaskSet({"w": base}),
        MaskSet({"v": base}),
        MaskSet({"w": base.reshape(4, 3)}),
        MaskSet({"w": base.reshape(12)}),
        MaskSet({"w": base, "v": base}),
        MaskSet({"w": torch.ones(3, 4)}),
        MaskSet({"w": torch.zeros(3, 4)}),
        MaskSet({"w": torch.ones(4, 3)}),
        MaskSet({}),
    ]
    for i in range(12):
        flipped = base.clone().view(-1)
        flipped[i] = ~flipped[i]
        sets.append(MaskSet({"w": flipped.view(3, 4)}))
    assert len({masks.hash() for masks in sets}) == len(sets)


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), st.lists(st.integers(0, 5), max_size=4), max_size=4),
    st.floats(0, 1),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_state_round_trip(shapes: dict[str, list[int]], density: float, seed: int):
    masks = MaskSet({name: draw(tuple(shape), density, seed) for name, shape in shapes.items()}, {"seed": seed})
    again = MaskSet.from_state(masks.to_state())
    assert again == masks
    assert again.hash() == masks.hash()
    assert again.recipe == masks.recipe
    assert list(again) == list(masks)


def test_the_state_loads_without_unpickling(tmp_path: Path):
    masks = MaskSet(ODD, {"score": "fisher", "density": 0.5})
    torch.save({"masks": masks.to_state()}, tmp_path / "x.pt")
    loaded = MaskSet.from_state(torch.load(tmp_path / "x.pt", weights_only=True)["masks"])
    assert loaded == masks
    assert loaded.recipe == masks.recipe


# Files.


def test_file_round_trip(tmp_path: Path):
    recipe = {"score": "magnitude", "density": 0.1, "train": ["head"], "mask": None}
    masks = MaskSet(ODD, recipe)
    masks.save(tmp_path / "new folder" / "m.safetensors")
    loaded = MaskSet.load(str(tmp_path / "new folder" / "m.safetensors"))
    assert loaded == masks
    assert loaded.hash() == masks.hash()
    assert loaded.recipe == recipe
    assert list(loaded) == list(masks)
    assert os.listdir(tmp_path / "new folder") == ["m.safetensors"]


def test_an_empty_set_has_a_file(tmp_path: Path):
    MaskSet({}).save(tmp_path / "m")
    assert len(MaskSet.load(tmp_path / "m")) == 0


@pytest.mark.parametrize(("shape", "tensors"), [((1000, 1000), 1), ((3,), 200), ((64, 64), 50)])
def test_a_file_takes_a_bit_an_entry(tmp_path: Path, shape: tuple[int, ...], tensors: int):
    masks = MaskSet({f"encoder.layer.{i}.attention.self.query.weight": draw(shape, seed=i) for i in range(tensors)})
    masks.save(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size <= masks.numel() / 8 + 4096 * tensors


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(100, 500), nn.Linear(500, 3)


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk"])
@pytest.mark.parametrize("structure", ["entry", "row"])
@pytest.mark.parametrize("context_seed", [0, 7])
def test_a_seeded_random_mask_is_its_recipe(tmp_path: Path, allocation: str, structure: str, context_seed: int):
    model = Two()
    selection = Selection("head", "random", 0.1, seed=7, structure=structure, allocation=allocation)
    masks = select(selection, model, Context(model, seed=context_seed))
    masks.save(tmp_path / "m")
    assert load_file(tmp_path / "m") == {}, "no bits"
    assert (tmp_path / "m").stat().st_size < 4096
    torch.manual_seed(99)  # nothing global plays a part
    assert MaskSet.load(tmp_path / "m") == masks


def test_a_mask_that_does_not_follow_its_recipe_keeps_its_bits(tmp_path: Path):
    model = Two()
    masks = select(Selection(None, "random", 0.1), model, Context(model))
    other = MaskSet({**masks, "body.weight": ~masks["body.weight"]}, masks.recipe)
    other.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == other
    less = MaskSet({n: m for n, m in masks.items() if n != "body.weight"}, masks.recipe)
    less.save(tmp_path / "m")
    assert MaskSet.load(tmp_path / "m") == less


def test_no_file_is_an_error_of_its_own(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no mask file"):
        MaskSet.load(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="no mask file"):
        MaskSet.load(tmp_path)


def test_a_foreign_file_is_refused_in_one_sentence(tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "unpickled"),)

    torch.save({"w": Bomb()}, tmp_path / "pickle")
    save_file({"w": torch.zeros(3, dtype=torch.bfloat16)}, tmp_path / "weights")
    save_file({"w": torch.zeros(3)}, tmp_path / "other", metadata={"format": "pt"})
    (tmp_path / "text").write_text("hello, this is no mask at all")
    (tmp_path / "empty").write_bytes(b"")
    for name in ("pickle", "weights", "other", "text", "empty"):
        with pytest.raises(ValueError, match=name) as error:
            MaskSet.load(tmp_path / name)
        assert "\n" not in str(error.value)
        assert "MaskSet.save" in str(error.value)
    assert not (tmp_path / "unpickled").exists()


def test_a_truncated_file_is_refused_at_every_length(tmp_path: Path):
    MaskSet({"w": draw((5, 5)), "b": torch.ones(3)}, {"score": "magnitude"}).save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            MaskSet.load(tmp_path / "cut")


@pytest.mark.parametrize("drawn", [False, True])
def test_no_flipped_bit_changes_a_mask_unnoticed(tmp_path: Path, drawn: bool):
    model = nn.Linear(5, 4)
    if drawn:
        masks = select(Selection(None, "random", 0.5), model, Context(model))
    else:
        masks = MaskSet({"weight": draw((4, 5)), "bias": torch.ones(4)}, {"score": "magnitude"})
    masks.save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    refused = 0
    for at in range(len(whole)):
        for bit in (0, 5):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            (tmp_path / "damaged").write_bytes(damaged)
            try:
                loaded = MaskSet.load(tmp_path / "damaged")
            except ValueError as error:
                assert "damaged" in str(error)  # noqa: PT017
                refused += 1
            else:  # a letter of the recipe's text: the masks are the same all the same
                assert loaded == masks
    assert refused > len(whole)


def test_a_header_that_lies_is_refused(tmp_path: Path):
    good = {"format": "lightning-mask 1", "hash": "", "recipe": "{}", "uniform": "{}", "shapes": '{"w": [4]}'}
    bits = {"w": torch.tensor([0b10100000], dtype=torch.uint8)}
    cases: list[tuple[dict[str, Tensor], dict[str, str]]] = [
        (bits, good),
        (bits, {**good, "shapes": '{"w": [40]}'}),
        (bits, {**good, "shapes": '{"w": [-2, -2]}'}),
        (bits, {**good, "shapes": '{"w": "x"}'}),
        (bits, {**good, "shapes": "[1]"}),
        (bits, {**good, "shapes": '{"w": [4], "v": [4]}'}),
        (bits, {**good, "recipe": "["}),
        (bits, {**good, "recipe": "[]"}),
        (bits, {**good, "uniform": '{"v": true}'}),
        ({"w": bits["w"].float()}, good),
        ({}, {**good, "uniform": '{"w": true}', "shapes": '{"w": [-3]}'}),
        ({}, {**good, "recipe": json.dumps({"score": "random", "scope_names": ["w"]})}),
        (bits, {k: v for k, v in good.items() if k != "recipe"}),
    ]
    for tensors, metadata in cases:
        save_file(tensors, tmp_path / "lie", metadata=metadata)
        with pytest.raises(ValueError, match="lie"):
            MaskSet.load(tmp_path / "lie")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = MaskSet({"w": draw((8, 8))})
    old.save(tmp_path / "m")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        MaskSet({"w": draw((8, 8), seed=1)}).save(tmp_path / "m")
    monkeypatch.undo()
    assert MaskSet.load(tmp_path / "m") == old
    assert os.listdir(tmp_path) == ["m"]


def test_a_process_killed_before_the_rename_leaves_the_old_file(tmp_path: Path):
    old = MaskSet({"w": draw((8, 8))})
    old.save(tmp_path / "m")
    child = os.fork()
    if not child:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        MaskSet({"w": draw((8, 8), seed=1)}).save(tmp_path / "m")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert MaskSet.load(tmp_path / "m") == old
    left = [f for f in os.listdir(tmp_path) if f != "m"]
    assert len(left) == 1
    assert left[0].startswith(".m.")
    assert left[0].endswith(".tmp"), "what the killed process left is under a temporary name"


@pytest.mark.parametrize("name", [n for n, m in ODD.items() if m.numel()])
def test_what_the_caller_does_to_its_tensor_later_changes_nothing(name: str):
    given = ODD[name].clone()
    masks = MaskSet({name: given})
    before, bits = masks.hash(), masks[name].clone()
    given.logical_not_()
    assert masks.hash() == before
    assert torch.equal(masks[name], bits)
    part = torch.tensor(True)
    masks = MaskSet({name: part.expand(4, 2)})
    part.fill_(False)
    assert masks.count() == 8


def test_masks_that_come_from_a_set_or_from_the_pipeline_take_their_memory_once():
    net = nn.Linear(64, 64)
    masks = select(Selection(score="random", density=0.5, scope="weight"), net, Context(net))
    again = MaskSet({**masks})
    for other in (again, MaskSet(masks), masks.to("cpu")):
        assert other["weight"].data_ptr() == masks["weight"].data_ptr()
    given = draw((5, 7))
    assert MaskSet({"w": given})["w"].data_ptr() != given.data_ptr()


def test_a_drawn_mask_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    copied: list[int] = []
    clone = Tensor.clone

    def counted(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        copied.append(self.numel())
        return clone(self, *args, **kwargs)  # type: ignore[arg-type]

    net = nn.Linear(64, 64)
    monkeypatch.setattr(Tensor, "clone", counted)
    masks = select(Selection(score="magnitude", density=0.5, scope="weight"), net, Context(net))
    assert (~masks & masks | masks) == masks
    MaskSet.from_state(masks.to_state())
    assert not copied
    MaskSet({"w": draw((5, 7))})
    assert copied == [35]
