"""Random masks are uniformly random subsets of the size that the allocation says, the same on every machine."""

from collections import Counter
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mask.core import allocation
from lightning_mask.core.allocation import Budget
from lightning_mask.core.criteria import Context
from lightning_mask.core.draw import draw_entries, random_subset
from lightning_mask.core.selection import Selection, select

SHAPES: dict[str, tuple[int, ...]] = {"a": (30, 20), "none": (0, 4), "scalar": (), "b": (100,), "c": (10, 2, 3, 3)}


@given(st.data())
@settings(deadline=None, derandomize=True)
def test_exactly_k_of_n(data: st.DataObject):
    n = data.draw(st.integers(0, 300))
    k = data.draw(st.integers(0, n))
    drawn = random_subset(n, k, data.draw(st.integers(0, 2**63 - 1)))
    assert (len(drawn), int(drawn.sum())) == (n, k)


@pytest.mark.parametrize(("n", "k"), [(5, 2), (5, 3), (6, 3), (7, 6), (4, 1)])
def test_every_subset_is_as_likely(n: int, k: int):
    times = 600 * comb(n, k)
    seen = Counter(tuple(random_subset(n, k, seed).tolist()) for seed in range(times))
    assert len(seen) == comb(n, k)
    deviation = sum((count - 600) ** 2 / 600 for count in seen.values())  # chi-squared
    assert deviation < 2.5 * comb(n, k) + 10, seen


def test_more_than_one_round_of_numbers_at_once(monkeypatch: pytest.MonkeyPatch):
    whole = random_subset(1000, 400, 3)
    monkeypatch.setattr("lightning_mask.core.draw._AT_ONCE", 7)
    assert (random_subset(1000, 400, 3) == whole).all(), "how many numbers are made at once does not change them"


def test_the_same_on_every_machine():
    masks = draw_entries({"x": (2, 3), "y": (5,)}, Budget(4), "global", seed=0)
    written_down = {"x": [[0, 0, 0], [1, 0, 0]], "y": [0, 0, 1, 1, 1]}
    assert {name: mask.int().tolist() for name, mask in masks.items()} == written_down


@pytest.mark.parametrize("density", [1, 37, 0.001, 0.05, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("name", ["global", "uniform", "erk"])
def test_as_many_of_each_group_as_the_allocation_says(name: str, density: float | int):
    masks = draw_entries(SHAPES, Budget(density), name, seed=1)
    assert {n: tuple(mask.shape) for n, mask in masks.items()} == SHAPES
    assert list(masks) == list(SHAPES)
    for names, keep in allocation.get(name)(SHAPES, Budget(density)):
        assert sum(int(masks[n].sum()) for n in names) == keep


def test_masks_of_other_seeds_and_tensors_are_independent():
    shapes = {"a": (300, 300), "b": (300, 300)}
    one, other = (draw_entries(shapes, Budget(0.1), "uniform", seed) for seed in (0, 1))
    for x, y in [(one["a"], other["a"]), (one["b"], other["b"]), (one["a"], one["b"]), (one["a"], other["b"])]:
        assert 700 < int((x & y).sum()) < 1100, "a tenth of a tenth of 90,000, give or take 7 standard deviations"


def test_a_selection_draws_these_entries():
    model = torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.Linear(8, 2))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith("0.")}
    for share in ("global", "uniform", "erk"):
        selection = Selection("1", "random", 0.3, seed=5, allocation=share)
        masks = select(selection, model, Context(model, seed=9))
        drawn = draw_entries(shapes, Budget(0.3), share, seed=5)
        assert all(torch.equal(masks[name], mask) for name, mask in drawn.items())
        assert masks["1.weight"].all()
