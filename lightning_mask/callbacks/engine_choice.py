"""How partly held tensors are held, chosen from what a Trainer and its module do with gradients."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_mask.callbacks.packages import twins


def choose_engine(trainer: Trainer, module: LightningModule, asked: set[str]) -> tuple[str, str]:
    """Return how partly held tensors are held, and why.

    Compact, unless the user asked for dense, or code of theirs may read ``.grad`` after backward: that of a partly held
    tensor is gone by then.
    """
    if "dense" in asked:
        return "dense", "engine='dense' was asked for"
    if "compact" in asked:
        return "compact", "engine='compact' was asked for; .grad of such a tensor is None after backward"
    if not module.automatic_optimization:
        return "dense", "manual optimization may read gradients"
    hooks = ("on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")
    own = ("backward", "configure_gradient_clipping", "optimizer_step", "optimizer_zero_grad")
    for hook in (*hooks, *own):
        if all(is_overridden(hook, module, parent) for parent in twins(LightningModule)):
            return "dense", f"{type(module).__name__}.{hook} may read gradients (engine='compact' if it does not)"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        foreign = not type(callback).__module__.startswith(("lightning.", "pytorch_lightning.", "lightning_mask."))
        if foreign and any(_is_own(type(callback), hook) for hook in hooks):
            return "dense", f"{type(callback).__name__} may read gradients (engine='compact' if it does not)"
    return "compact", "only active entries reach the optimizer; .grad of such a tensor is None after backward"


def _is_own(kind: type, hook: str) -> bool:
    return all(getattr(kind, hook, None) is not getattr(callback, hook) for callback in twins(Callback))
