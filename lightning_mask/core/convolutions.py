"""What the kernel of a convolution meets: the input as it comes to torch's convolution, not as the layer is given it.

A layer may pad in its own ``forward`` ("same" as in TensorFlow, say), or scale its weight there, so that its attributes do not
tell what is multiplied with what.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FUNCTIONS = (functional.conv1d, functional.conv2d, functional.conv3d)
Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a call, by position and by name."""
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


class Met(NamedTuple):
    """What a kernel moves over, and how.

    Attributes:
        x: [batch, channels, *space], padded already.
        stride: For each dimension of space.
        dilation: Likewise.
    """

    x: Tensor
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


class _Reached(BaseException):  # which no forward is to catch
    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given


class _UpToConvolution(TorchFunctionMode):
    """Ends a forward pass where it comes to a convolution with a weight of this shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape = shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func in _FUNCTIONS:
            given = dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {})
            if given["weight"].shape == self.shape:
                raise _Reached(given)
        return func(*args, **(kwargs or {}))


def first_input(given: Given) -> Tensor:
    """Return the first of what a layer was called with."""
    args, kwargs = given
    x: Tensor = next(iter((*args, *kwargs.values())))
    return x.detach()


def met(layer: nn.Module, given: Given) -> Met:
    """Return what the kernel of ``layer`` meets when it is called with ``given``.

    Where its ``forward`` comes to no convolution of torch with a weight of the layer's shape, that of torch's own class does.

    Args:
        layer: One of ``CONVOLUTIONS``.
        given: Arguments of its call; its input is [batch, channels, *space] or without batch.
    """
    convolution: Any = layer
    weight, (args, kwargs) = convolution.weight, given
    found: dict[str, Any] = {}
    try:
        with _UpToConvolution(weight.shape), torch.no_grad():
            convolution.forward(*args, **kwargs)
            convolution._conv_forward(first_input(given), weight, None)
    except _Reached as reached:
        found = reached.given
    x, kernel = found["input"].detach(), weight.shape[2:]
    if x.dim() == len(kernel) + 1:
        x = x[None]
    stride, dilation = (_each(found.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    return Met(functional.pad(x, _padding(found.get("padding", 0), kernel, dilation)), stride, dilation)


def convolve(met: Met, kernel: Tensor, groups: int) -> Tensor:
    """Return what another kernel of the same size gives in that place, [batch, channels out, *space]."""
    return _FUNCTIONS[len(met.stride) - 1](met.x, kernel, None, met.stride, 0, met.dilation, groups)


def _each(value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
    """Torch takes one number for all dimensions, alone or in a sequence."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _padding(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> list[int]:
    """Zeros before and behind, the last dimension first, as ``torch.nn.functional.pad`` takes them."""
    if padding == "same":  # an odd one behind
        wide = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(w // 2, w - w // 2) for w in wide]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]
    return [zeros for side in reversed(sides) for zeros in side]
