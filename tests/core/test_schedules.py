import math

import pytest

from lightning_mask.core import schedules
from lightning_mask.core.schedules import Moment, Plateau, Run, parse_until

RUN = Run(total_steps=1000, steps_per_epoch=250)
ENDLESS = Run(total_steps=math.inf, steps_per_epoch=math.inf)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0, 0.25, 0.5, 1]),
        ("cubic", [0, 0.578125, 0.875, 1]),  # 1 - (3/4)^3, 1 - (1/2)^3
        ("cosine", [0, (1 - 0.5**0.5) / 2, 0.5, 1]),
        ("geometric", [0, 0.5 / 0.9375, 0.75 / 0.9375, 1]),  # of 1 - 1/16: 1 - (1/16)^(1/4), 1 - (1/16)^(1/2)
    ],
)
def test_share_of_the_final_sparsity(name: str, values: list[float]):
    sparsities = [schedules.schedule(name)(t, 0.9375) for t in (0.0, 0.25, 0.5, 1.0)]
    assert sparsities == pytest.approx([0.9375 * value for value in values], rel=1e-12)


def test_when_a_ramp_is_updated():
    ramp = schedules.Ramp(2, 9, 3, "linear")
    assert [ramp.last_update(step) for step in (1, 2, 4, 5, 8, 9, 12)] == [
        None,
        (2, 0.0),
        (2, 0.0),
        (5, 3 / 7),
        (8, 6 / 7),
        (9, 1.0),
        (9, 1.0),
    ]
    assert ramp.updates == len({ramp.last_update(step) for step in range(2, 20)})
    assert schedules.Ramp(4, 4, 1, "constant").updates == 1


def test_an_unknown_schedule_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'cubik' is unknown; there are .*constant.*cubic.*linear"):
        schedules.schedule("cubik")


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("0 steps", 0),
        ("1 step", 1),
        ("500 steps", 500),
        ("500steps", 500),
        (" 500  steps ", 500),
        ("2 epochs", 500),
        ("1 epoch", 250),
        ("0.5 epochs", 125),
        ("30%", 300),
        ("30 %", 300),
        ("0%", 0),
        ("100%", 1000),
        ("0.25%", 3),  # floor(2.5 + 0.5)
        ("12.34%", 123),
    ],
)
def test_a_moment_in_steps(text: str, steps: int):
    moment = Moment.parse(text, "until")
    assert moment.steps(RUN, "until") == steps
    assert Moment.parse(str(moment), "until") == moment


@pytest.mark.parametrize("value", [100_000, 1_000_000, 1_234_567, 12_345_678_901, 0.1 + 0.2, 1 / 3])
@pytest.mark.parametrize("unit", ["steps", "epochs"])
def test_a_moment_reads_back_from_its_text(value: float, unit: str):
    if unit == "steps":
        value = int(value) + 1
    moment = Moment(float(value), unit)
    assert Moment.parse(str(moment), "until") == moment


@pytest.mark.parametrize(
    "text", ["", "5", 5, 5.0, None, True, "steps", "-5 steps", "5 stepps", "5 batches", "1e3 steps", "5 steps 3", "%"]
)
def test_what_is_no_moment_is_refused(text: object):
    with pytest.raises(ValueError, match=r"every=.* must be a moment such as '500 steps'"):
        Moment.parse(text, "every")


@pytest.mark.parametrize(("text", "says"), [("101%", "beyond the end"), ("1.5 steps", "whole number of steps")])
def test_a_moment_out_of_range_is_refused(text: str, says: str):
    with pytest.raises(ValueError, match=says):
        Moment.parse(text, "every")


@pytest.mark.parametrize(("text", "says"), [("30%", "max_steps or max_epochs"), ("2 epochs", "loader with a length")])
def test_a_run_without_an_end_has_no_such_moment(text: str, says: str):
    with pytest.raises(ValueError, match=f"every='{text}' needs a run with an end: .*{says}"):
        Moment.parse(text, "every").steps(ENDLESS, "every")
    assert Moment.parse("7 steps", "every").steps(ENDLESS, "every") == 7


def test_several_optimizers_by_hand_know_steps_only():
    run = Run(total_steps=1000, steps_per_epoch=250, optimizers=2)
    for text in ("30%", "2 epochs"):
        with pytest.raises(
            ValueError, match=f"every='{text}' .* 2 optimizers, each of whose steps counts one; .* steps"
        ):
            Moment.parse(text, "every").steps(run, "every")
    assert Moment.parse("7 steps", "every").steps(run, "every") == 7
    assert Moment.parse("0%", "every").steps(run, "every") == 0


def test_a_plateau():
    plateau = Plateau.parse({"monitor": "val/loss", "min_delta": 0.1}, "until")
    assert plateau == Plateau("val/loss", patience=2, mode="min", min_delta=0.1)
    assert plateau.improves(5.0, None)
    assert plateau.improves(0.8, 1.0)
    assert not plateau.improves(0.95, 1.0)
    assert not plateau.improves(float("nan"), 1.0)
    assert not plateau.improves(float("nan"), None)
    up = Plateau("val/acc", mode="max")
    assert up.improves(0.6, 0.5)
    assert not up.improves(0.5, 0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"patience": 2}, "lacks the key 'monitor'"),
        ({"monitor": "a", "patient": 2}, "unknown key 'patient'"),
        ({"monitor": "a", "mode": "low"}, "'min' or 'max'"),
        ({"monitor": "a", "patience": 0}, "whole number from 1"),
        ({"monitor": "a", "patience": 1.5}, "whole number from 1"),
        ({"monitor": "a", "min_delta": -1}, "at least 0"),
        ({"monitor": "a", "min_delta": float("nan")}, "at least 0"),
        ({"monitor": "a", "min_delta": "0.1"}, "at least 0"),
    ],
)
def test_a_wrong_plateau_is_refused(given: dict[str, object], says: str):
    with pytest.raises(ValueError, match=says):
        Plateau.parse(given, "until")


def test_until_is_a_moment_a_plateau_or_nothing():
    assert parse_until(None, "until") is None
    assert parse_until("2 epochs", "until") == Moment(2.0, "epochs")
    assert parse_until({"monitor": "a"}, "until") == Plateau("a")
