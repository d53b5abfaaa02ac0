"""DistributedDataParallel: a reducer that owns exactly the tensors that train."""

from lightning.pytorch.strategies import Strategy
from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer(strategy: Strategy) -> None:
    """Wrap the module again, so that the reducer owns the tensors that require a gradient now.

    Call it on all ranks between two steps. A reducer is built once, from ``requires_grad`` at that time: tensors that
    start to train later would never be reduced, and the replicas would drift apart. Communication hooks registered on
    the old wrapper are registered on the new one.

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
    strategy._register_ddp_hooks()  # type: ignore[attr-defined]
    new = strategy.model
    assert isinstance(new, DistributedDataParallel)
    for hook, state in hooks[len(new._comm_hooks) :]:
        new.register_comm_hook(state, hook)
