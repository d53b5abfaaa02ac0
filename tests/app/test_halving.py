"""By which rule the trials of `mask=auto` decide: halving within the minutes, widening, and the choice among the last."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from lightning_mask.app.auto.halving import Outcome, Setting, decisive, difference, halve, pick, widen


def outcome(
    name: str, score: float | None, *, steps: int = 1, entries: int = 1, seconds: float = 1.0, **more: Any
) -> Outcome:
    setting = Setting(name, None, None, entries, {})
    return Outcome(
        setting, steps, score, None if score is not None else "broke", seconds, entries, 0, seconds, None, "", **more
    )


class Clock:
    """A time that passes as trials say, and what ran: settings of one strategy, known by their rate."""

    def __init__(self, scores: dict[str, float | None], per_step: float) -> None:
        self.now, self.ran = 0.0, list[tuple[str, int]]()
        self.scores, self.per_step = scores, per_step

    def passed(self) -> float:
        return self.now

    def run(self, setting: Setting, steps: int) -> Outcome:
        self.now += steps * self.per_step
        name = list(self.scores)[int(setting.lr or 0)]
        self.ran.append((name, steps))
        made = outcome(name, self.scores[name], steps=steps, seconds=steps * self.per_step)
        return dataclasses.replace(made, setting=setting, seconds_per_step=self.per_step)


def test_halving_keeps_to_its_minutes() -> None:
    scores: dict[str, float | None] = {"a": 3.0, "b": None, "c": 1.0, "d": 2.0, "e": 4.0, "f": 0.5}
    settings = [Setting("one", None, float(place), 1, {}) for place in range(6)]

    def rungs(per_step: float, longest: int | None = None, eta: int = 2) -> tuple[list[Any], list[Any]]:
        clock = Clock(scores, per_step)
        _, no_time = halve(
            settings, clock.run, steps=1, eta=eta, mode="min", minutes=1.0, longest=longest, passed=clock.passed
        )
        return clock.ran, [(list(scores)[int(s.lr or 0)], steps) for s, steps in no_time]

    first = [(name, 1) for name in scores]
    assert rungs(0.1) == ([*first, ("f", 2), ("c", 2), ("d", 2), ("f", 4), ("c", 4)], [])
    assert rungs(0.1, 2) == ([*first, ("f", 2), ("c", 2), ("d", 2)], [])
    assert rungs(0.1, eta=3) == ([*first, ("f", 3), ("c", 3)], [])
    # 30 s for the first rung; of the two that have a score one would go on, which nothing could be compared with
    assert rungs(10.0) == (first[:3], first[3:])
    assert rungs(6.0, eta=3) == (first[:5], [("f", 1), ("c", 3), ("d", 3)])
    assert rungs(7.0) == ([*first[:4], ("c", 2), ("d", 2)], first[4:])
    with pytest.raises(
        ValueError, match=r"mask\.minutes=1 is too short: a trial of 1 steps takes 31 s, and there are 6"
    ):
        rungs(31.0)
    scores.update(dict.fromkeys(scores))
    with pytest.raises(ValueError, match=r"no candidate could be trained \(one at lr 0: broke; one at lr 1: broke"):
        rungs(0.1)


def test_a_strategy_that_begins_slowly_is_not_dropped_after_the_first_round() -> None:
    """After two steps the head is ahead at every rate; after eight, training everything is."""
    settings = [Setting(name, None, lr, 1, {}) for lr in (1.0, 2.0, 3.0) for name in ("head", "none", "bitfit")]
    missed: list[list[str]] = []
    slow = {"head": 1.0, "none": 6.0, "bitfit": 3.0}

    def rungs(longest: int, minutes: float = 9.0) -> list[list[str]]:
        def run(setting: Setting, steps: int) -> Outcome:
            score = slow[setting.strategy] - (setting.lr or 0) / 10 - (steps if setting.strategy == "none" else 0)
            made = outcome(setting.strategy, score, steps=steps, seconds=0.1)
            return dataclasses.replace(made, setting=setting, seconds_per_step=0.25)

        made, no_time = halve(
            settings, run, steps=2, eta=3, mode="min", minutes=minutes, longest=longest, passed=lambda: 0.0
        )
        missed.append([f"{steps}: {setting.name}" for setting, steps in no_time])
        return [[f"{o.steps}: {o.setting.name}" for o in rung] for rung in made[1:]]

    second = ["6: head at lr 3", "6: bitfit at lr 3", "6: none at lr 3"]
    assert rungs(100) == [second], "of three, the best third is one, which nothing could be compared with"
    assert rungs(8) == [[name.replace("6", "8") for name in second]], "six steps would be nearly the whole run"
    assert rungs(8, minutes=0.06) == [second], "there is no time for all at the whole length"
    assert not any(missed)
    assert rungs(100, minutes=0.04) == [second[:2]], "there is no time for the third"
    assert missed[-1] == second[2:]


def test_one_that_is_worse_after_more_steps_is_tried_at_its_next_smaller_rate() -> None:
    after = {("none", 9.0): (1.0, 5.0), ("none", 3.0): (3.0, 0.5), ("none", 1.0): (4.0, 0.1), ("head", 1.0): (2.0, 1.5)}
    settings = [Setting(name, None, lr, 1, {}) for name, lr in after]

    def ran(minutes: float, mode: str = "min") -> tuple[list[str], list[str]]:
        now, sign = 0.0, 1 if mode == "min" else -1

        def run(setting: Setting, steps: int) -> Outcome:
            nonlocal now
            now += steps
            assert setting.lr is not None
            made = outcome(
                setting.strategy, sign * after[setting.strategy, setting.lr][steps > 2], steps=steps, seconds=steps
            )
            return dataclasses.replace(made, setting=setting, seconds_per_step=1.0)

        rungs, no_time = halve(
            settings, run, steps=2, eta=3, mode=mode, minutes=minutes, longest=None, passed=lambda: now
        )
        return [o.setting.name for o in rungs[1]], [s.name for s, _ in no_time]

    for mode in ("min", "max"):
        assert ran(1.0, mode) == (["none at lr 9", "none at lr 3", "head at lr 1"], [])
    assert ran(20 / 60) == (["none at lr 9", "none at lr 3"], ["head at lr 1"])


def test_one_that_diverges_after_more_steps_is_tried_at_its_next_smaller_rate() -> None:
    after = {("a", 9.0): (0.5, math.nan), ("a", 3.0): (0.8, 0.1), ("a", 1.0): (0.9, 0.2), ("b", 1.0): (0.7, 0.6)}

    def run(setting: Setting, steps: int) -> Outcome:
        score = after[setting.strategy, setting.lr or 0.0][steps > 2]
        made = outcome(setting.strategy, None if math.isnan(score) else score, steps=steps, diverged=math.isnan(score))
        return dataclasses.replace(made, setting=setting)

    settings = [Setting(name, None, lr, 1, {}) for name, lr in after]
    how: dict[str, Any] = {"steps": 2, "eta": 3, "mode": "min", "minutes": 1.0, "longest": None}
    rungs, _ = halve(settings, run, **how, passed=lambda: 0.0)
    assert [o.setting.name for o in rungs[1]] == ["a at lr 9", "a at lr 3", "b at lr 1"]
    assert pick(decisive(rungs), "val/loss", "min")[0].setting.name == "a at lr 3"

    now = 0.0

    def slowly(setting: Setting, steps: int) -> Outcome:
        nonlocal now
        now += 1.0 if steps == 2 else 15.0
        return dataclasses.replace(run(setting, steps), seconds_per_step=14 / 4)

    rungs, no_time = halve(settings, slowly, **how | {"minutes": 40 / 60}, passed=lambda: now)
    assert [(o.setting.name, o.score) for o in rungs[1]] == [("a at lr 9", None), ("a at lr 3", 0.1)]
    assert [s.name for s, _ in no_time] == ["b at lr 1"]
    assert pick(decisive(rungs), "val/loss", "min")[0].setting.name == "b at lr 1", (
        "a score alone is compared with nothing"
    )


def test_a_rate_at_the_end_of_those_tried_is_followed_further() -> None:
    by_rate = {1.0: 5.0, 3.0: 4.0, 9.0: 3.0, 27.0: 3.5, 81.0: 1.0}
    now = 0.0

    def run(setting: Setting, steps: int) -> Outcome:
        nonlocal now
        now += 10.0
        assert setting.lr is not None
        made = outcome(setting.strategy, by_rate[setting.lr], steps=steps, seconds=10.0)
        return dataclasses.replace(made, setting=setting)

    def followed(most: int = 5, minutes: float = 10.0, first: tuple[float, ...] = (1.0, 3.0)) -> list[float | None]:
        nonlocal now
        now = 0.0
        rungs = [[run(Setting("a", None, lr, 1, {}), 1) for lr in first]]
        rungs.append([run(rungs[0][-1].setting, 3)])
        widen(rungs, run, most=most, mode="min", minutes=minutes, passed=lambda: now)
        assert {o.steps for o in rungs[-1]} == {3}
        return [o.setting.lr for o in rungs[-1]]

    assert followed() == [3.0, 9.0, 27.0], "9 is between two others"
    assert followed(most=1) == [3.0, 9.0]
    assert followed(minutes=0.7) == [3.0, 9.0], "there is no time for another"
    assert followed(first=(27.0, 9.0)) == [9.0, 3.0]


def test_a_setting_that_fails_in_a_longer_trial_is_not_chosen() -> None:
    first = [outcome("a", 1.0), outcome("b", 2.0), outcome("c", 3.0)]
    assert decisive([first]) == first
    second = [outcome("a", None), outcome("b", 2.0), outcome("d", 4.0)]
    assert [o.setting.strategy for o in decisive([first, second])] == ["b", "d"]
    assert decisive([first, second[:2]]) == first[1:], "one alone is compared with nothing"
    assert [o.setting.strategy for o in decisive([first, [outcome("a", None), outcome("b", None)]])] == ["c"]
    assert decisive([first, [outcome("a", 9.0, steps=3)]]) == first, "there was no time to compare it with another"
    with pytest.raises(ValueError, match=r"no candidate could be trained \(a: broke\)"):
        decisive([first[:1], [outcome("a", None)]])


def test_the_best_is_chosen_and_what_the_held_out_examples_cannot_separate_from_it_is_named() -> None:
    ways = ("val/loss", "min")
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)

    def of(name: str, losses: list[float], entries: int) -> Outcome:
        values = torch.tensor(losses, dtype=torch.float64)
        made = outcome(name, float((weights * values).sum() / 4), entries=entries)
        made.losses = (values, weights)
        return made

    best, near, far = of("best", [1, 2, 3], 900), of("near", [1.4, 1.8, 3.1], 500), of("far", [2, 3, 4.1], 10)
    # d = 0.4, -0.2, 0.1 with weights 1, 1, 2: mean 0.1; sum of (w (d - mean))^2 = 0.09 + 0.09 + 0
    assert difference(near, best) == pytest.approx((0.1, math.sqrt(3 / 2 * 0.18) / 4))
    chosen, reason = pick([far, near, best], *ways)
    assert chosen is best
    assert "no difference seen from near, within one standard error of it" in reason
    assert "near trains the fewest entries of these (500): mask.budget keeps to so many" in reason
    near.entries = 900
    chosen, reason = pick([far, near, best], *ways)
    assert chosen is best
    assert "no difference seen from near" in reason
    assert "none of these trains fewer entries" in reason
    chosen, reason = pick([far, best], *ways)
    assert chosen is best
    assert "far follows 1.05 behind (standard error" in reason
    near.losses = None
    chosen, reason = pick([near, best], *ways)
    assert chosen is best
    assert "how much of that is noise is not known" in reason
    near.score, best.score = 0.9, 0.8  # another figure than the mean loss, and higher is better
    chosen, reason = pick([near, best], "val/accuracy", "max")
    assert chosen is near
    assert "not known" in reason
    assert pick([far, outcome("broken", None)], *ways)[0] is far
