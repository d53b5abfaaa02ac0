"""How a network is pruned without training, as a recipe of plain values, and what that means for a model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_mask.core import allocation as allocations
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import check_n_of_m
from lightning_mask.core.one_shot.layers import Weight, weights_of
from lightning_mask.core.one_shot.methods import METHODS, Quota, Settings
from lightning_mask.core.patterns import Patterns, as_patterns, resolve
from lightning_mask.core.prunable import default_scope, largest_share, read_sparsity
from lightning_mask.core.selection import check_patterns
from lightning_mask.core.transposed import is_conv1d

_ALLOCATIONS = ("uniform", "erk", "row")


@dataclass(frozen=True)
class OneShot:
    """Which weights of a network are pruned in one shot, and how.

    Args:
        method: ``"magnitude"``, ``"wanda"`` or ``"obs"`` (SparseGPT: what stays makes up for what is pruned).
        sparsity: Share of zeros, a float in [0, 1); or ``"n:m"``: the n best of every m neighbours along the inputs stay.
        allocation: How the zeros are shared: ``"uniform"`` (the same share of each weight), ``"erk"``, or ``"row"`` (the same
            number of each output unit); None: ``"row"`` for wanda, which is how its paper ranks, ``"uniform"`` for the
            others. Unused where the sparsity is n:m.
        scope: Patterns; default: what PruneMask prunes by default.
        allow_whole_layers: Whether a weight may lose all its entries.
        damping: Of ``obs``: share of the mean of the Hessian's diagonal that is added to it, above 0.
        block_size: Of ``obs``: columns whose mask is chosen at once.

    Raises:
        ValueError: If a value is out of range.
    """

    method: str = "obs"
    sparsity: float | str = 0.5
    allocation: str | None = None
    scope: Patterns = None
    allow_whole_layers: bool = False
    damping: float = 0.01
    block_size: int = 128

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} must be one of {', '.join(METHODS)}.")
        read_sparsity(self.sparsity)
        if self.allocation is not None and self.allocation not in _ALLOCATIONS:
            raise ValueError(
                f"allocation={self.allocation!r} must be one of {', '.join(_ALLOCATIONS)}, or None: layers are pruned one after "
                "another, so none can be ranked against all others."
            )
        check_patterns(self.scope, "scope")
        if (
            isinstance(self.damping, bool)
            or not isinstance(self.damping, float | int)
            or not 0 < self.damping < math.inf
        ):
            raise ValueError(f"damping={self.damping!r} must be a number above 0, e.g. 0.01.")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r} must be a whole number from 1.")

    @property
    def shared(self) -> str:
        """The allocation that is in force."""
        return self.allocation or ("row" if self.method == "wanda" else "uniform")

    @property
    def settings(self) -> Settings:
        """What ``obs`` is told."""
        return Settings(self.damping, self.block_size)

    def weights(self, model: nn.Module) -> list[Weight]:
        """Return the weights that are pruned, in the model's order.

        Raises:
            ValueError: If a pattern matches nothing, there is nothing to prune, or a tensor is no weight of a linear or
                convolution layer.
        """
        names = default_scope(model) if self.scope is None else resolve(self.scope, model, "scope")
        if not names:
            raise ValueError("The model has no linear or convolution layer to prune; name weights in scope.")
        return weights_of(model, names)

    def quotas(self, model: nn.Module) -> dict[str, Quota]:
        """Return what stays of each weight that is pruned, by name.

        Raises:
            ValueError: As :meth:`weights`; or if a width is not divisible by m, or a weight would be pruned whole.
        """
        weights = self.weights(model)
        sparsity, n_of_m = read_sparsity(self.sparsity)
        shapes = {weight.name: weight.shape() for weight in weights}
        if n_of_m is not None:
            n, m = n_of_m
            for weight in weights:
                check_n_of_m(weight.name, tuple(weight.parameter.shape), m, int(is_conv1d(weight.layers[0][1])))
            return {name: Quota(r * w // m * n, r, w, n_of_m=n_of_m) for name, (r, w) in shapes.items()}
        keep = _kept(shapes, sparsity, self.shared)
        gone = [name for name, (r, w) in shapes.items() if not keep[name] and r * w]
        if gone and not self.allow_whole_layers:
            filled = {name: shape for name, shape in shapes.items() if math.prod(shape)}
            most = largest_share(lambda share: all(_kept(filled, share, self.shared).values()))
            raise ValueError(
                f"sparsity={self.sparsity} would prune all of {gone[0]}"
                + (f" and {len(gone) - 1} more" * (len(gone) > 1))
                + f": the largest that leaves something of every weight is {most}. Lower it, take the weight out of scope with "
                f"'!{gone[0]}', or set allow_whole_layers."
            )
        return {name: Quota(keep[name], r, w, by_row=self.shared == "row") for name, (r, w) in shapes.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values that JSON can hold, with the words of PruneMask's."""
        return {
            "pruned by": self.method,
            "sparsity": self.sparsity,
            "structure": "entry",
            "allocation": self.shared,
            "scope": None if self.scope is None else list(as_patterns(self.scope)),
            "damping": self.damping,
            "block_size": self.block_size,
        }


def _kept(shapes: Mapping[str, tuple[int, int]], sparsity: float, allocation: str) -> dict[str, int]:
    groups = allocations.get(allocation)(shapes, Budget(sparsity, removed=True))
    return {name: keep for names, keep in groups for name in names}
