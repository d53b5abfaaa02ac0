"""Batches of many kinds are split into their examples, or refused."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate
from transformers import BatchEncoding

from lightning_mask.core.criteria.examples import examples

Pair = namedtuple("Pair", ["x", "y"])
X, Y = torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 2])


@dataclasses.dataclass
class Drawn:
    x: Tensor
    name: str
    total: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.total = self.x.sum(1)


def test_every_tensor_gives_each_example_a_slice() -> None:
    batch = {"x": X, "more": (Y, [X, None]), "names": ["a", "b", "c"], "scale": 2.0}
    batch |= {"size": (8, 8, 8), "of": Pair("a", "b"), "ids": Y.numpy(), "factor": Y.numpy().sum()}
    found = examples(batch)
    assert len(found) == 3
    for i, one in enumerate(found):
        assert torch.equal(one["x"], X[i : i + 1])
        assert torch.equal(one["more"][0], Y[i : i + 1])
        assert torch.equal(one["more"][1][0], X[i : i + 1])
        assert isinstance(one["more"], tuple)
        assert (one["more"][1][1], one["names"], one["scale"]) == (None, ["abc"[i]], 2.0)
        assert (one["size"], one["of"], one["ids"].tolist()) == ((8, 8, 8), Pair("a", "b"), [i])
    (_, second, _) = examples(default_collate([(x, name) for x, name in zip(X, "abc", strict=True)]))
    assert list(second[1]) == ["b"]
    assert torch.equal(batch["x"], X), "the batch itself is as it was"
    assert [one.tolist() for one in examples(Y)] == [[0], [1], [2]]


def test_an_example_is_of_the_kind_of_its_batch() -> None:
    (_, second, _) = examples(Pair(X, Y))
    assert isinstance(second, Pair)
    assert second.y.tolist() == [1]
    (_, second, _) = examples(BatchEncoding({"input_ids": X, "labels": Y}))
    assert second.labels.tolist() == [1]
    (_, second, _) = examples(Drawn(X, "all"))
    assert (second.x.tolist(), second.name, second.total.tolist()) == ([[2.0, 3.0]], "all", [5.0])


@pytest.mark.parametrize(
    ("batch", "found"),
    [((X, Y[:2]), "2 and 3"), ({"x": X, "n": torch.tensor(3)}, "0 and 3"), ("text", "none"), (torch.tensor(1.0), "0")],
)
def test_what_has_no_one_number_of_examples_is_refused(batch: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot be split .* is {found}; take score=fisher"):
        examples(batch)
