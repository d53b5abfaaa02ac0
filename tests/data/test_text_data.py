"""Texts become tokens once, and batches as long as they need to be."""

import warnings
from pathlib import Path

import pytest
import torch

from lightning_mask.data import TextData, Texts, TextSplits
from lightning_mask.data.pretrained import load_tokenizer
from lightning_mask.data.tokens import Pad

WORDS = "the cat sat on a mat and then went away because nobody had fed it for days".split()  # noqa: SIM905


def source() -> TextSplits:
    texts = [" ".join(WORDS[: 1 + i % len(WORDS)]) + f" {i}" for i in range(60)]
    labels = [i % 3 for i in range(60)]
    return TextSplits(
        Texts(texts[:40], labels[:40]), Texts(texts[40:50], labels[40:50]), Texts(texts[50:], labels[50:]), list("abc")
    )


def data(folder: Path, **options: object) -> TextData:
    return TextData(source, cache_dir=str(folder), batch_size=8, **options)  # type: ignore[arg-type]


def test_batches_are_what_the_tokenizer_says(tmp_path: Path) -> None:
    texts = data(tmp_path, max_length=12, group_by_length=False)
    texts.prepare_data()
    tokenizer = load_tokenizer("minilm")
    loader = texts.val_dataloader()
    (batch,) = list(loader)
    expected = tokenizer(source().validation.texts, truncation=True, max_length=12, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for name in expected:
        assert batch[name].dtype == torch.int64
        assert torch.equal(batch[name], expected[name])
    assert batch["labels"].tolist() == source().validation.labels
    assert (texts.num_classes, texts.class_names) == (3, ["a", "b", "c"])


def test_batches_are_as_long_as_their_longest_text(tmp_path: Path) -> None:
    lengths = set()
    seen = 0
    for batch in data(tmp_path).train_dataloader():
        assert int(batch["attention_mask"].sum(dim=1).max()) == batch["input_ids"].shape[1]
        lengths.add(batch["input_ids"].shape[1])
        seen += len(batch["labels"])
    assert len(lengths) > 1
    assert seen == 40


def test_padding_on_the_left() -> None:
    examples = [({"input_ids": torch.tensor([5, 6])}, 0), ({"input_ids": torch.tensor([7, 8, 9])}, 1)]
    batch = Pad(1, "left")(examples)
    assert batch["input_ids"].tolist() == [[1, 5, 6], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1]]


def test_tokens_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = data(tmp_path)
    first.prepare_data()
    files = sorted(tmp_path.iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 3
    monkeypatch.setattr("lightning_mask.data.tokens._encode", lambda *_: pytest.fail("tokenised again"))
    second = data(tmp_path)
    second.prepare_data()
    assert torch.equal(second.tokens("train").columns["input_ids"], first.tokens("train").columns["input_ids"])
    monkeypatch.undo()
    other = data(tmp_path, max_length=5)
    other.prepare_data()
    assert int(other.tokens("train").lengths.max()) == 5
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_cache_is_made_anew(tmp_path: Path, damage: str) -> None:
    first = data(tmp_path)
    first.prepare_data()
    whole = {file: file.read_bytes() for file in tmp_path.iterdir()}
    for file, content in whole.items():
        file.write_bytes({"cut": content[:-7], "garbage": b"\0\1garbage" * 9, "empty": b""}[damage])
    second = data(tmp_path)
    with pytest.warns(UserWarning, match=r"cached tokens in .* cannot be used .* made anew"):
        second.prepare_data()
    assert torch.equal(second.tokens("train").columns["input_ids"], first.tokens("train").columns["input_ids"])
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == whole


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("in the way")
    with pytest.warns(UserWarning, match="could not be kept"):
        assert len(data(blocker / "cache").tokens("train")) == 40


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_mask.core.files.os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data(tmp_path).prepare_data()
    assert list(tmp_path.iterdir()) == []


def test_a_subset_is_the_same_each_time(tmp_path: Path) -> None:
    small = data(tmp_path, train_size=9)
    assert sorted(small.splits.train.labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert small.splits == data(tmp_path, train_size=9).splits
    assert small.splits.validation == source().validation


def test_an_unknown_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no model folder '\./nowhere'"):
        data(tmp_path, tokenizer="./nowhere").prepare_data()
    with warnings.catch_warnings(), pytest.raises(ValueError, match="max_length must be at least 3"):
        data(tmp_path, max_length=2)


def test_a_part_of_the_training_set_in_place_of_the_validation_set(tmp_path: Path) -> None:
    held = data(tmp_path, hold_out=10)
    train, validation = held.splits.train.texts, held.splits.validation.texts
    assert len(validation) == held.sizes["validation"] == pytest.approx(10, abs=1)
    assert sorted(train + validation) == sorted(source().train.texts)
    assert held.splits.test == source().test
    assert sum(len(batch["labels"]) for batch in held.val_dataloader()) == len(validation)
    assert data(tmp_path, hold_out=10).splits == held.splits != data(tmp_path, hold_out=10, seed=1).splits
