"""Ways of holding part of one tensor exactly: zero the held gradient, put the held values back after the step.

A held gradient is written over, never multiplied (0 * inf is nan). Which way is cheapest depends on the share of active
entries; all of them leave the same bits.
"""

from typing import Protocol

import torch
from torch import Tensor

from lightning_mask.core.maskset import indices

_FEW_ACTIVE, _FEW_HELD = 0.005, 0.05
"""Up to these shares, touching entries one by one beats a pass over the tensor (scripts/benchmark.py holders)."""

_MIXED = 0.1, 0.9
"""Between these densities ``where`` guesses its branches wrong and bitwise operations are faster; outside, it is."""

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Holder(Protocol):
    """Keeps the held entries of one tensor as they are."""

    def mask_gradient(self, gradient: Tensor) -> None:
        """Write +0.0 over the held entries of ``gradient``, in place."""

    def restore(self, tensor: Tensor) -> None:
        """Write the held values back into ``tensor``, in place; bit for bit."""


def make_holder(tensor: Tensor, mask: Tensor, active: int) -> Holder:
    """Return the cheapest holder for ``tensor``, whose held values are taken now.

    Args:
        tensor: The parameter's data.
        mask: Boolean, True = active, of the same shape and on the same device.
        active: Number of True entries.
    """
    if not tensor.is_contiguous() or tensor.element_size() not in _INTEGER or tensor.is_complex():
        return _Where(tensor, mask)
    if active <= _FEW_ACTIVE * tensor.numel():
        return _FewActive(tensor, mask)
    if tensor.numel() - active <= _FEW_HELD * tensor.numel():
        return _FewHeld(tensor, mask)
    return _Bits(tensor, mask, mixed=_MIXED[0] < active / tensor.numel() < _MIXED[1])


class _Where:
    """Any layout and dtype: one pass of ``where``."""

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        self.mask, self.held, self.values = mask, ~mask, tensor.detach().clone()

    def mask_gradient(self, gradient: Tensor) -> None:
        gradient.masked_fill_(self.held, 0)

    def restore(self, tensor: Tensor) -> None:
        tensor.copy_(torch.where(self.mask, tensor, self.values))


class _FewActive:
    """Lift the few active entries out, overwrite everything, put them back."""

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        self.index, self.values = indices(mask), tensor.detach().clone()

    def mask_gradient(self, gradient: Tensor) -> None:
        if not gradient.is_contiguous():
            dense = torch.zeros(gradient.shape, dtype=gradient.dtype, device=gradient.device).view(-1)
            dense.index_copy_(0, self.index, gradient.reshape(-1).index_select(0, self.index))
            gradient.copy_(dense.view(gradient.shape))
            return
        flat = gradient.view(-1)
        kept = flat.index_select(0, self.index)
        flat.zero_().index_copy_(0, self.index, kept)

    def restore(self, tensor: Tensor) -> None:
        kept = tensor.view(-1).index_select(0, self.index)
        tensor.copy_(self.values)
        tensor.view(-1).index_copy_(0, self.index, kept)


class _FewHeld:
    """Write to the few held entries only."""

    def __init__(self, tensor: Tensor, mask: Tensor) -> None:
        self.index = indices(~mask)
        self.values = tensor.detach().view(-1).index_select(0, self.index)
        self.held = ~mask

    def mask_gradient(self, gradient: Tensor) -> None:
        if gradient.is_contiguous():
            gradient.view(-1).index_fill_(0, self.index, 0)
        else:
            gradient.masked_fill_(self.held, 0)

    def restore(self, tensor: Tensor) -> None:
        tensor.view(-1).index_copy_(0, self.index, self.values)


class _Bits:
    """Bitwise operations on the tensor seen as integers: the fastest pass over everything, and free of nan arithmetic."""

    def __init__(self, tensor: Tensor, mask: Tensor, mixed: bool) -> None:
        self.mask, self.mixed = mask, mixed
        self.bits = self._as_bits(mask, tensor.element_size())
        self.values = self._view(tensor.detach()) & ~self.bits

    @staticmethod
    def _as_bits(mask: Tensor, size: int) -> Tensor:
        return mask.to(_INTEGER[size]).neg_()  # True is -1, all bits set

    @staticmethod
    def _view(tensor: Tensor) -> Tensor:
        return tensor.view(_INTEGER[tensor.element_size()])

    def mask_gradient(self, gradient: Tensor) -> None:
        same = gradient.element_size() == self.bits.element_size()
        bits = self.bits if same else self._as_bits(self.mask, gradient.element_size())
        self._view(gradient).bitwise_and_(bits)

    def restore(self, tensor: Tensor) -> None:
        bits = self._view(tensor)
        if self.mixed:
            bits.bitwise_and_(self.bits).bitwise_or_(self.values)
        else:
            torch.where(self.mask, bits, self.values, out=bits)
