"""Criteria of a user: what may be one, by which name it is found, and what it may not return."""

import dataclasses
import functools
import importlib
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from linear_unit import BATCHES, context, run, unit
from torch import Tensor, nn

from lightning_mask import criterion
from lightning_mask.core import Context, criteria
from lightning_mask.core.criteria import CRITERIA, compute, get


@pytest.mark.usefixtures("registry")
def test_functions_and_objects_of_all_kinds_are_criteria():
    def doubled(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        @functools.wraps(function)
        def called(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
            return function(params, context, 2)

        return called

    @doubled
    def wrapped(params: Mapping[str, Tensor], context: Context, power: int) -> dict[str, Tensor]:
        return far(params, context, power)

    @dataclasses.dataclass
    class Unhashable:
        power: int

        def __call__(self, params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
            return far(params, context, self.power)

    @criterion("to_the_power")
    def to_the_power(params: Mapping[str, Tensor], context: Context, power: int) -> dict[str, Tensor]:
        return far(params, context, power)

    model = unit()
    for score in (wrapped, Unhashable(2), functools.partial(to_the_power, power=2), functools.partial(Unhashable(2))):
        criteria.require(score, ["weight"], model)
        assert compute(score, {"weight": model.weight}, Context(model))["weight"].tolist() == [[4.0, 1.0]]
    with pytest.raises(ValueError, match="to_the_power cannot be called with params and context alone"):
        get("to_the_power")


@pytest.mark.usefixtures("registry")
def test_a_criterion_says_before_training_what_it_cannot_score():
    def check(names: Sequence[str], model: nn.Module) -> None:
        raise ValueError(f"not {names} of {type(model).__name__}")

    @criterion("never", check=check)
    def never(params: Mapping[str, Tensor], context: Context, power: int = 1) -> dict[str, Tensor]:
        return far(params, context, power)

    for score in ("never", never, functools.partial(never, power=2)):
        with pytest.raises(ValueError, match=r"not \['weight'\] of Linear"):
            criteria.require(score, ["weight"], unit())
    for score in ("last_layers", "first_layers"):
        with pytest.raises(ValueError, match="Linear has no repeated blocks"):
            criteria.require(score, ["weight"], unit())
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"The layer of out_proj\.weight was not run"):
        criteria.require("wanda", ["out_proj.weight"], attention)


def test_nan_is_refused_by_name():
    model = unit()
    bad = [(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0.0]]))]
    with pytest.raises(ValueError, match="'fisher' gave nan for weight"):
        run("fisher", model, batches=bad)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"weight": torch.zeros(1, 2)}, "no score for bias"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(1)}, r"shape \(2,\) for weight of \(1, 2\)"),
        ({"weight": torch.full((1, 2), torch.nan), "bias": torch.zeros(1)}, "gave nan for weight"),
        (None, "returned NoneType; it must return a dict of names to tensors"),
        ({"weight": [[1.0, 2.0]], "bias": torch.zeros(1)}, "returned list for weight; it must be a tensor of real"),
        ({"weight": torch.ones(1, 2) * 1j, "bias": torch.zeros(1)}, "returned torch.complex64 for weight"),
    ],
)
def test_what_a_criterion_may_not_return(returned: dict[str, Tensor], says: str):
    model = unit()

    def mine(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return returned

    with pytest.raises(ValueError, match="'mine'") as error:
        compute(mine, dict(model.named_parameters()), context(model))
    error.match(says)


def test_scores_that_tell_nothing_apart_are_warned_of():
    model = unit()
    weight = {"weight": model.weight}
    with pytest.warns(UserWarning, match="'change' scored every entry 0, so the first entries are taken.* refresh="):
        compute("change", weight, context(model, reference=weight))
    with pytest.warns(UserWarning, match="'grad_variance' scored every entry 0"):
        compute("grad_variance", weight, context(model, BATCHES[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute("change", weight, context(model, reference={"weight": torch.tensor([[2.0, 1.0]])}))
        compute("magnitude", {"weight": torch.zeros(1, 2)}, Context(model))  # as with depths, which may all be 0


def test_without_data_loss_or_reference_it_says_so():
    model = unit()
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match="needs training batches"):
        compute("fisher", params, Context(model))
    with pytest.raises(ValueError, match="needs a loss"):
        compute("fisher", params, Context(model, batches=lambda: [1]))
    with pytest.raises(ValueError, match="gave none"):
        compute("fisher", params, context(model, []))
    with pytest.raises(ValueError, match="from the start of training"):
        _ = Context(model).reference


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


@pytest.mark.usefixtures("registry")
def test_a_criterion_of_ones_own():
    @criterion("last_minus_first")
    def last_minus_first(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return {name: (p - context.reference[name]).abs() for name, p in params.items()}

    model = unit()
    reference = {"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.tensor([0.0])}
    scores = run("last_minus_first", model, reference=reference)
    assert scores["weight"].tolist() == [[1.0, 2.0]]
    assert scores["bias"].tolist() == [0.5]
    assert not scores["weight"].requires_grad
    with pytest.raises(ValueError, match="named 'magnitude' exists already"):
        criterion("magnitude")(last_minus_first)
    assert criterion("last_minus_first")(last_minus_first) is last_minus_first, "a module loaded again"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'fischer' is unknown; did you mean 'fisher'\?.*@criterion"):
        run("fischer", unit())
    with pytest.raises(ValueError, match="name of a criterion or a function"):
        compute(3, {}, Context(unit()))  # type: ignore[arg-type]


def test_a_criterion_in_a_file_of_the_user_is_found_by_its_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_criteria.py").write_text(
        "def smallest(params, context):\n    return {n: -p.abs() for n, p in params.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = get("my_criteria.smallest")
    w = torch.tensor([1.0, -2.0])
    assert torch.equal(function({"w": w}, Context(nn.Linear(1, 1)))["w"], torch.tensor([-1.0, -2.0]))
    with pytest.raises(ValueError, match=r"score='my_criteria.largest' cannot be imported"):
        get("my_criteria.largest")
    with pytest.raises(ValueError, match=r"score='nowhere.smallest' cannot be imported"):
        get("nowhere.smallest")
    (tmp_path / "my_criteria.py").write_text("def alone(params):\n    return params\n")
    importlib.reload(sys.modules["my_criteria"])
    with pytest.raises(ValueError, match=r"alone cannot be called with params and context alone .* takes \(params\)"):
        get("my_criteria.alone")


def far(params: Mapping[str, Tensor], context: Context, power: int = 1) -> dict[str, Tensor]:
    return {name: p.detach().abs() ** power for name, p in params.items()}


class Far:
    def __call__(self, params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return far(params, context, 2)


@pytest.mark.parametrize(
    ("score", "name"), [(functools.partial(far, power=2), "far(power=2)"), (Far(), "Far"), (far, "far")]
)
def test_a_partial_and_an_object_that_can_be_called_are_criteria_with_a_name(score: criteria.Criterion, name: str):
    assert criteria.name_of(score) == name
    with pytest.raises(ValueError, match=re.escape(f"The criterion '{name}' gave nan for w")):
        compute(score, {"w": nn.Parameter(torch.tensor([float("nan")]))}, context(unit()))
    register = criterion(f"a test's own {name} {type(score).__name__}")
    assert register(score) is register(score) is score
    with pytest.raises(ValueError, match="exists already"):
        register(lambda params, context: {})
    assert criteria.name_of(score) == f"a test's own {name} {type(score).__name__}"
