"""What is no delta, or not of this base, is refused in one line, and the target is as it was."""

import os
from pathlib import Path

import pytest
import torch
from odd_states import odd, read, same, tuned, write
from safetensors.torch import load_file, save_file

from lightning_mask.core import MaskSet
from lightning_mask.delta import Delta, apply, diff, inspect, merge, revert, save_delta


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a base, a delta of it, and a target that is there already."""
    save_delta(tmp_path / "d.safetensors", odd(), tuned(odd()))
    write(odd(), "safetensors", tmp_path).rename(tmp_path / "base.safetensors")
    (tmp_path / "out.safetensors").write_text("precious")
    return tmp_path


def refused(
    place: Path, words: str, base: str = "base.safetensors", delta: str = "d.safetensors", **options: object
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        apply(place / base, place / delta, place / "out.safetensors", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert (place / "out.safetensors").read_text() == "precious"
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_file_of_which_any_byte_is_another_is_refused(place: Path):
    content = (place / "d.safetensors").read_bytes()
    step = max(1, len(content) // 60)
    for at in [*range(0, len(content), step), 0, 7, 8, 9, len(content) - 1]:
        (place / "bad.safetensors").write_bytes(content[:at] + bytes([content[at] ^ 0x11]) + content[at + 1 :])
        with pytest.raises(ValueError, match=r"damaged|is not a delta file") as error:
            inspect(place / "bad.safetensors")
        assert "\n" not in str(error.value)
    refused(place, "damaged", delta="bad.safetensors")


def test_a_file_that_is_cut_short_or_foreign_is_refused(place: Path):
    content = (place / "d.safetensors").read_bytes()
    for size in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        (place / "short.safetensors").write_bytes(content[:size])
        refused(place, "damaged", delta="short.safetensors")
    (place / "long.safetensors").write_bytes(content + b"x")
    refused(place, "damaged", delta="long.safetensors")
    refused(place, "is not a delta file", delta="base.safetensors")
    MaskSet({"w": torch.ones(3, dtype=torch.bool)}).save(place / "masks.safetensors")
    refused(place, "is not a delta file", delta="masks.safetensors")
    (place / "words.safetensors").write_text("words")
    refused(place, "damaged", delta="words.safetensors")
    refused(place, "There is no delta file", delta="nowhere.safetensors")
    refused(place, "There is no checkpoint", base="nowhere.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        Delta.load(place / "short.safetensors")


def test_a_checkpoint_that_is_damaged_or_holds_objects_is_refused(place: Path):
    (place / "short.pt").write_bytes(b"PK\x03\x04 and no more")
    refused(place, "damaged", base="short.pt")
    torch.save(torch.nn.Linear(2, 2), place / "objects.pt")
    refused(place, "objects", base="objects.pt")
    torch.save([1, 2], place / "list.pt")
    refused(place, "is no checkpoint", base="list.pt")
    torch.save({"epoch": 1}, place / "none.pt")
    refused(place, "no tensors by name", base="none.pt")
    header = b'{"w":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[0,2]}}'
    (place / "scales.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"ab")
    refused(
        place, "w is F8_E8M0|damaged", base="scales.safetensors"
    )  # old versions of safetensors do not know it either
    save_file({}, place / "nothing.safetensors")
    refused(place, "holds no tensors", base="nothing.safetensors")
    with pytest.raises(ValueError, match="holds no tensors"):
        diff(place / "nothing.safetensors", place / "nothing.safetensors")
    (place / "empty").mkdir()
    refused(place, "has no weights", base="empty")
    (place / "empty/model.safetensors.index.json").write_text('{"weight_map": {"a": "../base.safetensors"}}')
    refused(place, "outside of the folder", base="empty")


def test_another_base_is_refused_unless_forced(place: Path):
    other = odd()
    other["body.still"][3] += 1  # which the delta does not touch
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, place / "other.safetensors")
    refused(place, r"1 of 15 tensors differ, the first is body.still", base="other.safetensors")
    apply(place / "other.safetensors", place / "d.safetensors", place / "forced.safetensors", force=True)
    forced = load_file(place / "forced.safetensors")
    assert torch.equal(forced["head.weight"], tuned(odd())["head.weight"])
    assert torch.equal(forced["body.still"], other["body.still"])

    signs = odd()
    signs["body.odd"][4] = -0.0  # equal as a number, not in its bits
    save_file({name: tensor.contiguous() for name, tensor in signs.items()}, place / "signs.safetensors")
    refused(place, "the first is body.odd", base="signs.safetensors")


def test_another_model_is_refused_even_if_forced(place: Path):
    for name, change, words in (
        ("body.weight", None, "has no tensor 'body.weight'"),
        ("body.weight", torch.zeros(40, 31), r"body.weight is F32 \(40, 31\) there, and F32 \(40, 30\)"),
        ("body.half", torch.zeros(5, 3, 2), "body.half is F32"),
    ):
        other = odd() | ({name: change} if change is not None else {})
        if change is None:
            del other[name]
        save_file({n: tensor.contiguous() for n, tensor in other.items()}, place / "other.safetensors")
        refused(place, words, base="other.safetensors", force=True)
    save_file({"x": torch.zeros(2)}, place / "other.safetensors")
    refused(place, "none of the delta's tensors is there", base="other.safetensors", force=True)


def test_what_is_not_the_base_with_the_delta_is_not_reverted(place: Path):
    apply(place / "base.safetensors", place / "d.safetensors", place / "tuned.safetensors")

    def cannot(
        words: str, tuned_file: str = "tuned.safetensors", delta: str = "d.safetensors", base: str | None = None
    ) -> None:
        with pytest.raises(ValueError, match=words) as error:
            revert(place / tuned_file, place / delta, place / "out.safetensors", base=place / base if base else None)
        assert "\n" not in str(error.value)
        assert (place / "out.safetensors").read_text() == "precious"

    cannot(r"has no originals: give the base .*\(base, --base\), or .* \(originals=True, --originals\)")
    cannot("does not have the values of", tuned_file="base.safetensors", base="base.safetensors")
    further = load_file(place / "tuned.safetensors")
    further["body.still"][0] += 1
    save_file(further, place / "further.safetensors")
    cannot("body.still differs", tuned_file="further.safetensors", base="base.safetensors")
    cannot("is not the base that the delta was made from", base="tuned.safetensors")
    revert(
        place / "further.safetensors",
        place / "d.safetensors",
        place / "b.st",
        base=place / "base.safetensors",
        force=True,
    )


def test_what_is_in_the_way_is_left_alone(place: Path):
    base = write(odd(), "folder", place / "hf_base")
    (place / "mine").mkdir()
    (place / "mine/thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="is not empty"):
        apply(base, place / "d.safetensors", place / "mine")
    assert (place / "mine/thesis.txt").read_text() == "precious"
    with pytest.raises(ValueError, match=r"out.safetensors is a file"):
        apply(base, place / "d.safetensors", place / "out.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        apply(place / "base.safetensors", place / "d.safetensors", place / "mine")
    before = sorted(base.rglob("*"))
    with pytest.raises(ValueError, match="lies in the folder"):
        apply(base, place / "d.safetensors", base / "deep/tuned")
    assert sorted(base.rglob("*")) == before


def test_a_folder_that_is_replaced_is_there_however_that_is_stopped(place: Path, monkeypatch: pytest.MonkeyPatch):
    base = write(odd(), "folder", place / "hf_base")
    replace, targets = os.replace, []

    def stopped(source: Path, target: Path) -> None:
        targets.append(target)
        if len(targets) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        apply(base, place / "d.safetensors", base)
    assert same(read(base), {name: tensor.contiguous() for name, tensor in odd().items()})
    assert [path.name for path in base.parent.iterdir()] == ["hf"]


def test_a_delta_is_not_made_of_what_does_not_go_together(place: Path):
    target = place / "out.safetensors"

    def cannot(words: str, base: object, after: object, masks: MaskSet | None = None) -> None:
        with pytest.raises(ValueError, match=words):
            save_delta(target, base, after, masks)  # type: ignore[arg-type]
        assert target.read_text() == "precious"

    base = {"net.w": torch.zeros(4, 3), "net.v": torch.zeros(2)}
    after = {"net.w": torch.ones(4, 3), "net.v": torch.zeros(2)}
    cannot(r"net.w is F32 \(3, 4\)", base, {"net.w": torch.ones(3, 4), "net.v": torch.zeros(2)})
    cannot("net.w is F16", base, {"net.w": torch.ones(4, 3).half(), "net.v": torch.zeros(2)})
    held = MaskSet({"net.w": torch.eye(4, 3).bool(), "net.v": torch.zeros(2).bool()})
    cannot("net.w: 9 entries changed that the masks hold", base, after, held)
    cannot("masks are of another model: .* has no 'other'", base, after, MaskSet({"other": torch.ones(2).bool()}))
    cannot("masks are of another model: that of net.v", base, after, MaskSet({"net.v": torch.ones(3).bool()}))
    cannot("no tensors by name", base, {})
    cannot("which safetensors cannot hold", base, {"net.w": torch.ones(2, dtype=torch.complex128)})


def test_checkpoints_without_a_common_name_are_not_compared(place: Path):
    save_file({"x": torch.zeros(2)}, place / "other.safetensors")
    with pytest.raises(ValueError, match="different models"):
        diff(place / "base.safetensors", place / "other.safetensors")
    with pytest.raises(ValueError, match="two or more"):
        merge([place / "d.safetensors"], place / "m.safetensors")
