"""Session: what all mask callbacks of one fit share: the engine, the masks in force, and when they change.

Who calls whom: Lightning calls a hook on each mask callback; the first in the list passes it to the session; the session
asks the callbacks for their masks, combines them, and tells the engine. Masks change in two places only: pruning in
``after_backward`` (weights and reduced gradients are both at hand there), phases and redrawn masks in ``before_batch``
(a tensor that had no gradient in this backward cannot train in this step).
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_mask.callbacks import calibration, random_state
from lightning_mask.callbacks.averages import averages_of
from lightning_mask.callbacks.ddp import Reduction
from lightning_mask.callbacks.engine_choice import choose_engine
from lightning_mask.callbacks.facts import Facts
from lightning_mask.callbacks.optimizer_names import arrange
from lightning_mask.callbacks.packages import twins
from lightning_mask.callbacks.sharded import STORED, numbers_of, state_of, take_over
from lightning_mask.core import sharding
from lightning_mask.core.criteria import Context, named_seed
from lightning_mask.core.distributed import require_equal_masks
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.maskset import MaskSet, active, both, full
from lightning_mask.core.movement import Movement
from lightning_mask.core.optimizers import parameters_of
from lightning_mask.core.schedules import Run
from lightning_mask.core.selection import Selection, select

if TYPE_CHECKING:
    from lightning_mask.callbacks.base import MaskCallback


class Session:
    """Shared by the mask callbacks of one Trainer during one fit.

    Args:
        trainer: The Trainer.
        module: Its module.
        members: All mask callbacks of the Trainer, in its order.

    Raises:
        ValueError: If there is more than one PhaseUnfreeze.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, members: "Sequence[MaskCallback]") -> None:
        from lightning_mask.callbacks.freeze import FreezeMask
        from lightning_mask.callbacks.phases import PhaseUnfreeze
        from lightning_mask.callbacks.prune import PruneMask

        self.trainer, self.module, self.members = trainer, module, list(members)
        self.freezers: list[FreezeMask] = [m for m in members if isinstance(m, FreezeMask)]
        self.pruners: list[PruneMask] = [m for m in members if isinstance(m, PruneMask)]
        phased: list[PhaseUnfreeze] = [m for m in members if isinstance(m, PhaseUnfreeze)]
        if len(phased) > 1:
            raise ValueError("A Trainer takes one PhaseUnfreeze; put the phases of all of them into one list.")
        self.phases = phased[0] if phased else None
        self.engine: MaskEngine | None = None
        self.closed = False
        self.stored: dict[str, Any] = {}
        self._checkpoint: dict[str, Any] | None = None
        self.engine_reason = ("dense", "")
        self._begun = False
        self._reduction: Reduction | None = None
        self._required: dict[str, bool] = {}
        self.owned: set[str] = set()
        """Names of the tensors that an optimizer held before this fit."""
        self.reference: dict[str, Tensor] | None = None
        """The weights at the start of training (and the buffers, where a phase restarts), where somebody needs them."""
        self.movement: Movement | None = None
        """Where training has moved the entries to, where somebody needs it."""
        self._in_window = self._applied = self._epoch_ended = False
        self._epoch = -1
        self.facts = Facts()
        take_over(trainer, module, lambda: self.engine)

    # Facts about the run.

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.trainer.global_step

    @cached_property
    def sharded(self) -> bool:
        """Whether the parameters are dealt out over the ranks."""
        return sharding.deals_out(self.module)

    @property
    def trainable(self) -> set[str]:
        """Names of the tensors that required a gradient before this fit."""
        return {name for name, required in self._required.items() if required}

    def run(self) -> Run:
        """Return the lengths that moments are measured against; known once the training data is set up."""
        total = self.trainer.estimated_stepping_batches
        batches = self.trainer.num_training_batches
        per_epoch = math.ceil(batches / self.trainer.accumulate_grad_batches) if math.isfinite(batches) else math.inf
        debug = bool(getattr(self.trainer, "fast_dev_run", False))
        if len(self.trainer.optimizers) > 1:  # by hand: a batch has as many steps as the user likes
            return Run(math.inf, math.inf, debug, len(self.trainer.optimizers))
        return Run(total if total > 0 else math.inf, per_epoch, debug)

    def context(self, selection_seed: int, batches: int) -> Context:
        """Return what a criterion may look at; under DDP with the buffers of rank 0, which are those that are saved."""
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel) and wrapper.broadcast_buffers:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, src=0)
        return Context(
            self.module,
            loss=lambda batch: calibration.batch_loss(self.trainer, self.module, batch),
            sampled_loss=calibration.sampled_loss(self.trainer, self.module),
            batches=lambda: calibration.training_batches(self.trainer, batches),
            seed=selection_seed,
            reference=self.reference,
            movement=self.movement.sums if self.movement is not None and self.movement.steps else None,
        )

    def select(self, selection: Selection, draw: int = 0) -> MaskSet:
        """Follow a recipe, for the ``draw``-th time; return masks that all ranks agree on.

        Raises:
            ValueError: If the recipe is at fault.
            RuntimeError: If ranks chose different masks.
        """
        if draw:
            selection = replace(selection, seed=named_seed(selection.seed, f"draw {draw}"))
        with nullcontext() if self.engine is None else self.engine.whole_gradients():
            masks = select(selection, self.module, self.context(selection.seed, selection.batches), self.trainable)
        self.agree(masks, "A new mask")
        return masks

    def agree(self, masks: MaskSet, what: str) -> None:
        """Stop all ranks unless they hold the same masks."""
        if self.trainer.world_size > 1:
            require_equal_masks(masks.digests(), what)

    # The life of a fit.

    def check(self) -> None:
        """Refuse bad input before training.

        Raises:
            ValueError: One sentence that names the culprit and the way out.
        """
        if isinstance(self.trainer.strategy, twins(*_REFUSED)):
            raise ValueError(
                f"{type(self.trainer.strategy).__name__} flattens or hides the parameters, so masks cannot follow them; use "
                "ModelParallelStrategy with fully_shard (FSDP2), or DDP."
            )
        self._required = {name: p.requires_grad for name, p in self.module.named_parameters()}
        held = {id(p) for optimizer in self.trainer.optimizers for p in parameters_of(optimizer)}
        self.owned = {name for name, p in self.module.named_parameters() if id(p) in held}
        for member in self.members:
            member.check(self)
        if self._checkpoint is not None:
            names: dict[Tensor, str] = {p: name for name, p in self.module.named_parameters()}
            states, saved = self._checkpoint.get("optimizer_states", []), self._checkpoint[STORED]["names"]
            arrange(states, saved, self.trainer.optimizers, names)
            self._checkpoint = None

    def check_selection(self, selection: Selection, where: str) -> None:
        """Refuse a recipe that cannot work with this module and its optimizers.

        Raises:
            ValueError: Naming ``where`` the recipe stands.
        """
        try:
            selection.check(self.module, self.trainable)
            if selection.score is not None:
                calibration.check_score(
                    selection.score, selection.scope_names(self.module, self.trainable), self.module
                )
        except (ValueError, FileNotFoundError) as error:
            raise (ValueError if isinstance(error, ValueError) else FileNotFoundError)(f"{where}: {error}") from None
        if selection.score is None and not selection.empty:
            masks = select(selection, self.module, Context(self.module))
            if not masks.count():
                raise ValueError(f"{where} trains nothing; let it name at least one tensor.")
            trained = [name for name, mask in masks.items() if active(mask)]
        else:
            whole = select(Selection(train=selection.train or ()), self.module, Context(self.module))
            trained = [n for n, m in whole.items() if active(m)] + selection.scope_names(self.module, self.trainable)
        for name in trained:
            if name not in self.owned:
                raise ValueError(
                    f"{where}: {name} is to train, and no optimizer holds it; hand it to the optimizer in "
                    f"configure_optimizers, or take it away with '!{name}'."
                )

    def start(self) -> None:
        """Choose masks or take them from the checkpoint, hold, and put the random state back."""
        calibration.take_places(self.trainer)
        run = self.run()
        sharding.reshard(self.module)
        for member in self.members:
            member.take_part(self.module)
            member.prepare(self)
            member.measure(run)
        for pruner in self.pruners:
            pruner.check_phases(self)
        shared = next((m._shared for m in self.members if m._shared), None)
        if any(member.needs_reference for member in self.members):
            self.reference = self._start_of_training(shared)
        moved = dict.fromkeys(name for member in self.members for name in member.moved(self))
        if moved:
            self.movement = Movement(self.module, moved, (shared or {}).get("movement"))
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            regrows = any(pruner.regrow for pruner in self.pruners)
            self._reduction = Reduction(self.trainer.strategy, self.trainable, regrows)
        # Each builds on those before: masks, then phases, then pruners.
        for member in sorted(self.members, key=lambda m: (m in self.pruners, m is self.phases)):
            member.begin(self)
        self._hold()
        if any(member._restored for member in self.members):  # those that were chosen now are compared already
            assert self.engine is not None
            self.agree(MaskSet(self.engine.masks), "The masks of a checkpoint")
        self._drop_reference()
        self._sync_reducer()
        if shared:
            random_state.restore(shared["random"])
            calibration.begin_epoch_again(self.trainer)
        for member in self.members:
            member._shared, member._restored = None, False
        self._checkpoint = None  # under FSDP2 it came after the check
        self.tell("on_masks_changed", "start")
        for line in self.how_held():
            self.say(line)
        count, total = self.facts.active, sum(p.numel() for p in self.module.parameters())
        names = ", ".join(dict.fromkeys(type(m).__name__ for m in self.members))
        self.say(f"{names}: {count:,} of {total:,} entries train ({count / max(total, 1):.2%})")

    def _start_of_training(self, shared: dict[str, Any] | None) -> dict[str, Tensor] | None:
        """The weights of now, or those that a checkpoint brought; None where the run that wrote it had kept none."""
        now: dict[str, Tensor] = dict(self.module.named_parameters())
        if self.phases is not None and any(phase.restart for phase in self.phases.phases):
            now |= dict(self.module.named_buffers())
        if not any(member._restored and member.needs_reference for member in self.members):
            return {name: value.detach().clone() for name, value in now.items()}
        kept = (shared or {}).get("reference")
        return kept and {name: sharding.shard(kept[name], value) for name, value in now.items() if name in kept}

    def _drop_reference(self) -> None:
        """Let go of the first weights when nobody needs them any more; they take as much as the model, in checkpoints too."""
        if all(member.done_with_reference() for member in self.members):
            self.reference = None

    def restart(self) -> None:
        """Go back to the weights and buffers of the start of training, with fresh moments; :meth:`_hold` comes next."""
        assert self.engine is not None
        self.engine.restart(self.reference or {})

    def how_held(self) -> list[str]:
        """Return, one line each, how tensors are held of which some entries are active, and why; empty without any."""
        assert self.engine is not None
        if not any(0 < row.density < 1 for row in self.engine.summary()):
            return []
        return [f"Scattered entries are held {self.engine_reason[0]}: {self.engine_reason[1]}", *self.engine.remarks()]

    def before_batch(self) -> None:
        """Put new phases and redrawn masks in force, between two optimizer steps."""
        if self.sharded:
            sharding.reshard(self.module)
        self._begun = True  # by now every callback had its say in on_train_start, about communication hooks too
        self.settle()
        if averages_of(self.trainer) and self._epoch != self.trainer.current_epoch and self.engine is not None:
            self._epoch = self.trainer.current_epoch
            self.engine.restore()  # an average may have been written into the model when the epoch began
        if self._in_window:
            return
        changed = [reason for m in self.members if (reason := m.advance(self))]
        if changed:
            self.tell("on_masks_changing", "; ".join(changed))
            self._hold()
            self._drop_reference()
            self.tell("on_masks_changed", "; ".join(changed))
            density = self.facts.values["mask/density"]
            self.say(f"{'; '.join(changed)}: {self.facts.active:,} entries train ({density:.2%})")
        if self.phases is not None:
            assert self.engine is not None
            self.engine.set_rates(self.phases.rates(self))
        self._sync_reducer()
        self.facts.log(self)

    def after_backward(self) -> None:
        """Prune when it is time, then write zeros over held gradients; on the last micro-batch of a step only."""
        automatic = self.module.automatic_optimization
        self._in_window = automatic and self.trainer.fit_loop._should_accumulate()
        if not self._in_window:
            self._apply()

    def before_step(self, optimizer: Optimizer) -> None:
        """Do the same where a step comes without it: the last micro-batch has no loss, or the user calls ``backward``."""
        if not self._applied:
            self._in_window = False
            self._apply()
        self._applied = False
        for member in self.members:
            member.before_step(self, optimizer)

    def _apply(self) -> None:
        assert self.engine is not None
        self._applied = True
        changed = [reason for pruner in self.pruners if (reason := pruner.prune(self))]
        if changed:
            self.tell("on_masks_changing", "; ".join(changed))
            self._hold()
            self.tell("on_masks_changed", "; ".join(changed))
        self.engine.after_backward()
        if self.movement is not None:
            scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            self.movement.add(self.engine, None if scaler is None else float(scaler.get_scale()))

    def validated(self) -> None:
        """Let the phases look at a monitored metric."""
        sharding.reshard(self.module)
        if self.phases is not None:
            self.phases.watch(self, after_training=False)

    def epoch_ended(self) -> None:
        """Remember to look at a monitored metric: the module's own hook, which may log it, comes after the callbacks'."""
        self._epoch_ended = True

    def settle(self) -> None:
        """Let the phases look at a metric of the training epoch that ended, once; before anything is saved or goes on."""
        if self._epoch_ended and self.phases is not None:
            self._epoch_ended = False
            self.phases.watch(self, after_training=True)

    def correct(self, checkpoint: dict[str, Any]) -> None:
        """Make the held entries in a checkpoint exact, in the weights and in averages of them."""
        if self.engine is None:
            return
        self.correct_averages()  # a callback that comes later may put them into the checkpoint
        checkpoint[STORED] = {
            "stored": self.engine.compact.to_state(),
            "ages": self.engine.ages(),
            "names": self.engine.names(),
        }
        if self.sharded:  # its weights were made exact before they were taken, and a folder has no place for the groups
            checkpoint[STORED]["groups"] = [o.state_dict()["param_groups"] for o in self.trainer.optimizers]
            checkpoint[STORED]["numbers"] = numbers_of(self.engine)
            strategy = self.trainer.strategy
            if self.closed and isinstance(strategy, twins(ModelParallelStrategy)):  # it has saved in its own way
                states = [state_of(self.engine, optimizer, strategy) for optimizer in self.trainer.optimizers]
                checkpoint["optimizer_states"] = states
            return
        self.engine.correct(checkpoint["state_dict"])
        current = checkpoint.get("current_model_state")  # WeightAveraging keeps the model's own weights there
        if isinstance(current, dict):
            self.engine.correct(current)

    def remember(self, checkpoint: dict[str, Any]) -> None:
        """Take note of which entries the optimizers' state in a checkpoint is, of their ages and their parameters' names."""
        saved = None if self.closed else checkpoint.get(STORED)
        if saved is not None:
            self.stored = {"stored": MaskSet.from_state(saved["stored"]), "ages": saved["ages"]}
            self._checkpoint = checkpoint  # Lightning loads the optimizers' state from it after on_fit_start

    def correct_averages(self) -> None:
        """Make the held entries of every weight average exact."""
        if self.engine is not None:
            for average in averages_of(self.trainer):
                self.engine.write_held(average)

    def finish(self) -> None:
        """Write held values once more, after every other callback had its say."""
        if self.engine is not None and not self.closed:
            self.engine.restore()

    def close(self) -> None:
        """Take away every hook."""
        if self.engine is not None and not self.closed:
            self.engine.release()
        self.closed = True

    def state(self) -> dict[str, Any]:
        """Return what is saved once for all members; of a sharded model, rank 0 gets the reference weights whole."""
        state: dict[str, Any] = {"random": random_state.collect()}
        if self.reference is not None:
            state["reference"] = sharding.gathered(self.reference)
        if self.movement is not None and self.movement.steps:
            state["movement"] = sharding.gathered(self.movement.sums)
        return state

    # Masks in force.

    def free(self) -> MaskSet:
        """Return what the freezing callbacks let be: the phase's masks, or what all FreezeMasks let be."""
        if self.phases is not None and self.phases.selects:
            return self.phases.masks
        if self.freezers:
            masks = self.freezers[0].masks
            for freezer in self.freezers[1:]:
                masks = masks & freezer.masks
            return masks
        trains = self.trainable & self.owned
        return MaskSet({name: full(name in trains, p) for name, p in self.module.named_parameters()})

    def _alive(self) -> dict[str, Tensor]:
        """What all PruneMasks let live, of the tensors of which they hold entries at zero."""
        alive: dict[str, Tensor] = {}
        for pruner in self.pruners:
            for name, mask in pruner.held.items():
                alive[name] = both(alive[name], mask) if name in alive else mask
        return alive

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Write +0.0 over all that is pruned."""
        for name, mask in self._alive().items():
            parameter = self.module.get_parameter(name)
            sharding.local(parameter).masked_fill_(~sharding.part(mask, parameter), 0)

    def _hold(self) -> None:
        masks = self.free()
        if self.phases is not None:
            self.phases._masks = masks
        if not masks.count():
            raise ValueError(
                "The masks of all FreezeMask callbacks together train nothing; let them share some entries."
            )
        alive = self._alive()
        combined = {**masks, **{name: both(masks[name], mask) for name, mask in alive.items()}}
        if self.engine is None:
            self.zero_pruned()
            self.engine_reason = choose_engine(self.trainer, self.module, {m.engine for m in self.members})
            readers = any(p.regrow for p in self.pruners) or any(m.own_criterion for m in self.members)
            early = (self.trainer.world_size == 1 or self.sharded) and self._reduction is None and not readers
            self.engine = MaskEngine(
                self.module,
                self.trainer.optimizers,
                combined,
                engine=self.engine_reason[0],
                early=early,
                guard=bool(averages_of(self.trainer)),
                **self.stored,
            )
            self.stored = {}
            self._learn_behind()
        else:
            self._learn_behind()
            self.engine.update(combined, zero={name: ~mask for name, mask in alive.items()})
        self.correct_averages()
        self.facts.take(self)
        self._refuse_idle_optimizer()

    def _learn_behind(self) -> None:
        assert self.engine is not None
        masks = {name: mask for pruner in self.pruners for name, mask in pruner.shown.items()}
        dense = {name: value for pruner in self.pruners for name, value in pruner.take_dense().items()}
        self.engine.behind.change(masks, dense)

    def _refuse_idle_optimizer(self) -> None:
        """A gradient scaler fails, in words of its own, on an optimizer without any gradient."""
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            return
        for i, optimizer in enumerate(self.trainer.optimizers):
            if not any(p.requires_grad for p in parameters_of(optimizer)):
                raise ValueError(
                    f"Optimizer {i} ({type(optimizer).__name__}) would have nothing to train, and precision='16-mixed' scales "
                    "the gradients of every optimizer; let the masks leave it some entries, or use bf16-mixed."
                )

    def _sync_reducer(self) -> None:
        """Let DDP reduce what trains now, and nothing else."""
        assert self.engine is not None
        if self._reduction is not None:
            line = self._reduction.sync(self.engine, self._begun)
            if line:
                self.say(line)

    # What a person sees.

    def tell(self, hook: str, reason: str) -> None:
        """Call ``hook(trainer, module, reason)`` on every callback that has it."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self.module, reason)

    def say(self, line: str) -> None:
        """Print one line on rank zero."""
        rank_zero_info(line)


_REFUSED = (FSDPStrategy, DeepSpeedStrategy)
