"""What the mask callbacks share: one session a fit, driven by the first of them in the Trainer's list."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_mask.callbacks.packages import AnyCallback
from lightning_mask.callbacks.session import Session
from lightning_mask.callbacks.sharded import give_back, take_over
from lightning_mask.core.engine import Row
from lightning_mask.core.maskset import MaskSet, active
from lightning_mask.core.schedules import Run
from lightning_mask.core.sharding import shard


def plain(value: Any) -> Any:
    """Turn mappings and sequences of any class (Hydra's among them) into dicts and lists."""
    if isinstance(value, MaskSet):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    return value


class MaskCallback(AnyCallback):
    """Base of the mask callbacks; the hooks are those of the session and run once for all of them."""

    engine: str = "auto"
    needs_reference: bool = False
    """Whether a criterion may ask for the weights from the start of training."""

    own_criterion: bool = False
    """Whether a criterion is the user's own."""

    _session: Session | None = None
    _masks: MaskSet | None = None
    _shared: dict[str, Any] | None = None
    _restored: bool = False

    @property
    def masks(self) -> MaskSet:
        """This callback's own masks by parameter name; empty before training starts."""
        return MaskSet({}) if self._masks is None else self._masks

    def summary(self) -> list[dict[str, Any]]:
        """Return one row for each tensor: name, shape, active, density, and what it is held by."""
        rows = (
            {row.name: row for row in self._session.engine.summary()} if self._session and self._session.engine else {}
        )
        return [self._row(name, rows.get(name)) for name in self.masks]

    def _row(self, name: str, row: Row | None) -> dict[str, Any]:
        mask = self.masks[name]
        count = active(mask)
        return {
            "name": name,
            "shape": tuple(mask.shape),
            "active": count,
            "density": count / max(mask.numel(), 1),
            "held by": row.held_by if row else "-",
        }

    @property
    def _leads(self) -> bool:
        return self._session is not None and self._session.members[0] is self

    # What a callback tells its session.

    def take_part(self, module: LightningModule) -> None:
        """Keep, of masks that a checkpoint brought, this rank's part where the model is sharded."""
        if self._masks is not None:
            parts = {name: shard(mask, module.get_parameter(name)) for name, mask in self._masks.items()}
            self._masks = MaskSet(parts, self._masks.recipe)

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""

    def prepare(self, session: Session) -> None:
        """Do what needs the training data, before anything else when training starts."""

    def measure(self, run: Run) -> None:
        """Turn moments into steps, and refuse those that this run does not have."""

    def begin(self, session: Session) -> None:
        """Choose the first masks, unless a checkpoint brought them (``self._restored``)."""

    def advance(self, session: Session) -> str | None:
        """Choose new masks when it is time, between two steps; return why, or None when nothing changed."""
        return None

    def moved(self, session: Session) -> list[str]:
        """Names of the tensors of which a criterion goes by a sum over the steps of training."""
        return []

    def done_with_reference(self) -> bool:
        """Whether nothing that is still to come may ask for the weights from the start of training."""
        return not self.needs_reference

    def before_step(self, session: Session, optimizer: Optimizer) -> None:
        """Change the gradients that ``optimizer`` is about to take; the masks have been applied to them."""

    # Lightning's hooks.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Join the session of this fit."""
        if stage != "fit":
            take_over(trainer, pl_module, lambda: None)  # of a training run's checkpoint, the weights alone are loaded
            return
        self._restored, self._shared = False, None  # a checkpoint that was only tested is not resumed from
        members = [c for c in trainer.callbacks if isinstance(c, MaskCallback)]  # type: ignore[attr-defined]
        first = members[0]._session
        if first is None or first.trainer is not trainer or first.closed:
            first = Session(trainer, pl_module, members)
        self._session = first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse bad input before training."""
        if self._leads and self._session:
            self._session.check()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose masks and hold; everything that a checkpoint restores is there by now, under every strategy."""
        if self._leads and self._session:
            self._session.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Put a new phase or a redrawn mask in force before the forward pass."""
        if self._leads and self._session:
            self._session.before_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Apply the masks to the reduced gradients, before they are clipped."""
        if self._leads and self._session:
            self._session.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Apply the masks where no backward of Lightning's came before this step."""
        if self._leads and self._session:
            self._session.before_step(optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make weight averages exact before they are looked at."""
        if self._leads and self._session and not self._session.closed:
            self._session.correct_averages()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a monitored metric."""
        if self._leads and self._session and not self._session.closed and not trainer.sanity_checking:
            self._session.validated()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a monitored metric that training logs."""
        if self._leads and self._session:
            self._session.epoch_ended()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a monitored metric of the last epoch."""
        if self._leads and self._session:
            self._session.settle()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the held entries in the checkpoint exact, at whatever moment it is written."""
        if self._leads and self._session:
            self._session.correct(checkpoint)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember of which entries the optimizers' state in the checkpoint is."""
        if self._leads and self._session:
            self._session.remember(checkpoint)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold once more: weight averaging may have written its averages into the model when training ended."""
        if self._leads and self._session:
            self._session.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hold once more and leave the model alone also when training fails, in the middle of a step perhaps."""
        if self._leads and self._session:
            self._session.finish()
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take every hook away."""
        if self._session is not None and stage == "fit":
            self._session.close()
        give_back(trainer.strategy)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, and for the first of the mask callbacks the random states of all ranks."""
        if self._masks is None:
            return {}
        if self._session:
            self._session.settle()
        state: dict[str, Any] = {"masks": self._masks.to_state(), **self.own_state()}
        if self._leads and self._session:
            state["shared"] = self._session.state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave away."""
        if not state_dict:
            return
        self._masks = MaskSet.from_state(state_dict["masks"])
        self._shared, self._restored = state_dict.get("shared"), True
        self.load_own_state(state_dict)

    def own_state(self) -> dict[str, Any]:
        """Return what this callback keeps besides its masks."""
        return {}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`own_state` gave away."""
