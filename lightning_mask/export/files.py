"""The tensors of a model that belong into a file."""

from collections.abc import Mapping

from torch import Tensor, nn


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a state dict, each once, and for the other names of a tied one the name that is kept.

    Tensors are on the CPU and contiguous.
    """
    kept: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in kept:
            aliases[name] = kept[key]
            continue
        kept[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def state_bytes(model: nn.Module) -> int:
    """Return how many bytes the tensors of a model's state dict take, each once."""
    return sum(t.numel() * t.element_size() for t in distinct(model.state_dict())[0].values())


def entries(model: nn.Module) -> int:
    """Return how many entries the parameters of a model have, each once."""
    return sum(p.numel() for p in model.parameters())
