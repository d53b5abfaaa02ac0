"""What of a model may be pruned, how sparsity is written, and what must not go."""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.maskset import active
from lightning_mask.core.patterns import repeated_blocks, resolve
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


def read_sparsities(sparsity: Any) -> tuple[float | dict[str, float], tuple[int, int] | None]:
    """Return what :func:`read_sparsity` does, or of a dict of patterns to shares the same with each share read.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(sparsity, Mapping):
        return read_sparsity(sparsity)
    if not sparsity:
        raise ValueError("sparsity={} names nothing; give patterns and their shares, or one share.")
    for pattern, each in sparsity.items():
        if isinstance(each, str | Mapping):
            raise ValueError(f"sparsity: {each!r} of the pattern {pattern!r} must be a share in [0, 1).")
    return {pattern: read_sparsity(each)[0] for pattern, each in sparsity.items()}, None


def parts(
    sparsity: float | Mapping[str, float], names: Sequence[str], module: nn.Module
) -> list[tuple[list[str], float]]:
    """Return the tensors that share a sparsity, and it; a tensor is its first pattern's, and nobody's without one.

    Args:
        sparsity: One share for all, or patterns to shares.
        names: Tensors in scope.
        module: Whose parameters they are.

    Raises:
        ValueError: If a pattern names nothing, or nothing of its own.
    """
    if not isinstance(sparsity, Mapping):
        return [(list(names), sparsity)]
    found, left = [], dict.fromkeys(names)
    for pattern, each in sparsity.items():
        mine = [name for name in resolve(pattern, module, "sparsity") if name in left]
        if not mine:
            raise ValueError(
                f"sparsity: the pattern {pattern!r} names no tensor in scope that an earlier pattern does not name; take it out, "
                "move it forward, or widen scope."
            )
        found.append((mine, each))
        for name in mine:
            del left[name]
    return found


def constrained(
    score: Tensor, parameter: Tensor, free: Tensor, alive: Tensor, *, anew: bool = False, prune_held: bool = False
) -> Tensor:
    """Return scores, in float32, under which what is held stays as it is, and what is pruned stays pruned.

    Args:
        score: Of each entry, higher = more worth keeping.
        parameter: The weight.
        free: Boolean, True = no FreezeMask and no phase holds the entry.
        alive: Boolean, True = not pruned so far.
        anew: Whether pruned entries are ranked like the others, but for those that are held.
        prune_held: Whether entries that are held may be pruned.

    Returns:
        ``-inf`` where an entry stays pruned, ``inf`` where it must not be pruned, else the score.
    """
    score = score.float()
    free, alive = (mask.to(score.device) for mask in (free, alive))
    score = score.masked_fill(~(alive | free) if anew else ~alive, -torch.inf)
    if prune_held or active(free) == free.numel():
        return score
    return score.masked_fill(~free & alive & (parameter.detach() != 0).to(score.device), torch.inf)


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
    """Return the largest share in [0, 1), with four digits, at which ``works``, which holds at 0 and from some share on not."""
    low, high = 0, 10_000
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if works(middle / 10_000) else (low, middle)
    return low / 10_000


def check_emptied(
    sparsity: float, masks_at: Callable[[float], Mapping[str, Tensor]], masks: Mapping[str, Tensor]
) -> None:
    """Refuse masks that leave nothing of a weight.

    Args:
        sparsity: That they are of; the largest where there are several.
        masks_at: The masks at a share, from 0 to 1, of it.
        masks: Those at 1.

    Raises:
        ValueError: Naming the weight and the largest sparsity that leaves something of each.
    """
    whole = emptied(masks)
    if not whole:
        return
    most = largest_share(lambda share: not emptied(masks_at(share))) * sparsity
    more = f" and {len(whole) - 1} more" if len(whole) > 1 else ""
    raise ValueError(
        f"sparsity {sparsity:.4f} would prune all of {whole[0]}{more}, and no gradient passes such a layer; {most:.4f} is about "
        f"the most that leaves each layer something. Lower the sparsity, take {whole[0]} out of the scope, choose another "
        "allocation ('erk' leaves small layers the most), or set allow_whole_layers=True."
    )
