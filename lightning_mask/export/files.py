"""The tensors of a model that belong into a file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state dict, each once, and for the other names of a tied one the name that is kept.

    Tensors are on the CPU and contiguous, and no two of them share memory: a part of another one is copied.
    """
    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    taken: set[int] = set()
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in kept:
            aliases[name] = kept[key]
            continue
        kept[key] = name
        made = tensor.detach().cpu().contiguous()
        made = made.clone() if made.untyped_storage().data_ptr() in taken else made
        taken.add(made.untyped_storage().data_ptr())
        tensors[name] = made
    return tensors, aliases


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal in shape, dtype and every bit, nan and the sign of zero too."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (a, b)))


def unlike(written: Mapping[str, Tensor], back: Mapping[str, Tensor]) -> str | None:
    """Return the name of a tensor that did not come back as it was written, or came from nowhere; None without one."""
    return next(
        (n for n in [*written, *back] if n not in written or n not in back or not same(written[n], back[n])), None
    )


def state_bytes(model: nn.Module) -> int:
    """Return how many bytes the tensors of a model's state dict take, each once."""
    return sum(t.numel() * t.element_size() for t in distinct(model.state_dict())[0].values())


def entries(model: nn.Module) -> int:
    """Return how many entries the parameters of a model have, each once."""
    return sum(p.numel() for p in model.parameters())
