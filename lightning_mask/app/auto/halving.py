"""Successive halving: from the outcomes of short runs to a choice, and why.

* Halving: all settings train for ``steps``; the best 1 / ``eta`` of them start again with ``eta`` times as many, and so on
  until one is left (Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization", 2016,
  algorithm 1, with whole runs in place of pulls, as Hyperband does: Li et al. 2018). After the first round the best of every
  strategy goes on before any second best, as far as there is time: what trains little is ahead after a few
  steps and behind after many, and halving is wrong about curves that cross (Li et al. 2018, on many settings against long runs).
* A setting that is worse after the longer trial than it was after the shorter one, or diverged in it, has too large a rate: the
  next smaller one runs right after it, as far as there is time.
* Widening: where the best of the last round has the largest or the smallest rate of all that its strategy was tried at, it
  runs at the next one, too.
* The choice: the best of the last round from which two or more have a score. What lies within one standard error of it, by the
  error of the paired difference (as in the one-standard-error rule of Breiman et al., "Classification and Regression Trees",
  1984, section 3.4.3), is named, with the fewest entries that would do: who wants few gives a budget.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Amount = float | int


@dataclass(frozen=True)
class Setting:
    """A strategy with its density and learning rate.

    Attributes:
        strategy: Name of the candidate.
        density: Its density; None: it has none, or its own.
        lr: Learning rate; None: the run's.
        entries: Number of entries that would train; None: known after a trial only.
        mask: Config block, not resolved.
    """

    strategy: str
    density: Amount | None
    lr: float | None
    entries: int | None
    mask: dict[str, Any] = field(compare=False)

    @property
    def name(self) -> str:
        """What a person calls it."""
        density = "" if self.density is None else f" {number(self.density)}"
        return f"{self.strategy}{density}" + ("" if self.lr is None else f" at lr {self.lr:g}")


@dataclass
class Outcome:
    """What became of a setting in one rung.

    Attributes:
        score: The monitored figure; None where the trial failed.
        error: Why it failed, or was dropped.
        diverged: Whether it failed because its figure was not finite.
        seconds: Wall-clock seconds.
        entries: Entries that trained at its end.
        optimizer_bytes: Bytes of optimizer state.
        seconds_per_step: Of training.
        losses: Of the held-out examples, [n], and their weights; None: the module does not return them.
        folder: Of the trial, below the run's.
    """

    setting: Setting
    steps: int
    score: float | None
    error: str | None
    seconds: float
    entries: int | None
    optimizer_bytes: int | None
    seconds_per_step: float
    losses: tuple[Tensor, Tensor] | None
    folder: str
    diverged: bool = False


def halve(
    settings: Sequence[Setting],
    run: Callable[[Setting, int], Outcome],
    *,
    steps: int,
    eta: int,
    mode: str,
    minutes: float,
    longest: int | None,
    passed: Callable[[], float],
) -> tuple[list[list[Outcome]], list[tuple[Setting, int]]]:
    """Run settings by successive halving; return the outcomes of each rung, and what there was no time for.

    The first rung may take half of the minutes; later ones, as many of the best as there is time for, by what their trials
    took before. There are no rungs of a single setting: nothing could be compared.

    Args:
        settings: What to try, the more promising first.
        run: Trains one for a number of steps.
        steps: Of the first rung.
        eta: The best 1 / eta of a rung go on, for eta times as many steps, or for the whole run's if that is less than half
            as many again; after the first rung at least one setting of every strategy, as far as there is time.
        mode: Which score is better: "min" or "max".
        minutes: Time for all.
        longest: Steps of the whole run, which no trial exceeds; None: not known.
        passed: Says how many seconds of it are over.

    Returns:
        The rungs; and each setting with the steps that it would have had next.

    Raises:
        ValueError: If there is no time for two settings, or none of them could be trained.
    """
    limit = minutes * 60
    steps = min(steps, longest or steps)
    outcomes: list[Outcome] = []
    for place, setting in enumerate(settings):
        took = sum(o.seconds for o in outcomes) / max(place, 1)
        over = passed()
        if place == 1 and over + took > limit:
            raise ValueError(
                f"mask.minutes={minutes:g} is too short: a trial of {steps} steps takes {took:.0f} s, and there are "
                f"{len(settings)}. About {math.ceil((len(settings) * took * 2) / 60)} minutes are enough for all; fewer "
                "mask.candidates, mask.densities, mask.rates or mask.steps take less."
            )
        if place >= 2 and over + took > limit / 2:
            break
        outcomes.append(run(setting, steps))
    rungs, no_time = [outcomes], [(setting, steps) for setting in settings[len(outcomes) :]]
    while True:
        ranked = rank(rungs[-1], mode)
        if not ranked:
            reasons = "; ".join(f"{o.setting.name}: {o.error}" for o in rungs[-1][:3])
            raise ValueError(f"mask=auto: no candidate could be trained ({reasons}).")
        going = _that_go_on(ranked, eta, first=len(rungs) == 1)
        kept: list[Setting] = []
        for more in _lengths(steps * eta, longest):
            kept, estimate = [], passed()
            for outcome in going:
                estimate += _expected(outcome, more)
                if estimate <= limit:
                    kept.append(outcome.setting)
            if len(kept) == len(going):
                break
        if len(going) < 2 or more == steps:
            return rungs, no_time
        no_time += [(o.setting, more) for o in going if len(kept) < 2 or o.setting not in kept]
        if len(kept) < 2:
            return rungs, no_time
        before = {o.setting: o for o in rungs[-1]}
        rungs.append([])
        queue = list(kept)
        while queue:
            setting = queue.pop(0)
            if passed() + _expected(before[setting], more) > limit and rungs[-1]:
                no_time.append((setting, more))
                continue
            rungs[-1].append(run(setting, more))
            smaller = _smaller(rungs[-1][-1], before, mode)
            if smaller is not None and smaller not in kept and smaller not in [o.setting for o in rungs[-1]]:
                queue.insert(0, smaller)
        steps = more
        if not rank(rungs[-1], mode):
            return rungs, no_time


def _expected(outcome: Outcome, steps: int) -> float:
    """Seconds that a trial of more steps would take."""
    return outcome.seconds + (steps - outcome.steps) * outcome.seconds_per_step


def _smaller(outcome: Outcome, before: Mapping[Setting, Outcome], mode: str) -> Setting | None:
    """The same at the next smaller rate that was tried before, if it is worse than it was then or diverged; else None."""
    own, now, then = outcome.setting, outcome.score, before[outcome.setting].score
    worse = now is not None and then is not None and (now - then) * (1 if mode == "min" else -1) > 0
    if own.lr is None or not (worse or outcome.diverged):
        return None
    alike = [
        s
        for s in before
        if (s.strategy, s.density) == (own.strategy, own.density) and s.lr is not None and s.lr < own.lr
    ]
    return max(alike, key=lambda s: s.lr or 0.0, default=None)


def _lengths(steps: int, longest: int | None) -> list[int]:
    """How long the next rung may be: the whole run if that is less than half as many again and there is time, else ``steps``."""
    if longest is None:
        return [steps]
    return [longest, min(steps, longest)] if steps * 3 > longest * 2 else [steps]


def _that_go_on(ranked: Sequence[Outcome], eta: int, first: bool) -> list[Outcome]:
    """The best 1 / eta; after the first rung the best of each strategy, and then others, up to that number."""
    count = -(-len(ranked) // eta)
    if not first:
        return list(ranked[:count])
    best = {o.setting.strategy: o for o in reversed(ranked)}
    own = [o for o in ranked if o is best[o.setting.strategy]]
    others = [o for o in ranked if o is not best[o.setting.strategy]]
    return own + others[: max(count - len(own), 0)]


def widen(
    rungs: Sequence[list[Outcome]],
    run: Callable[[Setting, int], Outcome],
    *,
    most: int,
    mode: str,
    minutes: float,
    passed: Callable[[], float],
) -> None:
    """Add further rates to the last rung: three times as large or small, while the best one there lies at an end of all tried.

    Args:
        rungs: What :func:`halve` returned.
        run: Trains a setting for a number of steps.
        most: How many rates at most.
        mode: Which score is better: "min" or "max".
        minutes: Time for all trials, the earlier ones included.
        passed: Says how many seconds of it are over.
    """
    for _ in range(most):
        ranked = rank(rungs[-1], mode)
        if not ranked or (lr := ranked[0].setting.lr) is None:
            return
        best, own = ranked[0], ranked[0].setting
        tried = [
            o.setting.lr or 0.0
            for rung in rungs
            for o in rung
            if (o.setting.strategy, o.setting.density) == (own.strategy, own.density)
        ]
        factor = 3.0 if lr == max(tried) else 1 / 3 if lr == min(tried) else None
        if factor is None or passed() + best.seconds > minutes * 60:
            return
        rungs[-1].append(run(replace(own, lr=float(f"{lr * factor:.6g}")), best.steps))


def decisive(rungs: Sequence[Sequence[Outcome]]) -> list[Outcome]:
    """Return the outcomes that decide: those of settings that failed in none, of the last rung that has two of them or more.

    Raises:
        ValueError: If all settings that went on failed, and there were no others.
    """
    failed = [o.setting for rung in rungs for o in rung if o.score is None]
    left = [good for rung in rungs if (good := [o for o in rung if o.setting not in failed])]
    if left:
        return next((good for good in reversed(left) if len(good) > 1), left[-1])
    error = rungs[-1][0]
    raise ValueError(f"mask=auto: no candidate could be trained ({error.setting.name}: {error.error}).")


def rank(outcomes: Sequence[Outcome], mode: str) -> list[Outcome]:
    """Return the outcomes that have a score, the best first; of equal ones, those with fewer entries first."""
    sign = 1 if mode == "min" else -1
    scored = [
        (sign * o.score, o.entries if o.entries is not None else math.inf, o) for o in outcomes if o.score is not None
    ]
    return [o for *_, o in sorted(scored, key=lambda row: row[:2])]


def difference(one: Outcome, other: Outcome) -> tuple[float, float | None]:
    """Return the score of one less that of another, and its standard error; None: not known.

    For a mean over n examples, weighted by w: the error of ``sum(w d) / sum(w)``, with d the difference of the two losses of
    an example, is ``sqrt(n / (n - 1) * sum(w^2 (d - mean)^2)) / sum(w)`` (Cochran, "Sampling Techniques", 1977, chapter 6:
    the ratio estimator). It is known where the score is the mean of such losses.

    Args:
        one: An outcome with a score.
        other: Another one, on the same examples.
    """
    assert one.score is not None
    assert other.score is not None
    gap = one.score - other.score
    if one.losses is None or other.losses is None or len(one.losses[0]) != len(other.losses[0]):
        return gap, None
    (a, weights), (b, _) = one.losses, other.losses
    for losses, score in ((a, one.score), (b, other.score)):
        if abs(float((weights * losses).sum() / weights.sum()) - score) > 1e-3 * max(abs(score), 1e-3):
            return gap, None
    n, d = len(a), a - b
    mean = (weights * d).sum() / weights.sum()
    spread = (weights.square() * (d - mean).square()).sum() * n / max(n - 1, 1)
    return gap, float(spread.sqrt() / weights.sum()) if n > 1 else None


def pick(outcomes: Sequence[Outcome], monitor: str, mode: str) -> tuple[Outcome, str]:
    """Return the chosen outcome of a rung, and why, in a sentence.

    Args:
        outcomes: Of one rung, at least one of them with a score.
        monitor: What the score is called.
        mode: Which score is better: "min" or "max".
    """
    ranked = rank(outcomes, mode)
    best = ranked[0]
    others = [(o, *difference(o, best)) for o in ranked[1:]]
    like = [o for o, gap, error in others if error is not None and abs(gap) <= error]
    what = f"{monitor} {best.score:.4g} after {best.steps} steps"
    if like:
        smallest = min([best, *like], key=lambda o: o.entries if o.entries is not None else math.inf)
        fewest = (
            "none of these trains fewer entries"
            if smallest is best
            else f"{smallest.setting.name} trains the fewest entries of these{_counted(smallest)}: mask.budget keeps to so many"
        )
        seen = listed([o.setting.name for o in like])
        why = f"{best.setting.name}: the best {what}{_counted(best)}"
        return best, f"{why}; no difference seen from {seen}, within one standard error of it; {fewest}."
    why = f"{best.setting.name}: the best {what}{_counted(best)}"
    if not others:
        return best, f"{why}; nothing else could be trained."
    second, gap, error = others[0]
    margin = f"{second.setting.name} follows {abs(gap):.3g} behind"
    noise = f" (standard error {error:.2g})." if error is not None else "; how much of that is noise is not known."
    return best, f"{why}; {margin}{noise}"


def listed(names: Sequence[str]) -> str:
    """Return names as a person lists them."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _counted(outcome: Outcome) -> str:
    return "" if outcome.entries is None else f" ({outcome.entries:,})"


def number(value: int | float | None) -> str:
    """Return a number as a person writes it; None: nothing."""
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:g}"
