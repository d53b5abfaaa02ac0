"""How a budget is shared: against counts made by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mask.core import allocation
from lightning_mask.core.allocation import Budget, share

SHAPES = {"a": (4, 5), "b": (3, 2, 2), "c": (7,), "d": (10, 10)}
SIZES = {name: math.prod(shape) for name, shape in SHAPES.items()}


def test_a_share_rounds_half_up():
    assert [share(f, 10) for f in (0.0, 0.04, 0.05, 0.25, 0.35, 1.0)] == [0, 0, 1, 3, 4, 10]


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (Budget(0.25), 35),  # floor(34.75 + 0.5)
        (Budget(0.25, removed=True), 139 - 35),
        (Budget(1), 1),  # one entry
        (Budget(1.0), 139),  # all of them
        (Budget(139), 139),
        (Budget(0.0, removed=True), 139),
    ],
)
def test_global_is_one_group_over_the_whole_scope(budget: Budget, kept: int):
    assert allocation.get("global")(SHAPES, budget) == [(["a", "b", "c", "d"], kept)]


def test_uniform_gives_each_tensor_its_own_share():
    groups = allocation.get("uniform")(SHAPES, Budget(0.25))
    assert groups == [(["a"], 5), (["b"], 3), (["c"], 2), (["d"], 25)]
    pruned = allocation.get("uniform")(SHAPES, Budget(0.25, removed=True))
    assert pruned == [(["a"], 15), (["b"], 9), (["c"], 5), (["d"], 75)]


def test_uniform_with_a_number_is_rounded_in_proportion():
    # 50 of 139: shares 7.19, 4.32, 2.52, 35.97, which round to 50
    assert allocation.get("uniform")(SHAPES, Budget(50)) == [(["a"], 7), (["b"], 4), (["c"], 3), (["d"], 36)]


def test_erk_by_hand():
    # (4, 5): raw density 9/20, (10, 10): 20/100, so the entries kept are in the ratio 9 : 20; of 58 they get 18 and 40
    shapes = {"a": (4, 5), "d": (10, 10)}
    assert allocation.get("erk")(shapes, Budget(58)) == [(["a"], 18), (["d"], 40)]
    # of 87 the first would get 27 of its 20: it is kept whole, and the other gets 67
    assert allocation.get("erk")(shapes, Budget(87)) == [(["a"], 20), (["d"], 67)]
    # of three tensors the ratio is 9 : 20 : 30; of 180 the first is kept whole, and 160 are shared 20 : 30
    three = {**shapes, "e": (10, 20)}
    assert allocation.get("erk")(three, Budget(180)) == [(["a"], 20), (["d"], 64), (["e"], 96)]
    # a convolution counts its kernel: (3, 2, 2): 7/12; a vector of 7: 7/7; in the ratio 7 : 7
    assert allocation.get("erk")({"b": (3, 2, 2), "c": (7,)}, Budget(6)) == [(["b"], 3), (["c"], 3)]
    # 29 * 0.5 = 14.5 -> 15 of 29: 9 : 20 of 15 is 4.66 and 10.34
    assert allocation.get("erk")(shapes, Budget(15)) == [(["a"], 5), (["d"], 10)]


def test_row_keeps_as_many_entries_of_each_row():
    # widths 5, 4, 7 (a vector is one row), 10: a quarter is 1, 1, 2 and 3 of a row
    groups = allocation.get("row")(SHAPES, Budget(0.25))
    assert groups == [(["a"], 4), (["b"], 3), (["c"], 2), (["d"], 30)]
    pruned = allocation.get("row")(SHAPES, Budget(0.25, removed=True))
    assert pruned == [(["a"], 16), (["b"], 9), (["c"], 5), (["d"], 70)]
    # a number is dealt out to 4 + 3 + 1 + 10 rows: 36 is two each; 40 leaves 4 over, of which the shares are 0.89, 0.67,
    # 0.22 and 2.22: one to each of a, b, d for their remainders once the floors have given d two
    assert allocation.get("row")(SHAPES, Budget(36)) == [(["a"], 8), (["b"], 6), (["c"], 2), (["d"], 20)]
    assert allocation.get("row")(SHAPES, Budget(40)) == [(["a"], 9), (["b"], 7), (["c"], 2), (["d"], 22)]
    # 90 is five each, which the rows of b do not have: 12 are of b, and the other 78 are shared by 15 rows: 5.2 each; those of
    # a have five, and what is left, 58, is shared by 11 rows
    assert allocation.get("row")(SHAPES, Budget(90)) == [(["a"], 20), (["b"], 12), (["c"], 5), (["d"], 53)]


@given(
    st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=6),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_counts_add_up_exactly_and_fit(shapes: list[list[int]], fraction: float, removed: bool, as_number: bool):
    named = {f"t{i}": tuple(shape) for i, shape in enumerate(shapes)}
    sizes = {name: math.prod(shape) for name, shape in named.items()}
    n = sum(sizes.values())
    budget = Budget(share(fraction, n) if as_number else fraction, removed)
    for name, allocate in allocation.ALLOCATIONS.items():
        groups = allocate(named, budget)
        assert sorted(x for names, _ in groups for x in names) == sorted(named)
        assert all(0 <= kept <= sum(sizes[x] for x in names) for names, kept in groups), (name, groups)
        if name not in ("uniform", "row") or as_number:
            assert sum(kept for _, kept in groups) == budget.keep(n), name


def test_a_larger_budget_gives_no_tensor_less():
    # rounded by largest remainders, b would get 1 of 32 entries and 2 of 60
    shapes = {"a": (25, 5), "b": (1, 2), "c": (20, 20), "d": (5, 21), "e": (11, 4)}
    for name in ("erk", "uniform", "row"):
        before = dict.fromkeys(shapes, 0)
        for total in range(sum(math.prod(s) for s in shapes.values()) + 1):
            counts = {names[0]: kept for names, kept in allocation.get(name)(shapes, Budget(total))}
            assert sum(counts.values()) == total
            assert all(counts[n] >= before[n] for n in shapes), (name, total)
            before = counts


def test_more_entries_than_there_are_is_refused():
    for name in allocation.ALLOCATIONS:
        with pytest.raises(ValueError, match="140 entries were asked for and the scope has 139"):
            allocation.get(name)(SHAPES, Budget(140))
    with pytest.raises(ValueError, match=r"'erc' is unknown; there are erk, global, row, uniform"):
        allocation.get("erc")
