"""PhaseUnfreeze: change what is held as training goes on."""

import math
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mask.callbacks.averages import averages_of
from lightning_mask.callbacks.base import MaskCallback
from lightning_mask.callbacks.freeze import (
    draw_due,
    has_own,
    may_need_reference,
    moved_by,
    refresh_steps,
)
from lightning_mask.callbacks.phase import Phase, gradual, make_phases, read_phases, recipe_of, write_phases
from lightning_mask.callbacks.session import Session
from lightning_mask.core import sharding
from lightning_mask.core.distributed import mean_over_ranks, require_equal
from lightning_mask.core.optimizers import parameters_of
from lightning_mask.core.patterns import resolve
from lightning_mask.core.schedules import Moment, Plateau, Run


@dataclass
class _Progress:
    """How the current phase stands; all of it is saved."""

    phase: int = 0
    since: int = 0
    draws: int = 0
    drawn: int = 0
    source: str | None = None
    best: float | None = None
    waited: int = 0
    ended: bool = False
    best_weights: dict[str, Tensor] = field(default_factory=dict)


class PhaseUnfreeze(MaskCallback):
    """Train in phases, each with its own selection of active entries and its own rate.

    A phase ends after the optimizer step at which its moment is reached; the next is in force from the next forward pass
    on. The optimizer keeps its param groups, so schedulers are undisturbed; entries that stay active keep their moments,
    new ones start from zero. Under DDP the reducer is rebuilt for the tensors that train. A run that is resumed needs the
    phases that it had up to the current one; later ones may be edited.

    Args:
        phases: List of ``Phase`` or of dicts of its arguments, the last without ``until``; the path of a YAML file of the
            same; or ``"gradual"``: the model's repeated blocks from the output down, one more each ``every`` (Howard and
            Ruder, "Universal Language Model Fine-tuning", 2018, section 3.3).
        every: Moment between the phases of ``"gradual"``.
        lr_decay: Each block's rate in ``"gradual"`` is that of the block above it divided by this (ULMFiT: 2.6).

    Raises:
        ValueError: If a phase has an unknown argument, or the phases do not end, or end in the wrong order.
    """

    def __init__(
        self,
        phases: list[Phase | dict[str, Any]] | str | os.PathLike[str],
        every: str | None = None,
        lr_decay: float = 1.0,
    ) -> None:
        gradual = phases == "gradual"
        if gradual != (every is not None):
            raise ValueError(
                "PhaseUnfreeze: every= goes with phases='gradual', and 'gradual' needs it, e.g. every='1 epochs'."
            )
        number = isinstance(lr_decay, float | int) and lr_decay > 0
        if not number or (lr_decay != 1.0 and not gradual):
            raise ValueError(
                f"PhaseUnfreeze: lr_decay={lr_decay!r} must be a positive number and goes with phases='gradual'."
            )
        self._every = None if every is None else Moment.parse(every, "PhaseUnfreeze: every")
        self._lr_decay = float(lr_decay)
        self.phases: list[Phase] = []
        if not isinstance(phases, str | os.PathLike | Sequence):
            raise ValueError(
                f"PhaseUnfreeze: phases={phases!r} must be a list of phases, the path of a YAML file of one, or 'gradual'."
            )
        if not gradual:
            given = read_phases(phases) if isinstance(phases, str | os.PathLike) else phases
            self._set(make_phases(given))
        self._progress = _Progress()
        self.history: list[dict[str, Any]] = []
        self._until: list[float] = []
        self._warmup: list[int] = []
        self._refresh: list[int] = []
        self._recipes: list[dict[str, Any]] = []

    def _set(self, phases: list[Phase]) -> None:
        if not phases:
            raise ValueError("PhaseUnfreeze: the list of phases is empty; give it at least one.")
        if phases[0].restart:
            raise ValueError("PhaseUnfreeze: phase 0 begins with training itself; leave its restart out.")
        for i, phase in enumerate(phases[:-1]):
            if phase.until is None:
                raise ValueError(f"PhaseUnfreeze: phase {i} never ends and another follows it; give it until=.")
        if phases[-1].until is not None:
            raise ValueError(
                f"PhaseUnfreeze: the last phase ends ({phases[-1].until}) and nothing follows; leave its until out."
            )
        self.phases = phases
        asked = {phase.engine for phase in phases}
        self.engine = next((engine for engine in ("dense", "compact") if engine in asked), "auto")
        self.needs_reference = any(p.restart or may_need_reference(p.selection) for p in phases)
        self.own_criterion = any(has_own(p.selection) for p in phases)

    @property
    def phase(self) -> int:
        """Index of the current phase."""
        return self._progress.phase

    @property
    def current(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase]

    @property
    def ends(self) -> list[float]:
        """The optimizer step at which each phase ends; ``inf`` where that is not known before."""
        return self._until

    @property
    def selects(self) -> bool:
        """Whether the current phase names a selection, which takes the place of the FreezeMasks."""
        return not self.current.selection.empty

    def label(self, index: int) -> str:
        """Return the name of a phase, or its number."""
        return self.phases[index].name or f"phase {index}"

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""
        if self._every is not None:
            self._set(gradual(session.module, self._every, self._lr_decay))
        for i, phase in enumerate(self.phases):
            session.check_selection(phase.selection, f"PhaseUnfreeze: {self.label(i)}")
            self._refuse_rates(session, self._factors(session.module, phase), self.label(i))

    def _refuse_rates(self, session: Session, factors: dict[str, float], label: str) -> None:
        parameters = dict(session.module.named_parameters())
        for optimizer in session.trainer.optimizers:
            owned = {id(p) for p in parameters_of(optimizer)}
            rates = {factors[name] for name, p in parameters.items() if id(p) in owned}
            if isinstance(optimizer, torch.optim.LBFGS) and len(rates) > 1:
                raise ValueError(
                    f"PhaseUnfreeze: {label}: LBFGS takes one learning rate for all tensors; give lr_scale one number."
                )

    def measure(self, run: Run) -> None:
        """Turn the phases' moments into steps."""
        self._until, self._warmup, self._refresh = [], [], []
        before = 0.0
        for i, phase in enumerate(self.phases):
            where = f"PhaseUnfreeze: {self.label(i)}"
            self._warmup.append(0 if phase.warmup is None else phase.warmup.steps(run, f"{where}: warmup"))
            self._refresh.append(refresh_steps(phase.refresh, run, where))
            end = math.inf
            if isinstance(phase.until, Moment):
                whole_epochs = phase.until.unit == "epochs" and phase.until.value == int(phase.until.value)
                known = not whole_epochs or math.isfinite(run.steps_per_epoch)
                end = phase.until.steps(run, f"{where}: until") if known else math.inf
                short = phase.until.unit == "%" and phase.until.value > 0  # may come to no step at all in a short run
                if known and (end < before or (end == before and not short)):
                    raise ValueError(
                        f"{where}: until={str(phase.until)!r} is step {end}, not after the phase before (step {before:g})."
                    )
                before = end if known else before
            self._until.append(end)

    def begin(self, session: Session) -> None:
        """Enter the first phase, or the one a checkpoint says.

        Raises:
            ValueError: If the phases up to that one are not those of the checkpoint.
        """
        saved, self._recipes = self._recipes, [recipe_of(phase, session.module) for phase in self.phases]
        if self._restored:
            self._refuse_edited(saved)
            self._refuse_lost_start(session)
            return
        self._progress, self.history, self._validated = _Progress(), [], False
        self._enter(session, 0, "start")
        self._write(session)

    def _refuse_edited(self, saved: list[dict[str, Any]]) -> None:
        """What a checkpoint says of the current phase is true of the phases that led to it; later ones may be edited."""
        out = "or start a new run from the weights (fit without ckpt_path)."
        if self.phase >= len(self.phases):
            raise ValueError(
                f"PhaseUnfreeze: the checkpoint is in phase {self.phase}, and there are {len(self.phases)} phases now; give "
                f"all that the run had up to there, {out}"
            )
        for i, (was, now) in enumerate(zip(saved[: self.phase + 1], self._recipes, strict=False)):
            odd = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
            if odd:
                here, there = (", ".join(f"{k}={reprlib.repr(p.get(k))}" for k in odd) for p in (now, was))
                raise ValueError(
                    f"PhaseUnfreeze: {self.label(i)} has {here}, and not {there} as in the checkpoint, which is in phase "
                    f"{self.phase}; phases after that may be edited, so give this one as it was, {out}"
                )

    def _refuse_lost_start(self, session: Session) -> None:
        again = [i for i, phase in enumerate(self.phases) if phase.restart and i > self.phase]
        needed = {*dict(session.module.named_parameters()), *dict(session.module.named_buffers())}
        if again and not needed <= (session.reference or {}).keys():
            raise ValueError(
                f"PhaseUnfreeze: {self.label(again[0])} has restart=True, and the checkpoint is of a run in which no phase still "
                "to come had, so the weights from the start of training are not in it; leave restart out, or start a new run "
                "from the weights (fit without ckpt_path)."
            )

    def advance(self, session: Session) -> str | None:
        """Enter the next phase when the current one has ended; return why."""
        reason = None
        while self.phase < len(self.phases) - 1 and (due := self._due(session)):
            reason = due
            self._go_back(session, reason)
            self._enter(session, self.phase + 1, reason)
            self._restart(session, reason)
        if reason is not None:
            name = f" ({self.current.name})" if self.current.name else ""
            start = " from the weights at the start of training" if self.current.restart else ""
            return f"Phase {self.phase}{name} begins at step {session.step}{start}, after {reason}"
        now = self._progress
        if not draw_due(session.step - now.since, now.drawn - now.since, self._refresh[self.phase]):
            return None
        now.draws, now.drawn = now.draws + 1, session.step
        self._masks = session.select(self.current.selection, now.draws)
        return f"Phase {self.phase}: mask drawn anew at step {session.step}"

    def moved(self, session: Session) -> list[str]:
        """Names of what a later phase, or a mask drawn anew, ranks by the steps of training."""
        first, *later = self.phases
        ranked = [phase.selection for phase in later] + ([] if first.refresh is None else [first.selection])
        return [name for selection in ranked for name in moved_by(selection, session)]

    def done_with_reference(self) -> bool:
        """Whether no later phase, nor a mask of this one that is to be drawn anew, may ask for the first weights."""
        later = any(phase.restart or may_need_reference(phase.selection) for phase in self.phases[self.phase + 1 :])
        return not later and (self.current.refresh is None or not may_need_reference(self.current.selection))

    def _due(self, session: Session) -> str | None:
        """Why the current phase has ended by now, or None."""
        until = self.current.until
        if isinstance(until, Plateau):
            return f"{until.monitor} stopped improving" if self._progress.ended else None
        assert until is not None
        epochs = until.unit == "epochs" and until.value == int(until.value)
        reached = session.trainer.current_epoch >= until.value if epochs else session.step >= self._until[self.phase]
        return str(until) if reached else None

    def _enter(self, session: Session, index: int, reason: str) -> None:
        if session.trainer.world_size > 1:
            require_equal((index, session.step), "PhaseUnfreeze: the phase to enter and its step")
        self._progress = _Progress(phase=index, since=session.step, drawn=session.step)
        if self.selects:
            self._masks = session.select(self.current.selection)
        else:
            self._masks = session.free()
        if not self._masks.count():
            raise ValueError(f"PhaseUnfreeze: {self.label(index)} trains nothing; let it name at least one entry.")
        self.history.append({"phase": index, "name": self.label(index), "step": session.step, "reason": reason})

    def rates(self, session: Session) -> dict[str, float]:
        """Return the factor on the learning rate of each tensor at the coming step."""
        factors = self._factors(session.module, self.current)
        if self.current.warmup is not None:
            length = max(self._warmup[self.phase], 1)
            rise = min((session.step - self._progress.since + 1) / length, 1.0)
            factors = {name: factor * rise for name, factor in factors.items()}
        return factors

    def _factors(self, module: nn.Module, phase: Phase) -> dict[str, float]:
        names = [name for name, _ in module.named_parameters()]
        if not isinstance(phase.lr_scale, dict):
            return dict.fromkeys(names, float(phase.lr_scale))
        factors: dict[str, float] = {}
        for pattern, factor in phase.lr_scale.items():
            for name in resolve(pattern, module, "PhaseUnfreeze: lr_scale"):
                factors.setdefault(name, float(factor))
        return {name: factors.get(name, 1.0) for name in names}

    def watch(self, session: Session, after_training: bool) -> None:
        """Look at the metric that ends the current phase; called after each validation and each training epoch.

        Raises:
            RuntimeError: If the metric was never logged, naming those that were.
        """
        plateau = self.current.until
        trainer = session.trainer
        if not isinstance(plateau, Plateau) or self._progress.ended or self.phase == len(self.phases) - 1:
            return
        metrics = trainer.callback_metrics
        now = "training" if after_training else "validation"
        if plateau.monitor not in metrics:
            if after_training and (self._validated or not trainer.enable_validation):
                known = ", ".join(sorted(metrics)) or "none"
                raise RuntimeError(
                    f"PhaseUnfreeze: {self.label(self.phase)} monitors {plateau.monitor!r}, which was not logged; the metrics "
                    f"logged by now: {known}."
                )
            self._validated = self._validated or not after_training
            return
        self._progress.source = self._progress.source or now  # whichever logs it first is when it is fresh
        if self._progress.source != now:
            return
        value = float(mean_over_ranks(metrics[plateau.monitor].detach().float().to(trainer.strategy.root_device)))
        if plateau.improves(value, self._progress.best):
            self._progress.best, self._progress.waited = value, 0
            if self.current.restore_best:
                self._progress.best_weights = _trained(session.module)
        else:
            self._progress.waited += 1
            self._progress.ended = self._progress.waited >= plateau.patience

    _validated: bool = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to the best weights also where the run ends as the phase does; weight averages are left alone."""
        super().on_train_end(trainer, pl_module)
        session = self._session
        if session is None or session.closed:
            return
        session.settle()
        if self._progress.ended and self._progress.best_weights and not averages_of(session.trainer):
            reason = f"{self.label(self.phase)} ended with the run"
            self._go_back(session, reason)
            session._hold()
            session.tell("on_masks_changed", reason)
            session.say(f"{reason}: back to its best weights ({self._progress.best:g})")

    @torch.no_grad()
    def _go_back(self, session: Session, reason: str) -> None:
        best = self._progress.best_weights
        if not best:
            return
        session.tell("on_masks_changing", reason)
        tensors = {**dict(session.module.named_parameters()), **dict(session.module.named_buffers())}
        for name, value in best.items():
            sharding.local(tensors[name]).copy_(sharding.part(value, tensors[name]))
        session.zero_pruned()  # more may be pruned by now than when the best was seen

    def _restart(self, session: Session, reason: str) -> None:
        if self.current.restart:
            session.tell("on_masks_changing", reason)
            session.restart()

    def _write(self, session: Session) -> None:
        """Write the resolved phases as YAML into the run's folder, on rank zero."""
        trainer = session.trainer
        folder = trainer.log_dir or trainer.default_root_dir
        if bool(getattr(trainer, "fast_dev_run", False)) or not trainer.loggers:
            return
        write_phases(self.phases, Path(folder) / "phases.yaml", writes=trainer.is_global_zero)

    def own_state(self) -> dict[str, Any]:
        """Return how the phases stand, and their recipes."""
        return {
            "progress": {**vars(self._progress), "best_weights": sharding.gathered(self._progress.best_weights)},
            "history": [dict(entry) for entry in self.history],
            "phases": self._recipes,
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over how the phases stand."""
        self._progress = _Progress(**state["progress"])
        self.history, self._recipes = list(state["history"]), state["phases"]


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """Copies of what training may change: tensors that require a gradient, and buffers; sharded where they are."""
    tensors: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    tensors |= dict(module.named_buffers())
    return {n: t.detach().clone() if sharding.is_sharded(t) else t.detach().cpu().clone() for n, t in tensors.items()}
