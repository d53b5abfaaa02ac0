"""DistributedDataParallel: a reducer that owns exactly the tensors that train."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import Strategy
from torch.nn.parallel import DistributedDataParallel

from lightning_mask.core.distributed import require_equal
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.wire import Wire, compatible, reduce_active


class Reduction:
    """What DDP reduces in one fit: the tensors that train, and of those held in part the active entries alone.

    Args:
        strategy: Lightning's DDPStrategy, set up.
        trainable: Names of the tensors that its reducer owns.
        regrows: Whether entries come back that need their gradient in that very step, so that whole tensors are reduced.

    Attributes:
        wire: What reduces the active entries alone; None as long as whole tensors are reduced.
    """

    def __init__(self, strategy: Strategy, trainable: set[str], regrows: bool) -> None:
        self.strategy, self._owned = strategy, trainable
        self.wire: Wire | None = None
        self._whole = "PruneMask(regrow=...) trains entries from the step on in which they come back" if regrows else ""
        self._looked = False
        self._sent: MaskSet | None = None

    def sync(self, engine: MaskEngine, begun: bool) -> str | None:
        """Go by the masks in force; between two steps, on all ranks, which agree on the tensors first.

        Args:
            engine: Holds the masks.
            begun: Whether everybody has had the chance to register a communication hook.

        Returns:
            A line for the user, when it turns out that whole tensors are reduced.
        """
        trainable, changed, line = engine.trainable, self._sent is not engine.masks, None
        entries = engine.active_entries() if changed else {}
        if entries and begun and not self._looked:
            line = self._lay_wire()
        if set(trainable) != self._owned:
            require_equal(trainable, "The set of tensors that train")
            rebuild_reducer(self.strategy, self.wire)
            self._owned = set(trainable)
        if changed and self.wire is not None:
            self.wire.set(entries)
        self._sent = engine.masks if begun else None
        return line

    def _lay_wire(self) -> str | None:
        """Reduce active entries alone from now on, unless somebody needs the others."""
        self._looked = True
        if not self._whole:
            self.wire, hook = make_wire(self.strategy)
            self._whole = f"the communication hook {hook} takes whole tensors" if hook else ""
        if self._whole:
            return f"The gradients of held entries are reduced over the ranks too: {self._whole}"
        self._owned = set()  # a communication hook comes with a new reducer
        return None


def make_wire(strategy: Strategy) -> tuple[Wire | None, str | None]:
    """Return what reduces the active entries alone, around the communication hook that the user chose, if any.

    Returns:
        The wire, or None and the name of a hook that cannot be given active entries alone.
    """
    hook = _users_hook(strategy)
    if hook is None:
        return Wire(getattr(strategy.model, "process_group", None)), None
    if compatible(hook[0]):
        return Wire(inner=hook), None
    return None, getattr(hook[0], "__name__", str(hook[0]))


def _users_hook(strategy: Strategy) -> tuple[Callable[..., Any], Any] | None:
    wrapper = strategy.model
    assert isinstance(wrapper, DistributedDataParallel)
    return next(((hook, state) for hook, state in wrapper._comm_hooks if hook is not reduce_active), None)


def rebuild_reducer(strategy: Strategy, wire: Wire | None = None) -> None:
    """Wrap the module again, so that the reducer owns the tensors that require a gradient now.

    Call it on all ranks between two steps. A reducer is built once, from ``requires_grad`` at that time: tensors that
    start to train later would never be reduced, and the replicas would drift apart. Communication hooks registered on
    the old wrapper are registered on the new one, or ``wire`` (which has them inside).

    Args:
        strategy: Lightning's DDPStrategy, set up.
        wire: What reduces the active entries alone; None: whole tensors are reduced.

    Raises:
        RuntimeError: If nothing trains.
    """
    old = strategy.model
    assert isinstance(old, DistributedDataParallel)
    if not any(p.requires_grad for p in old.module.parameters()):
        raise RuntimeError(
            "No tensor trains, so there is no gradient to reduce; a phase must train at least one tensor."
        )
    hooks = list(old._comm_hooks)
    old._remove_autograd_hooks()
    arguments = strategy._ddp_kwargs  # type: ignore[attr-defined]
    strategy._ddp_kwargs = {**arguments, "init_sync": False}  # type: ignore[attr-defined]  # replicas are equal already
    try:
        strategy.model = strategy._setup_model(old.module)
    finally:
        strategy._ddp_kwargs = arguments  # type: ignore[attr-defined]
    new = strategy.model
    assert isinstance(new, DistributedDataParallel)
    if wire is not None:
        new.register_comm_hook(wire, reduce_active)
        return
    strategy._register_ddp_hooks()  # type: ignore[attr-defined]
    for hook, state in hooks[len(new._comm_hooks) :]:
        new.register_comm_hook(state, hook)
