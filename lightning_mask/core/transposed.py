"""Weights that lie the other way round: of shape ``(in, out, ...)``, where most layers keep ``(out, in, ...)``.

Such are the weights of transformers' Conv1D (the linear layers of GPT-2) and of transposed convolutions. Seen with
:func:`turned`, they are like the others: dimension 0 is that of the output units.
"""

from torch import Tensor, nn

Shape = tuple[int, ...]


def is_conv1d(layer: nn.Module) -> bool:
    """Whether ``layer`` is transformers' Conv1D, a Linear with a weight of shape ``(in, out)``; torch's Conv1d is another."""
    weight = layer._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and any(kind.__name__ == "Conv1D" for kind in type(layer).__mro__)


def transposed_weights(model: nn.Module) -> dict[str, int]:
    """Return the names of the weights of shape ``(in, out / groups, ...)``, and the number of groups of each.

    Of a weight that several layers share, the first tells.
    """
    groups: dict[int, int] = {}
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            across = layer.groups if isinstance(layer, nn.modules.conv._ConvTransposeNd) else int(is_conv1d(layer))
            groups.setdefault(id(weight), across)
    return {name: groups[id(p)] for name, p in model.named_parameters() if groups.get(id(p))}


def turned(weight: Tensor, groups: int) -> Tensor:
    """Return a weight of shape ``(in, out / groups, ...)`` as ``(out, in / groups, ...)``, or that one as it was.

    Each group of input units meets its own output units, as in an ordinary convolution of as many groups.

    Args:
        weight: Plain tensor.
        groups: As :func:`transposed_weights` gives them; 0: it does not lie so, and is returned as it is.

    Example:
        >>> from torch import tensor
        >>> turned(tensor([[1, 2, 3], [4, 5, 6]]), 1).tolist()
        [[1, 4], [2, 5], [3, 6]]
        >>> turned(tensor([[1, 2, 3], [4, 5, 6]]), 2).tolist()
        [[1], [2], [3], [4], [5], [6]]
    """
    if groups < 2:
        return weight.transpose(0, 1) if groups else weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def turned_shape(shape: Shape, groups: int) -> Shape:
    """Return the shape of what :func:`turned` returns of a weight of that shape."""
    return (shape[1] * groups, shape[0] // groups, *shape[2:]) if groups else shape
