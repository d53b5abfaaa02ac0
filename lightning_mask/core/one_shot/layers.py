"""The layers that are pruned without training: a weight as rows, and the Gram matrix of what these rows meet."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_mask.core.convolutions import CONVOLUTIONS, Given, first_input, met
from lightning_mask.core.patterns import aliases
from lightning_mask.core.transposed import is_conv1d, turned

_AT_ONCE = 1 << 24  # numbers of unfolded images that are held at once


@dataclass(frozen=True)
class Weight:
    """A weight and the layers that use it.

    Attributes:
        name: Its first name.
        parameter: The weight.
        layers: Path and module of each layer that multiplies by it; more than one where it is tied.
    """

    name: str
    parameter: nn.Parameter
    layers: tuple[tuple[str, nn.Module], ...]

    @property
    def groups(self) -> int:
        """Groups of output units that meet inputs of their own: those of a convolution, else 1."""
        return _groups(self.layers[0][1])

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in: float32, or the weight's own where that is finer."""
        return torch.promote_types(self.parameter.dtype, torch.float32)

    def shape(self) -> tuple[int, int]:
        """Output units, and entries of each."""
        rows = self._turned(self.parameter.detach()).flatten(1)
        return rows.shape[0], rows.shape[1]

    def rows(self) -> Tensor:
        """Return the weight as [groups, output units of a group, entries of a unit], in :attr:`dtype`."""
        return self._turned(self.parameter.detach()).flatten(1).unflatten(0, (self.groups, -1)).to(self.dtype)

    def as_weight(self, rows: Tensor) -> Tensor:
        """Return ``rows``, of the shape of :meth:`rows`, in the shape of the weight."""
        seen = self._turned(self.parameter)
        return self._turned(rows.flatten(0, 1).view(seen.shape)).contiguous()

    def _turned(self, tensor: Tensor) -> Tensor:
        return turned(tensor, int(is_conv1d(self.layers[0][1])))


def weights_of(model: nn.Module, names: Iterable[str]) -> list[Weight]:
    """Return the weights of those names, with their layers.

    Raises:
        ValueError: If a name is of no weight of a Linear, a Conv1d to Conv3d or transformers' Conv1D.
    """
    modules, every = dict(model.named_modules(remove_duplicate=False)), aliases(model)
    found = []
    for name in names:
        layers: dict[int, tuple[str, nn.Module]] = {}
        for path, _, kind in (alias.rpartition(".") for alias in every[name]):
            layer = modules[path]
            if kind == "weight" and (
                isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) or is_conv1d(layer)
            ):
                layers.setdefault(id(layer), (path, layer))
        parameter = model.get_parameter(name)
        if not layers or not parameter.is_floating_point():
            raise ValueError(
                f"{name} is no weight of a linear or convolution layer, and only such are pruned without training; take it out "
                f"of scope with '!{name}'."
            )
        found.append(Weight(name, parameter, tuple(layers.values())))
    return found


def gram(layer: nn.Module, given: Given, dtype: torch.dtype) -> Tensor:
    """Return ``X^T X`` of what the rows of a layer's weight meet, [groups, entries of a row, entries of a row].

    A row of ``X`` is one position of the input (a token; of a convolution what lies under the kernel), so every position
    counts, padding too.

    Args:
        layer: A linear or convolution layer.
        given: Arguments of its call. Its input is [..., inputs], or of a convolution [batch, channels, *space] or without batch.
        dtype: Of the result.
    """
    total: Tensor | None = None
    with torch.autocast(first_input(given).device.type, enabled=False):
        for part in _met(layer, given):
            part = part.to(dtype)
            square = part.transpose(1, 2) @ part
            total = square if total is None else total.add_(square)
    assert total is not None
    return total


def _groups(layer: nn.Module) -> int:
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def _met(layer: nn.Module, given: Given) -> Iterator[Tensor]:
    """The matrices X of each group, [groups, positions, entries of a row], a part of the batch at a time."""
    if not isinstance(layer, CONVOLUTIONS):
        x = first_input(given)
        yield x.reshape(1, -1, x.shape[-1])
        return
    x, stride, dilation = met(layer, given)
    kernel, groups = layer.weight.shape[2:], layer.groups
    sizes = zip(x.shape[2:], kernel, stride, dilation, strict=True)
    places = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in sizes]
    steps = [at * s for at, s in zip(x.stride()[2:], stride, strict=True)]
    steps += [at * d for at, d in zip(x.stride()[2:], dilation, strict=True)]
    seen = x.as_strided((*x.shape[:2], *places, *kernel), (*x.stride()[:2], *steps))
    seen = seen.unflatten(1, (groups, -1))  # batch, groups, channels, *places, *kernel
    n = len(kernel)
    seen = seen.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    of_one = seen.numel() // max(seen.shape[1], 1)
    for part in seen.split(max(_AT_ONCE // max(of_one, 1), 1), dim=1):
        yield part.reshape(groups, -1, layer.weight[0].numel())
