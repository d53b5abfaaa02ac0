"""PruneMask: unimportant weights go to zero and stay there."""

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.callbacks.base import MaskCallback, plain
from lightning_mask.callbacks.freeze import Strings, may_need_reference
from lightning_mask.callbacks.session import Session
from lightning_mask.core import allocation as allocations
from lightning_mask.core import criteria, schedules, structures
from lightning_mask.core.allocation import Budget
from lightning_mask.core.engine import check_engine
from lightning_mask.core.maskset import MaskSet, active, full
from lightning_mask.core.patterns import repeated_blocks, resolve
from lightning_mask.core.schedules import Moment, Run
from lightning_mask.core.selection import Selection, choose


class PruneMask(MaskCallback):
    """Set the least important weights in scope to +0.0, along a schedule, and keep them there.

    At every update exactly ``floor(s * n + 0.5)`` of the ``n`` entries in scope are zero, ties broken by position; what is
    pruned stays pruned. An update happens after backward and before the optimizer's step.

    Args:
        sparsity: Final share of zeros in scope, a float in [0, 1).
        score: Criterion, higher = more worth keeping: a registered name, or a function.
        scope: Patterns; default: the weights of Linear and convolution layers and attention projections; not embeddings,
            norms, biases, or the output head.
        structure: What is pruned together: ``"entry"``, ``"row"``, ``"tensor"``.
        allocation: How zeros are shared among tensors: ``"global"``, ``"uniform"``, ``"erk"``.
        schedule: Sparsity between ``start`` and ``end``: ``"constant"`` (all at once at ``start``), ``"linear"``,
            ``"cubic"`` (Zhu and Gupta 2017).
        start: Moment of the first update.
        end: Moment of the last update, at which the final sparsity is reached.
        every: Moment between updates.
        batches: Number of training batches (per rank) shown to a criterion that needs data, at every update.
        seed: Seed of random criteria.
        engine: How zeros are held: ``"auto"`` or ``"dense"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        sparsity: float,
        *,
        score: str | Callable[..., Any] = "magnitude",
        scope: Strings = None,
        structure: str = "entry",
        allocation: str = "global",
        schedule: str = "cubic",
        start: str = "0%",
        end: str = "50%",
        every: str = "1%",
        batches: int = 32,
        seed: int = 0,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        self.engine = engine
        if isinstance(sparsity, bool) or not isinstance(sparsity, float | int) or not 0 <= sparsity < 1:
            raise ValueError(
                f"PruneMask: sparsity={sparsity!r} must be a share in [0, 1), e.g. 0.9 to set 90 % to zero."
            )
        try:
            criteria.get(score)
            structures.get(structure)
            allocations.get(allocation)
            self._shape = schedules.schedule(schedule)
        except ValueError as error:
            raise ValueError(f"PruneMask: {error}") from None
        self.sparsity, self.score, self.scope = float(sparsity), score, plain(scope)
        self.structure, self.allocation, self.schedule = structure, allocation, schedule
        self.start, self.end, self.every = (
            Moment.parse(m, f"PruneMask: {n}") for m, n in ((start, "start"), (end, "end"), (every, "every"))
        )
        self.batches, self.seed = batches, seed
        self.needs_reference = may_need_reference(Selection(score=score, density=1.0))
        self._steps = (0, 0, 1)
        self._names: list[str] = []
        self._last = 0.0

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
        start, end = self.start.steps(run, "PruneMask: start"), self.end.steps(run, "PruneMask: end")
        every = max(self.every.steps(run, "PruneMask: every"), 1)
        if self.schedule == "constant":
            end = start
        if end < start:
            raise ValueError(f"PruneMask: end={str(self.end)!r} lies before start={str(self.start)!r} in this run.")
        if end > run.total_steps:
            raise ValueError(
                f"PruneMask: end={str(self.end)!r} is step {end}, and the run has {run.total_steps:g}; end the ramp earlier "
                "or train longer."
            )
        last = int(min(end, run.total_steps - 1))  # an update needs a step after it
        self._steps = (min(start, last), last, every)

    def begin(self, session: Session) -> None:
        """Start from nothing pruned, unless a checkpoint brought masks."""
        if not self._restored:
            parameters = dict(session.module.named_parameters())
            self._masks = MaskSet({name: full(True, parameters[name].shape) for name in self._names})
            self._last = 0.0

    def target(self, step: int) -> float | None:
        """Return the sparsity that is due at ``step`` (optimizer steps done), None before ``start``."""
        start, end, every = self._steps
        if step < start:
            return None
        updated = end if step >= end else step - (step - start) % every
        progress = (updated - start) / (end - start) if end > start else 1.0
        return self.sparsity * self._shape(progress)

    def prune(self, session: Session) -> str | None:
        """Prune when an update is due at this step; return what was done."""
        step = session.step
        sparsity = self.target(step)
        if sparsity is None or sparsity == self._last:
            return None
        self._last = sparsity
        parameters = {name: session.module.get_parameter(name) for name in self._names}
        scores = criteria.compute(self.score, dict(parameters), session.context(self.seed, self.batches))
        free = session.free()
        for name, score in scores.items():
            scores[name] = _constrained(score, parameters[name], self.masks[name], free[name])
        budget = Budget(sparsity, removed=True)
        masks = MaskSet(choose(scores, budget, self.structure, self.allocation), self._recipe(sparsity))
        session.agree(masks, "PruneMask")
        self._refuse_held(masks, scores)
        self._masks = masks
        return f"sparsity {1 - masks.density():.4f} from step {step}"

    def _recipe(self, sparsity: float) -> dict[str, Any]:
        score = self.score if isinstance(self.score, str) else self.score.__qualname__
        return {"pruned by": score, "sparsity": sparsity, "structure": self.structure, "allocation": self.allocation}

    def _scope_names(self, session: Session) -> list[str]:
        module = session.module
        names = default_scope(module) if self.scope is None else resolve(self.scope, module, "PruneMask: scope")
        if not names:
            raise ValueError(
                "PruneMask: the model has no Linear, convolution or attention weight to prune; name tensors in scope."
            )
        parameters = dict(module.named_parameters())
        for name in names:
            if not parameters[name].is_floating_point():
                raise ValueError(f"PruneMask: {name} is of dtype {parameters[name].dtype}, which cannot be pruned.")
        return names

    def _check_reach(self, session: Session) -> None:
        """Refuse a sparsity that what FreezeMask holds whole rules out (held entries are not pruned)."""
        if session.phases is not None or not session.freezers:
            return
        module = session.module
        sizes = {name: module.get_parameter(name).numel() for name in self._names}
        total, free = sum(sizes.values()), sum(sizes.values())
        for freezer in session.freezers:
            selection = freezer.selection
            whole = sum(sizes.get(name, 0) for name in resolve(selection.train or (), module))
            ranked = selection.scope_names(module, session.trainable)
            some = sum(module.get_parameter(name).numel() for name in ranked)
            part = Budget(selection.density).keep(some) if selection.density is not None else 0
            if selection.mask is not None:
                part = sum(active(mask) for name, mask in selection.given(module).items() if name in sizes)
            free = min(free, whole + part)
        if allocations.share(self.sparsity, total) > free:
            raise ValueError(
                f"PruneMask: sparsity={self.sparsity} of the {total:,} entries in scope cannot be reached: FreezeMask holds "
                f"all but {free:,} of them, and a held entry is not pruned. Let FreezeMask train them, or give PruneMask a "
                "scope that trains."
            )

    def _refuse_held(self, masks: MaskSet, scores: dict[str, Tensor]) -> None:
        for name, mask in masks.items():
            if bool((torch.isposinf(scores[name]) & ~mask.to(scores[name].device)).any()):
                raise ValueError(
                    f"PruneMask: sparsity {self._last:.4f} cannot be reached without pruning held entries of {name}; let "
                    "FreezeMask or the phase train more of it, or lower the sparsity."
                )

    def own_state(self) -> dict[str, Any]:
        """Return the sparsity reached."""
        return {"last": self._last}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over the sparsity reached."""
        self._last = state["last"]


def _constrained(score: Tensor, parameter: Tensor, alive: Tensor, free: Tensor) -> Tensor:
    """Scores under which what is pruned stays pruned and what is held and not zero stays."""
    score = score.float().masked_fill(~alive.to(score.device), -torch.inf)
    held = ~free.to(score.device) & alive.to(score.device) & (parameter.detach() != 0).to(score.device)
    return score.masked_fill(held, torch.inf)


def default_scope(module: nn.Module) -> list[str]:
    """Return the names of what is pruned by default: weights of Linear, convolution and attention layers.

    The output head is left out: the last such layer of the model when it lies outside the repeated blocks, and there is
    another one. Embeddings, and what is tied to one, are left out too.
    """
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    blocks = tuple(f"{name}." for name in repeated_blocks(module))
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    layers: list[tuple[str, list[Tensor]]] = []
    for path, layer in module.named_modules():
        weights: list[Tensor | None] = []
        if isinstance(layer, kinds) or type(layer).__name__ == "Conv1D":  # transformers' transposed Linear
            weights = [layer.weight]
        elif isinstance(layer, nn.MultiheadAttention):
            weights = [layer.in_proj_weight, layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
        found = [w for w in weights if isinstance(w, nn.Parameter) and id(w) not in embedded and w.is_floating_point()]
        if found:
            layers.append((path, list(found)))
    if len(layers) > 1 and not f"{layers[-1][0]}.".startswith(blocks or ("\0",)):
        layers.pop()
    wanted = {id(w) for _, found in layers for w in found}
    return [name for name, p in module.named_parameters() if id(p) in wanted]
