"""GradientMask: a fresh random mask over the gradients at each step."""

import json

from torch.optim import Optimizer

from lightning_mask.callbacks.base import MaskCallback, plain
from lightning_mask.callbacks.freeze import Strings
from lightning_mask.callbacks.session import Session
from lightning_mask.core.criteria import named_seed
from lightning_mask.core.distributed import require_equal
from lightning_mask.core.gradient_mask import mask_gradients
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.patterns import resolve
from lightning_mask.core.selection import check_patterns


class GradientMask(MaskCallback):
    """Let each gradient count with a given probability, drawn anew at each step, and divide those that do by it.

    Nothing is held: moments and weight decay move an entry also in a step in which its gradient does not count. What other
    callbacks hold or prune stays as it is. Masked after backward, before clipping.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-F, 2021); its code masks after clipping.

    Args:
        density: Probability in (0, 1] that a gradient counts.
        scope: Patterns of the tensors, as in ``FreezeMask``; None: all.
        seed: Seed of the draws; all ranks draw alike.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> GradientMask(0.3, scope=["*", "!classifier"]).density
        0.3
    """

    def __init__(self, density: float, *, scope: Strings = None, seed: int = 0) -> None:
        if isinstance(density, bool) or not isinstance(density, float | int) or not 0 < density <= 1:
            raise ValueError(f"GradientMask: density={density!r} must be a probability in (0, 1].")
        self.density, self.scope, self.seed = float(density), plain(scope), seed
        try:
            check_patterns(self.scope, "scope")
        except ValueError as error:
            raise ValueError(f"GradientMask: {error}") from None
        recipe = {"density": self.density, "scope": self.scope, "seed": seed}
        self._key = self._generate_state_key(recipe=json.dumps(recipe, sort_keys=True))
        self._names: set[str] = set()

    @property
    def state_key(self) -> str:
        """A key that tells several GradientMasks apart."""
        return self._key

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""
        every = [name for name, _ in session.module.named_parameters()]
        self._names = set(every if self.scope is None else resolve(self.scope, session.module, "GradientMask: scope"))

    def begin(self, session: Session) -> None:
        """Make sure that all ranks draw alike; there is nothing to choose."""
        self._masks = MaskSet({})
        if session.trainer.world_size > 1:
            require_equal((self.density, self.seed, sorted(self._names)), "GradientMask: density, seed and scope")

    def before_step(self, session: Session, optimizer: Optimizer) -> None:
        """Mask what the optimizer is about to take."""
        assert session.engine is not None
        seed = named_seed(self.seed, f"step {session.step}")
        mask_gradients(session.engine, optimizer, self._names, self.density, seed)
