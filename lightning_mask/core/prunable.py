"""What of a model may be pruned, and how sparsity is written."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress

from torch import Tensor, nn

from lightning_mask.core.maskset import active
from lightning_mask.core.patterns import repeated_blocks
from lightning_mask.core.transposed import is_conv1d


def read_sparsity(sparsity: float | str) -> tuple[float, tuple[int, int] | None]:
    """Return the share of zeros that ``sparsity`` means, in [0, 1), and ``(n, m)`` where it is written ``"n:m"``.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> read_sparsity(0.9), read_sparsity("0.9"), read_sparsity("2:4")
        ((0.9, None), (0.9, None), (0.5, (2, 4)))
    """
    refused = f"sparsity={sparsity!r} must be a share in [0, 1), e.g. 0.9, or a pattern such as '2:4'."
    if isinstance(sparsity, str):
        match = re.fullmatch(r"(\d+):(\d+)", sparsity)
        if match is not None and 0 < int(match[1]) < int(match[2]):
            n, m = int(match[1]), int(match[2])
            return 1 - n / m, (n, m)
        with suppress(ValueError):  # command lines that try strings first give shares as strings
            sparsity = float(sparsity)
    if isinstance(sparsity, bool) or not isinstance(sparsity, float | int) or not 0 <= sparsity < 1:
        raise ValueError(refused)
    return float(sparsity), None


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
        if isinstance(layer, kinds) or is_conv1d(layer):
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


def emptied(masks: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the masks of two or more dimensions that leave nothing: no gradient passes such a weight."""
    return [name for name, mask in masks.items() if mask.dim() > 1 and mask.numel() and not active(mask)]


def largest_share(works: Callable[[float], bool]) -> float:
    """Return the largest share in [0, 1], to 1e-4, at which ``works``, which holds at 0 and no longer from some share on."""
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if works(middle) else (low, middle)
    return low
