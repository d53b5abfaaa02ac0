"""What is chosen as one: against counting entry by entry in plain Python."""

import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_nets import Net, selected
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mask.core import MaskSet, Selection, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose

# Any structure: the masks are those of a computation entry by entry.


def unit_of(structure: str, net: Net, name: str, shape: tuple[int, ...], at: tuple[int, ...]) -> tuple[Any, ...]:
    """Which unit the entry at ``at`` is of, as something that sorts in the order of units: group first, then number."""
    order = [n for n, _ in net.named_parameters()].index(name)
    if structure == "entry":
        return (order, *at)
    if structure == "row":
        return (order, at[0] if at else 0)
    if structure == "column":
        return (order, at[1] if len(at) > 1 else sum(at))
    if structure == "tensor":
        return (order,)
    if structure.startswith("block:"):
        rows, columns = map(int, structure[6:].split("x"))
        flat = 0
        for place, size in zip(at[1:], shape[1:], strict=True):
            flat = flat * size + place
        return (order, (at[0] if at else 0) // rows, flat // columns)
    if structure == "layer":
        owner = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.rpartition(".")[0]
        return (next(i for i, (n, _) in enumerate(net.named_parameters()) if n.startswith(owner)), owner)
    config, kind = net.config, name.split(".")[-2]
    head = at[1 if kind == "o_proj" else 0] // config.head_dim
    apart = kind in ("k_proj", "v_proj") and config.num_key_value_heads != config.num_attention_heads
    return (int(name.split(".")[1]), apart, head)


def by_counting(
    structure: str, net: Net, scores: dict[str, Tensor], budgets: list[tuple[list[str], Budget]], uniform: bool
) -> dict[str, set[tuple[int, ...]]]:
    members: dict[tuple[Any, ...], list[tuple[str, tuple[int, ...]]]] = {}
    for name, score in scores.items():
        shape = tuple(score.shape)
        for at in product(*map(range, shape)):
            members.setdefault(unit_of(structure, net, name, shape, at), []).append((name, at))
    active: dict[str, set[tuple[int, ...]]] = {name: set() for name in scores}
    for names, budget in budgets:
        parts: list[tuple[set[str], int]] = [(set(names), budget.keep(sum(scores[n].numel() for n in names)))]
        if uniform:  # per tensor; those that share units are one part
            parts = []
            for name in names:
                mine = {n for unit in members.values() if any(m == name for m, _ in unit) for n, _ in unit} | {name}
                linked = [part for part in parts if part[0] & mine]
                parts = [part for part in parts if not part[0] & mine]
                kept = budget.keep(scores[name].numel()) + sum(k for _, k in linked)
                parts.append((mine.union(*(p for p, _ in linked)), kept))
        for together, keep in parts:
            units = {key: unit for key, unit in members.items() if unit[0][0] in together}
            worth = {k: Fraction(int(sum(scores[n][at] for n, at in u)), len(u)) for k, u in units.items()}
            ranked = sorted(units, key=lambda key: (-worth[key], key))
            sizes = [0]
            for key in ranked:
                sizes.append(sizes[-1] + len(units[key]))
            count = min(range(len(sizes)), key=lambda i: abs(sizes[i] - keep))
            for key in ranked[: max(count, min(keep, 1))]:
                for name, at in units[key]:
                    active[name].add(at)
    return active


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, Net, dict[str, Tensor], list[tuple[list[str], Budget]], str]:
    structure = draw(st.sampled_from(["entry", "row", "column", "tensor", "layer", "head", "block:1x1", "block:2x3"]))
    heads = draw(st.integers(1, 3))
    shared = draw(st.sampled_from([heads, 1]))
    net = Net(heads, shared, draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.booleans()))
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    if structure == "head":
        shapes = {name: shape for name, shape in shapes.items() if "attention" in name}
    if structure == "block:2x3":
        fits = lambda s: bool(s) and s[0] % 2 == 0 and (len(s) == 1 or math.prod(s[1:]) % 3 == 0)  # noqa: E731
        shapes = {name: shape for name, shape in shapes.items() if fits(shape)} or {"stem.weight": (4, 6)}
    names = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True))
    names = [name for name in shapes if name in names]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    scores = {name: torch.randint(-2, 3, shapes[name], generator=generator).float() for name in names}
    parts = [names]
    if structure not in ("head", "layer") and draw(st.booleans()) and len(names) > 1:
        parts = [names[::2], names[1::2]]
    elif structure == "layer" and draw(st.booleans()):
        parts = [[n for n in names if n.startswith("layers.0")], [n for n in names if not n.startswith("layers.0")]]
    budgets = []
    for part in parts:
        n = sum(scores[name].numel() for name in part)
        share = st.sampled_from([i / 20 for i in range(1, 21)])
        amount = draw(st.one_of(share, st.integers(1, max(n, 1)))) if n else 1.0
        budgets.append((part, Budget(amount, removed=draw(st.booleans()))))
    uniform = structure not in ("tensor", "layer") and draw(st.booleans())
    if uniform:  # a number of entries goes by largest remainders, which has its own tests
        budgets = [(p, Budget(1 / b.amount if isinstance(b.amount, int) else b.amount, b.removed)) for p, b in budgets]
    return structure, net, scores, budgets, "uniform" if uniform else "global"


@given(cases())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_units_are_chosen_as_counting_says(
    case: tuple[str, Net, dict[str, Tensor], list[tuple[list[str], Budget]], str],
):
    structure, net, scores, budgets, allocation = case
    masks = choose(scores, budgets, structure, allocation, net)
    assert {n: m.shape for n, m in masks.items()} == {n: s.shape for n, s in scores.items()}
    expected = by_counting(structure, net, scores, budgets, allocation == "uniform")
    for name, mask in masks.items():
        found = {at for at in product(*map(range, mask.shape)) if bool(mask[at])}
        assert found == expected[name], (structure, name, budgets)


@given(
    st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=4),
    st.one_of(st.floats(0.01, 1), st.integers(1, 30)),
    st.integers(0, 99),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_best_inputs_of_each_row(shapes: list[list[int]], amount: float | int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"{i}": torch.randint(-2, 3, shape, generator=generator).half() for i, shape in enumerate(shapes)}
    total = sum(score.numel() for score in scores.values())
    if isinstance(amount, int) and amount > total:
        amount = 1.0
    masks = choose(scores, [(list(scores), Budget(amount))], "entry", "row")
    counts = []
    for name, score in scores.items():
        lines = score.reshape(score.shape[0] if score.dim() > 1 else 1, -1) if score.numel() else score.view(0, 1)
        for line, mask in zip(lines.tolist(), masks[name].reshape(lines.shape).tolist(), strict=True):
            best = sorted(range(len(line)), key=lambda i: (-line[i], i))[: sum(mask)]
            assert {i for i, kept in enumerate(mask) if kept} == set(best)
            counts.append((sum(mask), len(line)))
    if isinstance(amount, float):
        assert all(kept == math.floor(amount * width + 0.5) for kept, width in counts)
    else:
        assert sum(kept for kept, _ in counts) == amount
        free = [kept for kept, width in counts if kept < width]
        assert not free or all(kept <= width and kept >= max(free) - 1 for kept, width in counts if kept < width)


def test_the_nearest_number_of_whole_units():
    score = {"w": torch.arange(12.0).view(4, 3)}
    counts = [int(choose(score, [(["w"], Budget(n))], "row", "global")["w"].any(1).sum()) for n in range(13)]
    assert counts == [0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
    even = {"w": torch.arange(8.0).view(4, 2)}
    counts = [int(choose(even, [(["w"], Budget(n))], "row", "global")["w"].any(1).sum()) for n in range(9)]
    assert counts == [0, 1, 1, 1, 2, 2, 3, 3, 4], "the fewer of two numbers that come as near"


def test_long_rows_are_ranked_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    score = torch.randint(9, (7, 50), generator=torch.Generator().manual_seed(0))
    at_once = choose({"w": score}, [(["w"], Budget(0.2))], "entry", "row")["w"]
    monkeypatch.setattr("lightning_mask.core.choosing._AT_ONCE", 100)
    assert torch.equal(choose({"w": score}, [(["w"], Budget(0.2))], "entry", "row")["w"], at_once)
    assert at_once.sum(1).tolist() == [10] * 7


# From a selection.


def test_random_layers():
    net = Net(1, 1, 2, 3, bias=True)
    masks = selected(Selection(None, "random", 0.5, scope="layers.*", structure="layer", seed=1), net)
    active = [i for i in range(2) if all(masks[n].all() for n in masks if n.startswith(f"layers.{i}."))]
    assert len(active) == 1
    assert masks.count() == sum(p.numel() for p in net.layers[0].parameters())
    assert masks["layers.0.mlp.bias"].stride() == (0,), "a mask of a whole tensor takes one byte"
    again = [Selection(None, "random", 0.5, scope="layers.*", structure="layer", seed=seed) for seed in range(8)]
    assert len({selected(selection, net).hash() for selection in again}) == 2


def test_a_random_unit_is_as_likely_whatever_its_size():
    net = nn.Sequential(nn.Linear(40, 5), nn.Linear(5, 2))  # 7 rows and 7 entries of biases
    scope = dict.fromkeys(("0.weight", "1.weight", "0.bias", "1.bias"), 0)
    for seed in range(300):
        masks = selected(Selection(None, "random", 1, structure="row", seed=seed), net)
        for name in scope:
            scope[name] += int(masks[name].any())
    expected = {"0.weight": 5 / 14, "1.weight": 2 / 14, "0.bias": 5 / 14, "1.bias": 2 / 14}
    assert all(abs(scope[name] / 300 - share) < 0.11 for name, share in expected.items()), "within four deviations"


def test_outside_of_blocks_a_module_is_a_unit():
    net = Net(1, 1, 2, 3, bias=True)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    groups = structures.get("layer")(shapes, net)
    owners = [sorted(group) for group in groups]
    assert owners[:2] == [["scale"], ["stem.bias", "stem.weight"]]
    assert owners[-1] == ["out.bias", "out.weight"]
    assert len(owners) == 5


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        (
            lambda: Selection(None, "magnitude", 0.5, scope="stem", structure="block:2x2"),
            r"structure='block:2x2': stem.weight of shape \(3, 2, 2, 2\), 3 x 8, is not divisible into blocks of 2 x 2",
        ),
        (
            lambda: Selection(None, "magnitude", 0.5, scope="out.weight", structure="block:3x3"),
            r"3 x 5, is not divisible",
        ),
        (lambda: Selection(None, "magnitude", 0.5, scope="out.bias", structure="block:2x1"), r"a vector of 3 entries"),
        (
            lambda: Selection(None, "magnitude", 0.5, scope=["layers.*", "stem"], structure="head"),
            r"stem.weight has no attention heads; .* layers.\*.attention.q_proj.weight, layers.\*.attention.q_proj.bias",
        ),
        (
            lambda: Selection(None, "magnitude", 0.5, structure="block:0x2"),
            r"structure='block:0x2' is unknown; .*block:RxC",
        ),
        (
            lambda: Selection(None, "magnitude", 0.5, structure="row", allocation="row"),
            r"allocation='row' takes single",
        ),
        (
            lambda: Selection(None, "magnitude", 0.5, structure="layer", allocation="erk"),
            r"leave allocation at 'global'",
        ),
        (
            lambda: Selection(None, "magnitude", 0.01, scope="layers.*", allocation="row"),
            r"of any row of the .* is not one",
        ),
        (lambda: Selection(None, "magnitude", {}), r"density=\{\} must be"),
        (lambda: Selection(None, "magnitude", {"out": 1.5}), r"density=1.5 must be"),
        (lambda: Selection(None, "magnitude", {"out": {"x": 1}}), r"for each pattern"),
        (lambda: Selection(None, "magnitude", {"": 0.5}), r"non-empty string"),
        (lambda: Selection(None, "magnitude", {"outt": 0.5}), r"density: the pattern 'outt' matches no parameter"),
        (
            lambda: Selection(None, "magnitude", {"out": 0.5}, scope="stem"),
            r"density: the pattern 'out' names no tensor",
        ),
        (
            lambda: Selection(None, "magnitude", {"*.bias": 0.5, "out.bias": 1}),
            r"pattern 'out.bias' names no tensor in",
        ),
        (lambda: Selection(None, "magnitude", {"out": 19}), r"density: the pattern 'out' asks for 19 of 18 entries"),
        (lambda: Selection(None, "magnitude", {"out": 0.01}), r"asks for 0.01 of 18 entries, which is not one"),
        (
            lambda: Selection(None, "magnitude", {"*.q_proj": 0.5, "*.k_proj": 0.1}, structure="head"),
            r"density: layers.0.attention.q_proj.weight and layers.0.attention.k_proj.weight share units",
        ),
    ],
)
def test_bad_structures_and_densities_are_refused_before_training(selection: Callable[[], Selection], says: str):
    with pytest.raises(ValueError, match=says):
        selection().check(Net(2, 2, 3, 5, bias=True))


# A density for each pattern.


def test_each_pattern_has_its_own_budget_and_the_first_that_matches_counts():
    net = Net(2, 2, 3, 5, bias=True)
    selection = Selection("stem", "magnitude", {"*.bias": 1.0, "layers.0": 0.25, "out": 7})
    masks = selected(selection, net)
    assert all(mask.all() for name, mask in masks.items() if name.endswith(".bias"))
    weights = [name for name in masks if name.startswith("layers.0") and name.endswith("weight")]
    entries = sum(masks[name].numel() for name in weights)
    assert sum(int(masks[name].sum()) for name in weights) == math.floor(entries / 4 + 0.5)
    assert int(masks["out.weight"].sum()) == 7
    held = [name for name in masks if name.startswith("layers.1") and name.endswith("weight")]
    assert not any(masks[name].any() for name in [*held, "scale"]), "what no pattern names is held"
    assert set(selection.scope_names(net)) & set(held) == set(), "and not ranked either"
    assert json.loads(json.dumps(masks.recipe)) == masks.recipe


def test_the_allocation_applies_inside_each_pattern():
    net = Net(2, 2, 3, 5, bias=True)
    density = {"layers.0": 0.5, "layers.1": 0.2}
    masks = selected(Selection(None, "magnitude", density, allocation="uniform"), net)
    for name, mask in masks.items():
        share = density.get(name[:8], 0.0)
        assert int(mask.sum()) == math.floor(share * mask.numel() + 0.5), name
    masks = selected(Selection(None, "magnitude", density, allocation="row"), net)
    assert masks["layers.0.attention.q_proj.weight"].sum(1).tolist() == [3] * 6
    assert masks["layers.1.attention.q_proj.weight"].sum(1).tolist() == [1] * 6


def regenerable() -> Iterator[Selection]:
    for allocation in ("global", "uniform", "erk", "row"):
        yield Selection("out", "random", 0.1, allocation=allocation, seed=3)
        yield Selection("out", "random", {"*.bias": 0.5, "layers.*.weight": 30}, allocation=allocation, seed=3)
    for structure in ("row", "column", "block:1x1"):
        yield Selection("out", "random", {"*.bias": 0.5, "layers.*": 0.1}, structure=structure, seed=3)


def test_the_file_of_a_random_mask_is_its_recipe(tmp_path: Path):
    net = nn.Sequential()
    net.layers = nn.ModuleList([nn.Sequential(nn.Linear(60, 50), nn.Linear(50, 60)) for _ in range(3)])
    net.out = nn.Linear(60, 2)
    for i, selection in enumerate(regenerable()):
        masks = selected(selection, net)
        masks.save(tmp_path / f"{i}")
        assert MaskSet.load(tmp_path / f"{i}") == masks
        assert (tmp_path / f"{i}").stat().st_size < 3000, selection
    for structure in ("head", "layer"):  # not from the shapes alone: its bits are kept
        attention = Net(2, 2, 3, 5, bias=True)
        masks = selected(Selection("out", "random", 0.3, structure=structure, seed=3), attention)
        masks.save(tmp_path / structure)
        assert MaskSet.load(tmp_path / structure) == masks
        assert 0 < masks.density() < 1
