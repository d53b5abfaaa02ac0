"""Straight-through pruning: dense weights that keep learning behind a mask."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mask.core.sharding import local, part, wrap


class StraightThrough:
    """Shows a masked weight to everybody but the optimizer, which updates the dense one behind it.

    Between two steps the parameter is +0.0 where the mask is False, so the loss and its gradient are those of the pruned
    network; the gradient of the pruned network's weight, entries that are zero included, is taken for that of the dense
    weight (a straight-through estimator). Between :meth:`open` and :meth:`close` the parameter holds the dense weight.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons" (2013), section 4; for pruning
    Lin et al., "Dynamic Model Pruning with Feedback" (2020), equation (2); for n:m Zhou et al., "Learning N:M Fine-grained
    Structured Sparse Neural Networks from Scratch" (2021), equation (4), without its decay of pruned weights.

    Args:
        parameter: The parameter; at this moment it holds the dense weight.
        mask: Boolean, of its shape, True = shown.
        dense: The dense weight where a checkpoint brought it, of its shape.
    """

    def __init__(self, parameter: Tensor, mask: Tensor, dense: Tensor | None = None) -> None:
        self.parameter = parameter
        self._dense = local(parameter).detach().clone()
        if dense is not None:
            self._dense.copy_(part(dense, parameter))
        self.is_open = False
        self.change(mask)

    @property
    def dense(self) -> Tensor:
        """This rank's part of the dense weight; in the middle of a step, what the optimizer has made of it."""
        return local(self.parameter).detach() if self.is_open else self._dense

    @torch.no_grad()
    def change(self, mask: Tensor) -> None:
        """Show other entries from now on."""
        self._hidden = ~part(mask, self.parameter).to(self._dense.device)
        if not self.is_open:
            local(self.parameter).copy_(self.shown(self._dense))

    def shown(self, value: Tensor) -> Tensor:
        """A copy of this rank's part of a weight, with +0.0 where nothing is shown."""
        return value.masked_fill(self._hidden.to(value.device), 0)

    @torch.no_grad()
    def open(self) -> None:
        """Let the parameter hold the dense weight."""
        if not self.is_open:
            local(self.parameter).copy_(self._dense)
            self.is_open = True

    @torch.no_grad()
    def close(self) -> None:
        """Keep the dense weight, and let the parameter hold what is shown of it."""
        if self.is_open:
            self._dense.copy_(local(self.parameter))
            local(self.parameter).masked_fill_(self._hidden, 0)
            self.is_open = False


class DenseBehind:
    """The tensors of a model whose dense weights learn behind masks.

    Args:
        parameters: Of the model, by name.
        owners: The optimizers that hold a parameter, by its id.
    """

    def __init__(self, parameters: Mapping[str, Tensor], owners: Mapping[int, Sequence[Optimizer]]) -> None:
        self._parameters, self._owners = parameters, owners
        self._tensors: dict[str, StraightThrough] = {}

    def change(self, masks: Mapping[str, Tensor], dense: Mapping[str, Tensor] | None = None) -> None:
        """Show +0.0 where a mask is False, while the optimizer goes on updating the dense weight behind it.

        Args:
            masks: Name to boolean mask, True = shown. A tensor that had one and has none now gets its dense weight back.
            dense: Name to the whole dense weight, where a checkpoint brought it; else the parameter's value of now is it.
        """
        for name in [name for name in self._tensors if name not in masks]:
            self._tensors.pop(name).open()
        for name, mask in masks.items():
            if name in self._tensors:
                self._tensors[name].change(mask)
            else:
                self._tensors[name] = StraightThrough(self._parameters[name], mask, (dense or {}).get(name))

    def weights(self) -> dict[str, Tensor]:
        """Return the dense weights by name, laid out as their parameters."""
        return {name: wrap(tensor.dense, tensor.parameter) for name, tensor in self._tensors.items()}

    def open(self, optimizer: Optimizer | None = None) -> None:
        """Let the parameters hold their dense weights; of one optimizer alone, if it is named."""
        for tensor in self._of(optimizer):
            tensor.open()

    def close(self, optimizer: Optimizer | None = None) -> None:
        """Keep the dense weights, and let the parameters hold what is shown of them."""
        for tensor in self._of(optimizer):
            tensor.close()

    def drop(self) -> None:
        """Let go of the dense weights; the parameters hold what is shown of them."""
        self.close()
        self._tensors.clear()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """In the meantime, the parameters hold their dense weights."""
        self.open()
        try:
            yield
        finally:
            self.close()

    def correct(self, state_dict: dict[str, Any], prefix: str, aliases: Mapping[str, Sequence[str]]) -> None:
        """In a ``state_dict`` that was taken in the middle of a step, replace dense weights by what is shown of them."""
        for name, tensor in self._tensors.items():
            for alias in aliases[name] if tensor.is_open else []:
                if prefix + alias in state_dict:
                    state_dict[prefix + alias] = tensor.shown(state_dict[prefix + alias].detach())

    def _of(self, optimizer: Optimizer | None) -> list[StraightThrough]:
        return [
            tensor
            for tensor in self._tensors.values()
            if optimizer is None or any(o is optimizer for o in self._owners.get(id(tensor.parameter), []))
        ]
