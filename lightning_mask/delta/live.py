"""Deltas on a module in memory: from one task to another in milliseconds."""

import torch
from torch import Tensor, nn

from lightning_mask.delta.file import Delta
from lightning_mask.delta.items import Item, Part, put, take
from lightning_mask.delta.names import Names
from lightning_mask.delta.stream import bits
from lightning_mask.delta.weights import InMemory


def switch(model: nn.Module, delta: Delta) -> Delta:
    """Write a delta's values into a module; return what undoes it.

    ``undo = switch(model, tweets)``, and later ``switch(model, undo)``. The module's names may have a prefix that the
    delta's lack (a LightningModule's ``net.``), or the other way round. What is overwritten is not compared with the delta's
    base: that would take a look at every entry.

    Args:
        model: The module; tensors keep their objects, so that optimizers and compiled code go on working.
        delta: What to write.

    Returns:
        A delta of the same places with the values that were there.

    Raises:
        ValueError: If a tensor of the delta is missing, or has another shape or dtype; the module is as it was then.
    """
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    weights = InMemory(state, type(model).__name__)
    names = Names(delta.items, weights, delta.aliases)
    places: dict[str, Tensor] = {}
    for name, item in delta.items.items():
        if name not in delta.parts:
            continue
        there = names.find(name)
        if there is None:
            raise ValueError(f"The delta does not go with {weights.where}: it has no tensor {names.missing(name)}.")
        if weights.specs[there] != item.spec:
            raise ValueError(
                f"The delta does not go with {weights.where}: {there} is {weights.specs[there]} there, and "
                f"{item.spec} in the delta."
            )
        places[name] = state[there]
    undo = {name: _exchange(tensor, delta.items[name], delta.parts[name]) for name, tensor in places.items()}
    return Delta(delta.items, undo, delta.aliases)


@torch.no_grad()
def _exchange(tensor: Tensor, item: Item, part: Part) -> Part:
    """Write a part into a tensor; return what was there."""
    indices = None if part.indices is None else part.indices.long().to(tensor.device)
    values = part.values.to(tensor.device)
    before = take(tensor, item, indices).clone()
    if not tensor.is_contiguous():
        tensor.copy_(put(tensor, item, indices, values))
        return Part(indices, before, None)
    flat = bits(tensor)  # shares the tensor's memory
    if indices is None:
        flat.copy_(bits(values))
    elif item.form == "r":
        flat.view(item.spec.shape[0], -1)[indices] = bits(values).view(len(indices), -1)
    else:
        flat[indices] = bits(values)
    return Part(indices, before, None)
