"""PruneMask: unimportant weights go to zero and stay there."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.callbacks.base import MaskCallback, plain
from lightning_mask.callbacks.freeze import Strings, has_own, may_need_reference
from lightning_mask.callbacks.session import Session
from lightning_mask.core import allocation as allocations
from lightning_mask.core import criteria, schedules, sharding, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.engine import check_engine
from lightning_mask.core.maskset import MaskSet, active, full, own
from lightning_mask.core.patterns import resolve
from lightning_mask.core.prunable import default_scope, read_sparsity
from lightning_mask.core.regrow import cosine_fraction, drop_and_grow
from lightning_mask.core.schedules import Moment, Run
from lightning_mask.core.selection import (
    Selection,
    check_batches,
    check_n_of_m,
    check_patterns,
    check_shape,
    choose,
    n_of_m,
    share_out,
)
from lightning_mask.core.transposed import transposed_weights, turned_shape


class PruneMask(MaskCallback):
    """Set the least important weights in scope to +0.0, along a schedule, and keep them there.

    At every update exactly ``floor(s * n + 0.5)`` of the ``n`` entries in scope are zero, ties broken by position; what is
    pruned stays pruned, unless ``regrow`` says otherwise. An update happens after backward and before the optimizer's step.

    Args:
        sparsity: Final share of zeros in scope, a float in [0, 1); or ``"n:m"``, e.g. ``"2:4"``: the ``n`` best of every
            ``m`` neighbours along the input dimension stay (also where the weight lies transposed), all at once at
            ``start``.
        score: Criterion, higher = more worth keeping: a registered name, or a function.
        scope: Patterns; default: the weights of Linear and convolution layers and attention projections; not embeddings,
            norms, biases, or the output head.
        structure: What is pruned as one unit: ``"entry"``, ``"row"``, ``"column"``, ``"head"``, ``"block:RxC"``,
            ``"tensor"``, ``"layer"``, as in ``FreezeMask``.
        allocation: How zeros are shared among tensors: ``"global"``, ``"uniform"``, ``"erk"``, ``"row"``.
        schedule: Sparsity between ``start`` and ``end``: ``"constant"`` (all at once at ``start``), ``"linear"``,
            ``"cubic"`` (Zhu and Gupta 2017).
        start: Moment of the first update.
        end: Moment of the last update, at which the final sparsity is reached; unused where all is pruned at once.
        every: Moment between updates; unused likewise.
        regrow: At every update a share of what is alive is dropped and as much is grown elsewhere, from zero: ``"random"``
            (SET), ``"gradient"`` (RigL: where the reduced gradient is largest), None: never.
        regrow_fraction: That share at ``start``; it falls to 0 at ``end`` along a cosine.
        rewind: Moment to whose weights everything that trains returns after each update, with fresh moments (lottery
            ticket); the learning rate goes on. None: weights go on too.
        batches: Number of training batches (per rank) shown to a criterion that needs data, at every update.
        seed: Seed of random criteria.
        engine: As in ``FreezeMask``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        sparsity: float | str,
        *,
        score: str | Callable[..., Any] = "magnitude",
        scope: Strings = None,
        structure: str = "entry",
        allocation: str = "global",
        schedule: str = "cubic",
        start: str = "0%",
        end: str = "50%",
        every: str = "1%",
        regrow: str | None = None,
        regrow_fraction: float = 0.3,
        rewind: str | None = None,
        batches: int = 32,
        seed: int = 0,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        self.engine = engine
        with _named():
            self.sparsity, self.n_of_m = read_sparsity(sparsity)
        if self.n_of_m is not None:
            schedule = "constant"
            if structure != "entry" or regrow is not None:
                raise ValueError("PruneMask: an n:m sparsity chooses entries once; leave structure and regrow out.")
        with _named():
            criteria.get(score)
            check_shape(structure, allocation)
            schedules.schedule(schedule)
            check_patterns(plain(scope), "scope")
            check_batches(batches)
        self.score, self.scope = score, plain(scope)
        self.structure, self.allocation, self.schedule = structure, allocation, schedule
        self.start, self.end, self.every = (
            Moment.parse(m, f"PruneMask: {n}") for m, n in ((start, "start"), (end, "end"), (every, "every"))
        )
        if regrow not in (None, "random", "gradient"):
            raise ValueError(f"PruneMask: regrow={regrow!r} must be 'random' (SET), 'gradient' (RigL) or None.")
        if regrow is not None and structure != "entry":
            raise ValueError(
                f"PruneMask: regrow exchanges single entries; structure={structure!r} does not go with it."
            )
        if regrow is not None and allocation == "row":
            raise ValueError("PruneMask: regrow exchanges entries of a tensor; allocation='row' does not go with it.")
        if not isinstance(regrow_fraction, float | int) or not 0 < regrow_fraction <= 1:
            raise ValueError(f"PruneMask: regrow_fraction={regrow_fraction!r} must be a share in (0, 1].")
        self.regrow, self.regrow_fraction = regrow, float(regrow_fraction)
        self.rewind = None if rewind is None else Moment.parse(rewind, "PruneMask: rewind")
        self.batches, self.seed = batches, seed
        ranked = Selection(score=score, density=1.0)
        self.needs_reference, self.own_criterion = may_need_reference(ranked), has_own(ranked)
        self._steps = (0, 0, 1)
        self._names: list[str] = []
        self._last = 0.0
        self._updated = -1
        self._rewind_step: int | None = None
        self._rewind_to: dict[str, Tensor] = {}
        self._rewind_due = False

    @property
    def state_key(self) -> str:
        """A key that tells several PruneMasks apart and does not depend on how zeros are held."""
        scope = json.dumps(self.scope)
        return self._generate_state_key(sparsity=self.sparsity, scope=scope, structure=self.structure, seed=self.seed)

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""
        self._names = self._scope_names(session)
        self._check_reach(session)

    def measure(self, run: Run) -> None:
        """Turn the ramp's moments into steps."""
        start = self.start.steps(run, "PruneMask: start")
        name, end, every = "start", start, 1
        if self.schedule != "constant" or self.regrow is not None:  # else all at once, whatever end and every are
            name, end = "end", self.end.steps(run, "PruneMask: end")
            every = max(self.every.steps(run, "PruneMask: every"), 1)
        if self.rewind is not None:
            self._rewind_step = self.rewind.steps(run, "PruneMask: rewind")
            if self._rewind_step > start:
                raise ValueError(
                    f"PruneMask: rewind={str(self.rewind)!r} lies after start={str(self.start)!r} in this run."
                )
        if end < start:
            raise ValueError(f"PruneMask: end={str(self.end)!r} lies before start={str(self.start)!r} in this run.")
        if end > run.total_steps and not run.debug:
            raise ValueError(
                f"PruneMask: {name}={str(getattr(self, name))!r} is step {end}, and the run has {run.total_steps:g}; "
                f"{name} the ramp earlier or train longer."
            )
        last = int(min(end, run.total_steps - 1))  # an update needs a step after it
        beyond = run.debug and start > run.total_steps
        self._steps = (start, end, every) if beyond else (min(start, last), last, every)

    def begin(self, session: Session) -> None:
        """Start from nothing pruned, unless a checkpoint brought masks."""
        if not self._restored:
            parameters = dict(session.module.named_parameters())
            self._masks = MaskSet({name: full(True, parameters[name]) for name in self._names})
            self._last, self._updated, self._rewind_to, self._rewind_due = 0.0, -1, {}, False

    def advance(self, session: Session) -> str | None:
        """Keep the weights to rewind to when it is time, and go back to them after an update."""
        self._keep_for_rewind(session)
        if self._rewind_due and session.engine is not None:
            self._rewind_due = False
            session.engine.rewind(self._rewind_to)
        return None

    def _keep_for_rewind(self, session: Session) -> None:
        """Copy the weights at the first chance: by hand, several steps may lie between two batches."""
        if self._rewind_step is not None and session.step >= self._rewind_step and not self._rewind_to:
            self._rewind_to = {n: p.detach().clone() for n, p in session.module.named_parameters()}

    def last_update(self, step: int) -> tuple[int, float] | None:
        """Return the step of the update that is in force at ``step`` and its progress in [0, 1]; None before ``start``."""
        start, end, every = self._steps
        if step < start:
            return None
        updated = end if step >= end else step - (step - start) % every
        return updated, (updated - start) / (end - start) if end > start else 1.0

    def _target(self, progress: float) -> float:
        return self.sparsity * schedules.schedule(self.schedule)(progress)

    def prune(self, session: Session) -> str | None:
        """Prune when an update is due at this step; return what was done."""
        self._keep_for_rewind(session)
        step = session.step
        due = self.last_update(step)
        if due is None or due[0] <= self._updated:
            return None
        self._updated, progress = due
        sparsity = max(self._target(progress), self._last)  # a longer run's ramp may lie below at first
        if sparsity == self._last and self.regrow is None:
            return None
        self._last = sparsity
        parameters = {name: session.module.get_parameter(name) for name in self._names}
        with nullcontext() if session.engine is None else session.engine.whole_gradients():
            scores = criteria.compute(self.score, dict(parameters), session.context(self.seed, self.batches))
        free = session.free()
        for name, score in scores.items():
            scores[name] = _constrained(score, parameters[name], self.masks[name], free[name])
        budget = Budget(sparsity, removed=True)
        if self.n_of_m is not None:
            chosen = n_of_m(scores, *self.n_of_m, transposed=transposed_weights(session.module))
        elif self.regrow is not None:
            growth = self._growth(parameters, free, step)
            fraction = cosine_fraction(self.regrow_fraction, progress)
            chosen = drop_and_grow(scores, growth, budget, self.allocation, fraction)
        else:
            chosen = choose(scores, [(self._names, budget)], self.structure, self.allocation, session.module)
        shares = {name: own(sharding.shard(mask, parameters[name])) for name, mask in chosen.items()}
        masks = MaskSet(shares, self._recipe(sparsity))
        session.agree(masks, "PruneMask")
        self._refuse_held(masks, scores, free)
        self._masks, self._rewind_due = masks, self._rewind_step is not None
        return f"sparsity {1 - masks.density():.4f} from step {step}"

    def _growth(self, parameters: dict[str, nn.Parameter], free: MaskSet, step: int) -> dict[str, Tensor]:
        """What each entry is worth growing; what a FreezeMask or a phase holds is not grown."""
        growth: dict[str, Tensor]
        if self.regrow == "random":
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            drawn = criteria.random_scores(shapes, criteria.named_seed(self.seed, f"step {step}"))
            growth = {name: sharding.shard(score, parameters[name]) for name, score in drawn.items()}
        else:
            growth = {
                n: torch.zeros_like(p) if p.grad is None else p.grad.detach().abs() for n, p in parameters.items()
            }
        for name, worth in growth.items():
            finite = worth.to(parameters[name].device, torch.float32).nan_to_num(nan=0.0)
            growth[name] = finite.masked_fill(~free[name].to(finite.device), -torch.inf)
        return growth

    def _recipe(self, sparsity: float) -> dict[str, Any]:
        return {
            "pruned by": criteria.name_of(self.score),
            "sparsity": sparsity,
            "structure": self.structure,
            "allocation": self.allocation,
        }

    def _scope_names(self, session: Session) -> list[str]:
        module = session.module
        if self.scope is None:
            names = default_scope(module)
            with _named():
                names = structures.default_scope(self.structure, names, module)
        else:
            names = resolve(self.scope, module, "PruneMask: scope")
        if not names:
            raise ValueError(
                "PruneMask: the model has no Linear, convolution or attention weight to prune; name tensors in scope."
            )
        parameters, transposed = dict(module.named_parameters()), transposed_weights(module)
        for name in names:
            if self.n_of_m is not None:
                shape = tuple(parameters[name].shape)
                check_n_of_m(f"PruneMask: {name}", shape, self.n_of_m[1], transposed.get(name, 0))
            if not parameters[name].is_floating_point():
                raise ValueError(f"PruneMask: {name} is of dtype {parameters[name].dtype}, which cannot be pruned.")
        if self.n_of_m is None:
            shapes = {name: tuple(parameters[name].shape) for name in names if parameters[name].numel()}
            with _named():
                budgets = [(names, Budget(self.sparsity, removed=True))]
                share_out(shapes, budgets, self.structure, self.allocation, module)
        return names

    def _check_reach(self, session: Session) -> None:
        """Refuse a sparsity that what is held whole for the whole run rules out (held entries are not pruned)."""
        if session.phases is not None:
            return
        tensors = {name: session.module.get_parameter(name) for name in self._names}
        allocate = allocations.get("uniform" if self.n_of_m is not None else self.allocation)
        transposed = transposed_weights(session.module) if self.allocation == "row" else {}
        shapes = {name: turned_shape(tuple(t.shape), transposed.get(name, 0)) for name, t in tensors.items()}
        groups = allocate(shapes, Budget(self.sparsity, removed=True))
        for names, keep in groups:
            total = sum(tensors[name].numel() for name in names)
            free = self._free_of_all(session, names)
            if total - keep > free and total - keep > free + sum(_zeros(tensors[n]) for n in names):
                of = "in scope" if len(names) == len(self._names) else f"of {names[0]}"
                held = f"FreezeMask holds all but {free:,} of them"
                if not session.freezers:
                    held = f"all but {free:,} of them do not train (requires_grad=False, or in no optimizer)"
                raise ValueError(
                    f"PruneMask: sparsity={self.sparsity} of the {total:,} entries {of} cannot be reached: {held}, and a held "
                    "entry is not pruned; let them train, or give PruneMask a scope that trains."
                )

    def check_phases(self, session: Session) -> None:
        """Refuse a ramp that rises in a phase that lets too little of the scope change; all are measured by now.

        What comes after a phase that a metric ends is not known yet, and is left to :meth:`prune`.

        Raises:
            ValueError: Naming the phase.
        """
        phases = session.phases
        if phases is None or self._restored:
            return
        tensors = [session.module.get_parameter(name) for name in self._names]
        total, zeros = sum(t.numel() for t in tensors), sum(_zeros(t) for t in tensors)
        start, reached = 0.0, 0
        for i, (phase, end) in enumerate(zip(phases.phases, phases.ends, strict=True)):
            last = i == len(phases.phases) - 1
            if end == math.inf and not last:
                return
            due = self.last_update(int(min(end - 1, self._steps[1]))) if end > start else None
            target = allocations.share(self._target(due[1]), total) if due else 0
            if phase.selection.empty:
                free = self._free_of_all(session, self._names)
            else:
                free = self._free_at_most(phase.selection, session, self._names)
            if target > reached and target - reached > free + zeros:
                raise ValueError(
                    f"PruneMask: {target:,} of the {total:,} entries in scope are to be zero by the end of {phases.label(i)} of "
                    f"PhaseUnfreeze, which lets only {free:,} of them change, and a held entry is not pruned. Move start and "
                    "end to where they train, or let the phase train more of them."
                )
            start, reached = end, max(reached, target)

    def _free_of_all(self, session: Session, names: list[str]) -> int:
        """How many entries of ``names`` all FreezeMasks can let change, at most; without any, how many train."""
        if session.freezers:
            return min(self._free_at_most(freezer.selection, session, names) for freezer in session.freezers)
        trains = session.trainable & session.owned
        return sum(session.module.get_parameter(name).numel() for name in names if name in trains)

    def _free_at_most(self, selection: Selection, session: Session, names: list[str]) -> int:
        """How many entries of ``names`` the selection can let change, at most."""
        module = session.module
        sizes = {name: module.get_parameter(name).numel() for name in names}
        whole = sum(sizes.get(name, 0) for name in resolve(selection.train or (), module))
        if selection.mask is not None:
            return whole + sum(active(mask) for name, mask in selection.given(module).items() if name in sizes)
        if selection.density is None:
            return whole
        total = whole
        for ranked, budget in selection.budgets(module, session.trainable):
            kept = budget.keep(sum(module.get_parameter(name).numel() for name in ranked))
            total += min(kept, sum(sizes.get(name, 0) for name in ranked))
        return total

    def _refuse_held(self, masks: MaskSet, scores: dict[str, Tensor], free: MaskSet) -> None:
        for name, mask in masks.items():
            score = scores[name]
            kept = torch.isposinf(score) & ~mask.to(score.device)
            if sharding.count(kept):
                what, out = f"held entries of {name}", "let FreezeMask or the phase train more of it"
                if not sharding.count(kept & ~free[name].to(score.device)):
                    what = f"entries of {name} that the criterion scores as infinite"
                    out = "give fewer of them an infinite score, or finite ones to all"
                raise ValueError(
                    f"PruneMask: sparsity {self._last:.4f} cannot be reached without pruning {what}; {out}, or lower the "
                    "sparsity."
                )

    def own_state(self) -> dict[str, Any]:
        """Return the sparsity reached."""
        return {
            "last": self._last,
            "updated": self._updated,
            "rewind_to": sharding.gathered(self._rewind_to),
            "rewind_due": self._rewind_due,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over the sparsity reached."""
        self._last, self._updated = state["last"], state["updated"]
        self._rewind_to, self._rewind_due = state["rewind_to"], state["rewind_due"]


@contextmanager
def _named() -> Iterator[None]:
    """Say in an error whose argument is at fault."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"PruneMask: {error}") from None


def _constrained(score: Tensor, parameter: Tensor, alive: Tensor, free: Tensor) -> Tensor:
    """Scores under which what is pruned stays pruned and what is held and not zero stays."""
    score = score.float().masked_fill(~alive.to(score.device), -torch.inf)
    if active(free) == free.numel():
        return score
    held = ~free.to(score.device) & alive.to(score.device) & (parameter.detach() != 0).to(score.device)
    return score.masked_fill_(held, torch.inf)


def _zeros(tensor: Tensor) -> int:
    return sharding.count(tensor.detach() == 0)
