"""PruneMask: unimportant weights go to zero and stay there."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_mask.callbacks import calibration
from lightning_mask.callbacks.base import MaskCallback, plain
from lightning_mask.callbacks.freeze import Strings, has_own, may_need_reference
from lightning_mask.callbacks.reach import check_phases, check_reach
from lightning_mask.callbacks.rewind import Rewind
from lightning_mask.callbacks.session import Session
from lightning_mask.core import criteria, schedules, sharding, structures
from lightning_mask.core.allocation import Budget, share
from lightning_mask.core.choosing import check_n_of_m, choose, n_of_m, share_out
from lightning_mask.core.criteria import Scores
from lightning_mask.core.engine import check_engine
from lightning_mask.core.maskset import MaskSet, active, full, own
from lightning_mask.core.patterns import resolve
from lightning_mask.core.prunable import check_emptied, constrained, default_scope, parts, read_sparsities
from lightning_mask.core.regrow import cosine_fraction, drop_and_grow, growth
from lightning_mask.core.schedules import Moment, Ramp, Run
from lightning_mask.core.selection import Selection, check_batches, check_patterns, check_shape
from lightning_mask.core.transposed import transposed_weights


class PruneMask(MaskCallback):
    """Set the least important weights in scope to +0.0, along a schedule, and keep them there.

    At every update exactly ``floor(s * n + 0.5)`` of the ``n`` entries in scope are zero, ties broken by position; what is
    pruned stays pruned, unless ``regrow`` says otherwise. An update happens after backward and before the optimizer's step.

    Args:
        sparsity: Final share of zeros in scope, a float in [0, 1); or ``"n:m"``, e.g. ``"2:4"``: the ``n`` best of every
            ``m`` neighbours along the input dimension stay (also where the weight lies transposed), all at once at
            ``start``. Or a dict of patterns to shares, e.g. ``{"*.attention.*": 0.5, "*.intermediate.*": 0.9}``: each for
            the tensors in scope that its pattern names and no earlier one does; what none names is not pruned.
        score: Criterion, higher = more worth keeping: a registered name, or a function.
        scope: Patterns; default: the weights of Linear and convolution layers and attention projections; not embeddings,
            norms, biases, or the output head.
        structure: What is pruned as one unit: ``"entry"``, ``"row"``, ``"column"``, ``"head"``, ``"block:RxC"``,
            ``"tensor"``, ``"layer"``, as in ``FreezeMask``; or ``"channel"``: an output unit of a Linear or convolution layer
            with all that is coupled to it through residual connections, biases and BatchNorms, so that it can be removed
            (needs the package torch-pruning, ``lightning-mask[export]``).
        allocation: How zeros are shared among tensors: ``"global"``, ``"uniform"``, ``"erk"``, ``"row"``.
        schedule: Sparsity between ``start`` and ``end``: ``"constant"`` (all at once at ``start``), ``"linear"``,
            ``"cubic"`` (Zhu and Gupta 2017), ``"cosine"``, ``"geometric"`` (the same share of what is alive each time).
        start: Moment of the first update.
        end: Moment of the last update, at which the final sparsity is reached; unused where all is pruned at once.
        every: Moment between updates; unused likewise.
        regrow: What may come back until ``end``. ``"random"`` (SET), ``"gradient"`` (RigL: where the reduced gradient is
            largest): at every update a share of what is alive is dropped and as much is grown elsewhere, from zero.
            ``"ste"`` (straight-through): the network is that of the pruned weights, and all weights go on learning behind
            the mask by its gradients; at every update they are ranked anew, and what comes back has its learned value. None:
            nothing.
        regrow_fraction: The share that SET and RigL exchange at ``start``; it falls to 0 at ``end`` along a cosine.
        rewind: Moment to whose weights everything that trains returns after each update, with fresh moments (lottery
            ticket). None: weights go on.
        rewind_lr: Whether the learning rate's schedulers go back to that moment too.
        prune_held: Whether entries that FreezeMask or a phase holds at a value other than zero may be pruned.
        allow_whole_layers: Whether all of a weight of two or more dimensions may be pruned, which no gradient passes.
        batches: Number of training batches (per rank) shown to a criterion that needs data, at every update.
        seed: Seed of random criteria.
        engine: As in ``FreezeMask``.

    Attributes:
        history: One row for each update: ``step``, ``sparsity`` of the scope, ``layers`` (name to sparsity).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> PruneMask(0.9, schedule="cubic", start="10%", end="60%").history
        []
    """

    def __init__(
        self,
        sparsity: str | float | dict[str, float],
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
        rewind_lr: bool = True,
        prune_held: bool = False,
        allow_whole_layers: bool = False,
        batches: int = 32,
        seed: int = 0,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        self.engine = engine
        with _named():
            self.sparsity, self.n_of_m = read_sparsities(plain(sparsity))
            if self.n_of_m is not None:
                schedule = "constant"
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
        self.regrow, self.regrow_fraction, self.rewind_lr = regrow, regrow_fraction, rewind_lr
        self.rewind = None if rewind is None else Moment.parse(rewind, "PruneMask: rewind")
        self.prune_held, self.allow_whole_layers = prune_held, allow_whole_layers
        self.batches, self.seed = batches, seed
        self._check_arguments()
        ranked = Selection(score=score, density=1.0)
        self.needs_reference, self.own_criterion = may_need_reference(ranked), has_own(ranked)
        self.history: list[dict[str, Any]] = []
        self._ramp = Ramp(0, 0, 1, schedule)
        self._parts: list[tuple[list[str], float]] = []
        self._units: str | structures.Structure = structure
        self._last: list[float] = []
        self._updated = -1
        self._rewind = Rewind(rewind_lr)
        self._dense: dict[str, Tensor] = {}

    def _check_arguments(self) -> None:
        regrow, fraction = self.regrow, self.regrow_fraction
        if regrow not in (None, "random", "gradient", "ste"):
            raise ValueError(
                f"PruneMask: regrow={regrow!r} must be 'random' (SET), 'gradient' (RigL), 'ste' (straight-through) or None."
            )
        if self.n_of_m is not None and (self.structure != "entry" or regrow in ("random", "gradient")):
            raise ValueError(
                "PruneMask: an n:m sparsity chooses single entries of each group; leave structure out, and regrow too (or 'ste')."
            )
        if regrow in ("random", "gradient") and self.structure != "entry":
            raise ValueError(
                f"PruneMask: regrow exchanges single entries; structure={self.structure!r} does not go with it."
            )
        if regrow in ("random", "gradient") and self.allocation == "row":
            raise ValueError("PruneMask: regrow exchanges entries of a tensor; allocation='row' does not go with it.")
        if not isinstance(fraction, float | int) or not 0 < fraction <= 1:
            raise ValueError(f"PruneMask: regrow_fraction={fraction!r} must be a share in (0, 1].")
        if regrow is not None and self.prune_held:
            raise ValueError("PruneMask: what is held cannot learn or come back: leave regrow or prune_held out.")
        if regrow == "ste" and self.rewind is not None:
            raise ValueError("PruneMask: regrow='ste' keeps dense weights and rewind throws them away; choose one.")

    @property
    def state_key(self) -> str:
        """A key that tells several PruneMasks apart and does not depend on how zeros are held."""
        scope = json.dumps(self.scope)
        return self._generate_state_key(sparsity=self.sparsity, scope=scope, structure=self.structure, seed=self.seed)

    # What the session asks.

    @property
    def _learns_behind(self) -> bool:
        """Whether dense weights go on learning behind the masks of now."""
        return self.regrow == "ste" and 0 <= self._updated < self._ramp.end

    @property
    def held(self) -> MaskSet:
        """The masks whose other entries are held at zero."""
        return MaskSet({}) if self._learns_behind else self.masks

    @property
    def shown(self) -> MaskSet:
        """The masks behind which dense weights go on learning."""
        return self.masks if self._learns_behind else MaskSet({})

    def take_dense(self) -> dict[str, Tensor]:
        """Return the dense weights that a checkpoint brought, once."""
        dense, self._dense = self._dense, {}
        return dense

    def moved(self, session: Session) -> list[str]:
        """Names of what is ranked by the steps of training."""
        return self._names if criteria.accumulates(self.score) else []

    @property
    def _shared_by(self) -> str:
        """The allocation by which each tensor's zeros are known."""
        return "uniform" if self.n_of_m is not None else self.allocation

    @property
    def _names(self) -> list[str]:
        return [name for names, _ in self._parts for name in names]

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""
        self._parts = self._scope_parts(session)
        with _named():
            calibration.check_score(self.score, self._names, session.module)
        mine = set(self._names)
        for other in session.pruners:
            both = [] if other is self else [name for names, _ in other._parts for name in names if name in mine]
            if both and "ste" in (self.regrow, other.regrow):
                raise ValueError(
                    f"PruneMask: {both[0]} is in scope of two PruneMasks, and one of them has regrow='ste', which needs its "
                    "tensors for itself; take it out of the scope of the other."
                )
        if not self.prune_held:
            check_reach(session, self._parts, self._shared_by)

    def prepare(self, session: Session) -> None:
        """Find the model's channels, where these are what is pruned."""
        if self.structure == "channel":
            from lightning_mask.callbacks.channels import coupled  # which needs torch-pruning

            self._units, self._parts = coupled(session, self._scope_parts(session), self.scope is not None)

    def check_phases(self, session: Session) -> None:
        """Refuse a ramp that rises while a phase holds too much."""
        if not self._restored and not self.prune_held:
            check_phases(session, self._parts, self._ramp)

    def measure(self, run: Run) -> None:
        """Turn the ramp's moments into steps."""
        start = self.start.steps(run, "PruneMask: start")
        name, end, every = "start", start, 1
        if self.schedule != "constant" or self.regrow is not None:  # else all at once, whatever end and every are
            name, end = "end", self.end.steps(run, "PruneMask: end")
            every = max(self.every.steps(run, "PruneMask: every"), 1)
        if self.rewind is not None:
            self._rewind.step = self.rewind.steps(run, "PruneMask: rewind")
            if self._rewind.step > start:
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
        self._ramp = Ramp(*((start, end, every) if beyond else (min(start, last), last, every)), self.schedule)

    def begin(self, session: Session) -> None:
        """Start from nothing pruned, unless a checkpoint brought masks."""
        if self._restored:
            return
        parameters = dict(session.module.named_parameters())
        self._masks = MaskSet({name: full(True, parameters[name]) for name in self._names})
        self._last, self._updated, self.history = [0.0] * len(self._parts), -1, []
        self._rewind.forget()
        if session.phases is None and not self.prune_held and all(f.refresh is None for f in session.freezers):
            check_reach(session, self._parts, self._shared_by, session.free())
        final = [sparsity for _, sparsity in self._parts]
        scores = self._scores_before_training(session)
        if scores is not None:
            self._refuse_whole_layers(self._choose(scores, final, session), scores, final, session)
        session.say(self._cost(session))
        if self._rewind.step is not None and self._ramp.end >= session.run().total_steps - 1:
            session.say(
                f"PruneMask: the last update falls into the run's last step, after which nothing goes back to "
                f"rewind={str(self.rewind)!r}: end the ramp earlier or train longer"
            )

    def _scores_before_training(self, session: Session) -> Scores | None:
        """Scores by which the last update will empty the same layers; None where these cannot be told yet, or may go."""
        if self.allow_whole_layers or self.structure in _WHOLE or self.n_of_m is not None:
            return None
        parameters = dict(session.module.named_parameters())
        if self.allocation != "global":  # each tensor has a budget of its own, whatever is in it
            return {name: torch.zeros(()).expand(parameters[name].shape) for name in self._names}
        if not criteria.from_weights(self.score) or self.regrow in ("random", "gradient"):
            return None
        tensors = {name: parameters[name] for name in self._names}
        return criteria.compute(self.score, tensors, session.context(self.seed, self.batches))

    def advance(self, session: Session) -> str | None:
        """Keep the weights to rewind to when it is time, and go back to them after an update."""
        self._rewind.keep(session)
        self._rewind.go_back(session)
        return None

    def prune(self, session: Session) -> str | None:
        """Prune when an update is due at this step; return what was done."""
        self._rewind.keep(session)
        step, engine = session.step, session.engine
        due = self._ramp.last_update(step)
        if due is None or due[0] <= self._updated:
            return None
        assert engine is not None
        self._updated, progress = due
        rising = zip(self._parts, self._last, strict=True)  # a longer run's ramp may lie below at first
        sparsities = [max(self._ramp.sparsity(final, progress), last) for (_, final), last in rising]
        if sparsities == self._last and self.regrow is None:
            return None
        self._last = sparsities
        parameters = {name: session.module.get_parameter(name) for name in self._names}
        free, keeps = session.free(), {"anew": self.regrow == "ste", "prune_held": self.prune_held}
        with engine.behind.opened():
            with engine.whole_gradients():
                scores = criteria.compute(self.score, dict(parameters), session.context(self.seed, self.batches))
            for name, score in scores.items():
                scores[name] = constrained(score, parameters[name], free[name], self.masks[name], **keeps)
        if self.regrow in ("random", "gradient"):
            worth = growth(self.regrow, parameters, free, criteria.named_seed(self.seed, f"step {step}"))
            fraction = cosine_fraction(self.regrow_fraction, progress)
            chosen = {
                name: mask
                for (names, _), sparsity in zip(self._parts, sparsities, strict=True)
                for name, mask in drop_and_grow(
                    {n: scores[n] for n in names},
                    {n: worth[n] for n in names},
                    Budget(sparsity, removed=True),
                    self.allocation,
                    fraction,
                ).items()
            }
        else:
            chosen = self._choose(scores, sparsities, session)
        shares = {name: own(sharding.shard(mask, parameters[name])) for name, mask in chosen.items()}
        masks = MaskSet(shares, self._recipe(sparsities))
        session.agree(masks, "PruneMask")
        self._refuse_held(masks, scores, free)
        self._refuse_whole_layers(masks, scores, sparsities, session)
        self._masks, self._rewind.due = masks, self._rewind.step is not None
        self._record(session, masks)
        return f"sparsity {1 - masks.density():.4f} from step {step}"

    def _choose(self, scores: Scores, sparsities: list[float], session: Session) -> dict[str, Tensor]:
        if self.n_of_m is not None:
            return n_of_m(scores, *self.n_of_m, transposed=transposed_weights(session.module))
        budgets = [(n, Budget(s, removed=True)) for (n, _), s in zip(self._parts, sparsities, strict=True)]
        return choose(scores, budgets, self._units, self.allocation, session.module)

    def _record(self, session: Session, masks: MaskSet) -> None:
        layers = {name: 1 - active(mask) / max(mask.numel(), 1) for name, mask in masks.items()}
        self.history.append({"step": session.step, "sparsity": 1 - masks.density(), "layers": layers})
        for logger in session.trainer.loggers:
            logger.log_metrics({f"mask/sparsity/{name}": value for name, value in layers.items()}, step=session.step)

    def _cost(self, session: Session) -> str:
        """What this setting will come to, in one line."""
        tensors = {name: session.module.get_parameter(name) for name in self._names}
        entries = sum(t.numel() for t in tensors.values())
        zeros = sum(share(s, sum(tensors[n].numel() for n in names)) for names, s in self._parts)
        dense = sum(t.numel() * t.element_size() for t in tensors.values())
        sparse = dense * (1 - zeros / max(entries, 1)) + entries / 8
        said = f"PruneMask: {zeros:,} of {entries:,} entries in scope ({zeros / max(entries, 1):.2%}) are to be zero"
        ramp, updates = self._ramp, self._ramp.updates
        said += f" from step {ramp.end} on, in {updates:,} update{'s' if updates > 1 else ''}"
        if not criteria.from_weights(self.score) and not criteria.accumulates(self.score):
            total, shown = session.run().total_steps, updates * self.batches
            of = f", {shown / total:.1%} of the run's own steps," if math.isfinite(total) else ""
            said += f"; the criterion may look at up to {shown:,} batches{of} in all"
        return f"{said}; as values and bits they take {_size(sparse)} instead of {_size(dense)}"

    def _recipe(self, sparsities: list[float]) -> dict[str, Any]:
        sparsity: Any = sparsities[0]
        if isinstance(self.sparsity, Mapping):
            sparsity = dict(zip(self.sparsity, sparsities, strict=True))
        return {
            "pruned by": criteria.name_of(self.score),
            "sparsity": sparsity,
            "structure": self.structure,
            "allocation": self.allocation,
        }

    def _scope_parts(self, session: Session) -> list[tuple[list[str], float]]:
        module = session.module
        if self.scope is None:
            names = default_scope(module)
            with _named():
                names = structures.default_scope(self.structure, names, module)
        else:
            names = resolve(self.scope, module, "PruneMask: scope")
        if not names:
            why = "the model has no Linear, convolution or attention weight to prune"
            if self.scope is not None:
                why = f"scope={self.scope!r} leaves nothing to prune, as its '!' take away all that it names"
            raise ValueError(f"PruneMask: {why}; name other tensors in scope, for example 'weights:'.")
        with _named():
            found = parts(self.sparsity, names, module)
        parameters, transposed = dict(module.named_parameters()), transposed_weights(module)
        for name in (name for mine, _ in found for name in mine):
            if self.n_of_m is not None:
                shape = tuple(parameters[name].shape)
                check_n_of_m(f"PruneMask: {name}", shape, self.n_of_m[1], transposed.get(name, 0))
            if not parameters[name].is_floating_point():
                raise ValueError(f"PruneMask: {name} is of dtype {parameters[name].dtype}, which cannot be pruned.")
        if self.n_of_m is None and self.structure != "channel":
            shapes = {n: tuple(parameters[n].shape) for names, _ in found for n in names if parameters[n].numel()}
            with _named():
                budgets = [(names, Budget(sparsity, removed=True)) for names, sparsity in found]
                share_out(shapes, budgets, self.structure, self.allocation, module)
        return found

    def _refuse_held(self, masks: MaskSet, scores: Scores, free: MaskSet) -> None:
        for name, mask in masks.items():
            score = scores[name]
            kept = torch.isposinf(score) & ~mask.to(score.device)
            if sharding.count(kept):
                what, out = (
                    f"held entries of {name}",
                    "let FreezeMask or the phase train more of it, set prune_held=True",
                )
                if self.prune_held or not sharding.count(kept & ~free[name].to(score.device)):
                    what = f"entries of {name} that the criterion scores as infinite"
                    out = "give fewer of them an infinite score, or finite ones to all"
                sparsity = next(s for (names, _), s in zip(self._parts, self._last, strict=True) if name in names)
                raise ValueError(
                    f"PruneMask: sparsity {sparsity:.4f} cannot be reached without pruning {what}; {out}, or lower the "
                    "sparsity."
                )

    def _refuse_whole_layers(
        self, masks: Mapping[str, Tensor], scores: Scores, sparsities: list[float], session: Session
    ) -> None:
        if self.allow_whole_layers or self.structure in _WHOLE:
            return

        def at(share: float) -> dict[str, Tensor]:
            return self._choose(scores, [share * s for s in sparsities], session)

        with _named():
            check_emptied(max(sparsities), at, masks)

    def own_state(self) -> dict[str, Any]:
        """Return the sparsity reached, what to rewind to, and the dense weights that learn behind the masks."""
        state = {"last": self._last, "updated": self._updated, "rewind": self._rewind.state(), "history": self.history}
        engine = self._session.engine if self._session is not None else None
        if self._learns_behind and engine is not None:
            mine = set(self._names)
            state["dense"] = sharding.gathered({n: w for n, w in engine.behind.weights().items() if n in mine})
        return state

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`own_state` gave away."""
        self._last, self._updated, self.history = state["last"], state["updated"], state["history"]
        self._rewind.load(state["rewind"])
        self._dense = state.get("dense", {})


_WHOLE = ("tensor", "layer")
"""Structures whose units are whole tensors."""


@contextmanager
def _named() -> Iterator[None]:
    """Say in an error whose argument is at fault."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"PruneMask: {error}") from None


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
