"""MaskCallback: masks in ``transformers.Trainer``.

Who calls whom: the Trainer calls the hooks; ``on_train_begin`` chooses the first masks (or takes those that the checkpoint
brought in ``optimizer.pt``) and makes the engine; ``on_step_begin`` changes them between two steps. The Trainer clips before
it calls ``on_pre_optimizer_step``, so held gradients are zeroed earlier, as soon as backward has accumulated them: the
norm that it clips by and logs is that of active entries. ``on_pre_optimizer_step`` hands the clipped gradients over.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

from accelerate.utils import send_to_device
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_mask.callbacks.calibration import keep_generators
from lightning_mask.core import Context, MaskEngine, MaskSet, Selection
from lightning_mask.core.distributed import require_equal_masks
from lightning_mask.core.engine import Row, check_engine
from lightning_mask.core.maskset import active, both, full
from lightning_mask.core.optimizers import innermost, parameters_of
from lightning_mask.core.prunable import read_sparsity
from lightning_mask.core.schedules import Moment, Run
from lightning_mask.core.selection import select
from lightning_mask.integrations.pruning import Pruning

LossOf = Callable[[nn.Module, Any], Tensor | None]

_SAVED = "lightning_mask"
"""Key of the first param group under which ``optimizer.pt`` holds what a resumed run needs."""


class MaskCallback(TrainerCallback):
    """Hold what a selection does not let change, bit for bit, while ``transformers.Trainer`` trains the rest.

    Works with one process and under DDP; with gradient accumulation, clipping, mixed precision and
    ``resume_from_checkpoint``. The norm that is clipped by and logged counts active entries only. Masks, and the moments
    of compact tensors, are kept in the checkpoint's ``optimizer.pt``. The model's own files are as without a callback.

    Args:
        selection: What may change, from the start; None: everything that requires a gradient.
        then: What may change later: pairs of a moment counted from the start of training (``"500 steps"``,
            ``"2 epochs"``, ``"30%"``) and the selection that replaces the one before (None: everything).
        pruning: What goes to zero, and when; what is pruned does not change under any selection.
        loss: Called with the model and a training batch, returns the mean loss that criteria are computed from; default:
            the model's own ``loss``. For a loss of the Trainer's: ``lambda model, batch: trainer.compute_loss(model, batch)``.
        engine: How tensors are held of which some entries are active. ``"compact"``: the optimizer gets the active entries
            alone, so its state has their size; ``.grad`` of such a tensor is None in the ``on_pre_optimizer_step`` of the
            callbacks that come later. ``"dense"``: the gradient stays, with zeros at held entries. ``"auto"``: compact, but
            dense in 16-bit floats, whose scaler looks at the gradients of the optimizer's own tensors.

    Attributes:
        masks: The masks in force, by parameter name; empty before training.
        phase: How many of ``then`` have begun.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> callback = MaskCallback(Selection(train="classifier", score="fisher", density=0.005))
        >>> callback.masks
        MaskSet(0 tensors, 0 of 0 entries active)
    """

    def __init__(
        self,
        selection: Selection | None = None,
        *,
        then: Sequence[tuple[str, Selection | None]] = (),
        pruning: Pruning | None = None,
        loss: LossOf | None = None,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        self.selections = [selection, *(later for _, later in then)]
        self.moments = [Moment.parse(moment, f"then[{i}]") for i, (moment, _) in enumerate(then)]
        if any(each is not None and each.empty for each in self.selections):
            raise ValueError(
                "A selection that names nothing trains nothing; give it train=, score= or mask=, or pass None."
            )
        self.pruning, self.loss, self.engine = pruning, loss, engine
        self.masks, self.phase = MaskSet({}), 0
        self._engine: MaskEngine | None = None
        self._hooks: list[RemovableHandle] = []
        self._free, self._alive, self._updated = MaskSet({}), MaskSet({}), -1

    def summary(self) -> list[Row]:
        """Return one row for each parameter: name, shape, active, density, and what it is held by; empty outside training."""
        return self._engine.summary() if self._engine is not None else []

    # The Trainer's hooks.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose masks or take them from the checkpoint, and hold."""
        _check_arguments(args)
        self._close()
        self._model, self._loader = kwargs["model"], kwargs["train_dataloader"]
        self._optimizer = innermost(kwargs["optimizer"])
        owned = {id(p) for p in parameters_of(self._optimizer)}
        self._trainable = {n for n, p in self._model.named_parameters() if p.requires_grad and id(p) in owned}
        run = _run(args, state, self._loader)
        self._starts = [moment.steps(run, f"then[{i}]") for i, moment in enumerate(self.moments)]
        if self._starts != sorted(self._starts):
            raise ValueError(f"then: the moments begin at steps {self._starts} of this run; put them into their order.")
        for selection in self.selections:
            if selection is not None:
                selection.check(self._model, self._trainable)
        if self.pruning is not None:
            self._ramp = self.pruning.ramp(run)
        saved = self._optimizer.param_groups[0].pop(_SAVED, None)
        stored: dict[str, Any] = {}
        if saved is not None and state.global_step > 0:
            self._refuse_edited(saved)
            self._free, self._alive = MaskSet.from_state(saved["free"]), MaskSet.from_state(saved["alive"])
            self.phase, self._updated = saved["phase"], saved["updated"]
            stored = {"stored": MaskSet.from_state(saved["stored"]), "ages": saved["ages"]}
        else:
            names = self.pruning.names(self._model) if self.pruning is not None else []
            self._alive = MaskSet({name: full(True, self._model.get_parameter(name)) for name in names})
            self.phase, self._updated = sum(start <= state.global_step for start in self._starts), -1
            self._free = self._selected()
        way = "compact" if self.engine == "auto" and not args.fp16 else self.engine
        self._engine = MaskEngine(self._model, self._optimizer, self._combined(), engine=way, **stored)
        self._hooks = []
        self._saving = self._optimizer.register_state_dict_post_hook(self._save)
        self._hold()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the masks of a new phase, and what is newly pruned, in force between two steps."""
        assert self._engine is not None
        phase = sum(start <= state.global_step for start in self._starts)
        pruned = self._prune(state.global_step)
        if phase > self.phase:
            self.phase = phase
            self._free = self._selected()
        elif not pruned:
            return
        self._engine.update(self._combined(), zero={name: ~mask for name, mask in self._alive.items()})
        self._hold()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hand the gradients of active entries to the optimizer, clipped by now."""
        assert self._engine is not None
        self._engine.after_backward()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Drop the gradients of compact tensors: the Trainer does so with those of the model alone."""
        self._optimizer.zero_grad()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model and the optimizer as they were found."""
        self._close()

    # Masks.

    def _selected(self) -> MaskSet:
        selection = self.selections[self.phase]
        if selection is None:
            return MaskSet({name: full(name in self._trainable, p) for name, p in self._model.named_parameters()})
        context = self._context(selection.seed, selection.batches)
        masks = select(selection, self._model, context, self._trainable)
        require_equal_masks(masks.digests(), "A new mask")
        if not masks.count():
            raise ValueError("The selection trains nothing; let it name at least one tensor.")
        return masks

    def _prune(self, step: int) -> bool:
        """Prune when an update is due; return whether it was."""
        due = self._ramp.last_update(step) if self.pruning is not None else None
        if self.pruning is None or due is None or due[0] <= self._updated:
            return False
        self._updated, progress = due
        sparsity = self._ramp.sparsity(read_sparsity(self.pruning.sparsity)[0], progress)
        context = self._context(self.pruning.seed, self.pruning.batches)
        self._alive = self.pruning.choose(self._model, context, sparsity, self._alive, self._free)
        require_equal_masks(self._alive.digests(), "What is pruned")
        return True

    def _context(self, seed: int, batches: int) -> Context:
        return Context(
            self._model,
            loss=lambda batch: (self.loss or _loss_of)(self._model, batch),
            batches=lambda: _batches(self._loader, batches, next(self._model.parameters()).device),
            seed=seed,
        )

    def _combined(self) -> MaskSet:
        return MaskSet({**self._free, **{name: both(self._free[name], mask) for name, mask in self._alive.items()}})

    def _hold(self) -> None:
        """Zero, from the next backward on, the held gradients of the masks in force."""
        assert self._engine is not None
        self.masks = self._engine.masks
        while self._hooks:
            self._hooks.pop().remove()
        for name, mask in self.masks.items():
            if 0 < active(mask) < mask.numel():
                parameter = self._engine.parameter(name)
                hook = _zero(~mask.to(parameter.device))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    # Checkpoints.

    def _recipe(self) -> str:
        selections = [None if each is None else each.recipe() for each in self.selections]
        pruning = None if self.pruning is None else self.pruning.recipe()
        moments = [str(moment) for moment in self.moments]
        return json.dumps({"selections": selections, "then": moments, "pruning": pruning}, sort_keys=True)

    def _refuse_edited(self, saved: Mapping[str, Any]) -> None:
        if saved["recipe"] != self._recipe():
            raise ValueError(
                f"This checkpoint is of a run with other masks ({saved['recipe']}); resume it with these, or start a new run "
                "from its weights."
            )

    def _save(self, optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert self._engine is not None
        state_dict["param_groups"][0][_SAVED] = {
            "recipe": self._recipe(),
            "free": self._free.to_state(),
            "alive": self._alive.to_state(),
            "phase": self.phase,
            "updated": self._updated,
            "stored": self._engine.compact.to_state(),
            "ages": self._engine.ages(),
        }
        return state_dict

    def _close(self) -> None:
        if self._engine is None:
            return
        for handle in (self._saving, *self._hooks):
            handle.remove()
        self._engine.release()
        self._engine = None


def _check_arguments(args: TrainingArguments) -> None:
    """Refuse ways of training under which the callback cannot follow the parameters.

    Raises:
        ValueError: Naming the argument.
    """
    for name in ("fsdp", "deepspeed"):
        if getattr(args, name, None):
            raise ValueError(f"MaskCallback serves one process and DDP; leave {name} out, or use Lightning with FSDP2.")
    if args.n_gpu > 1:
        raise ValueError(
            "MaskCallback needs a process for each GPU: start the script with torchrun or accelerate launch."
        )
    if args.world_size > 1 and args.ddp_find_unused_parameters is False:
        raise ValueError(
            "ddp_find_unused_parameters=False makes DDP wait for the gradients of held tensors; leave it out, or set it to True."
        )


def _run(args: TrainingArguments, state: TrainerState, loader: Any) -> Run:
    """The lengths that moments are measured against."""
    try:
        per_epoch: float = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
    except TypeError:  # an iterable data set
        per_epoch = math.inf
    return Run(state.max_steps, per_epoch)


def _batches(loader: Any, count: int, device: Any) -> Iterator[Any]:
    """Yield up to ``count`` training batches of this rank; neither the loader nor any random state is moved by it."""
    fresh = copy(getattr(loader, "base_dataloader", loader))
    fresh._iterator = None
    with isolate_rng(), keep_generators([fresh]):
        for batch in islice(iter(fresh), count):
            yield send_to_device(batch, device)


def _loss_of(model: nn.Module, batch: Any) -> Tensor | None:
    """The loss that a model of transformers returns for a batch with labels."""
    with isolate_rng():
        outputs = model(**batch)
    loss: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    return loss


def _zero(held: Tensor) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if parameter.grad is not None and not parameter.grad.is_sparse:  # the engine refuses a sparse one
            parameter.grad.masked_fill_(held, 0)

    return hook
