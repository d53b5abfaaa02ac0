"""Channels: which rows, norm entries and columns of a network's layers are one channel, and would be removed together.

Which layers are coupled, through residual connections and concatenations, is read by the dependency graph of the package
``torch-pruning`` (Fang et al. 2023, "DepGraph: Towards any structural pruning", arXiv:2301.12900) from one real forward pass.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mask.core.structures import Group, Tiles, heads

Forward = Callable[[nn.Module], Any]
"""Runs a module on real inputs and returns its outputs: tensors, or mappings or sequences of them."""

Conv = nn.modules.conv._ConvNd
ConvTranspose = nn.modules.conv._ConvTransposeNd
BatchNorm = nn.modules.batchnorm._BatchNorm

_NORMS = "a normalisation over channels reads them, and would change if one were removed"
_ENDS = {
    "OUTPUT": "they are the network's output",
    "EMBED": "they are the columns of an embedding",
    "PARAMETER": "they meet a parameter that belongs to no layer torch-pruning knows",
    "LN": _NORMS,
    "GN": _NORMS,
    "IN": "an InstanceNorm reads them",
    "PRELU": "a PReLU reads them",
    "MHA": "an attention layer reads them",
    "LSTM": "an LSTM reads them",
    "UNBIND": "they are dealt out by unbind",
    "EXPAND": "they are repeated by expand",
    "CUSTOMIZED": "they meet a layer torch-pruning does not know",
}


@dataclass(frozen=True)
class Part:
    """The place of units in one side, the inputs or the outputs, of one layer.

    Attributes:
        at: Positions along that side, int64 [m].
        unit: The unit that each of them belongs to, int64 [m].
    """

    at: Tensor
    unit: Tensor

    def of(self, units: Tensor) -> Tensor:
        """Return the positions, int64, that belong to ``units``, a mask of all units, bool [units]."""
        return self.at[units[self.unit]]


@dataclass(frozen=True)
class Channels:
    """Channels that are coupled one by one: unit ``i`` is channel ``i`` of each layer.

    Attributes:
        units: How many there are.
        makers: Layer to where its outputs are units: Linear and convolution layers, and BatchNorms.
        readers: Layer to where its inputs are units: Linear and convolution layers (depthwise ones make what they read).
    """

    units: int
    makers: dict[str, Part]
    readers: dict[str, Part]


@dataclass
class Coupling:
    """The channels of a network.

    Attributes:
        channels: Those whose removal leaves a network that runs.
        left_out: The other Linear and convolution layers with the reason why their outputs stay; a head's rows are units of
            ``structure="head"``.
    """

    channels: list[Channels] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def coupling(model: nn.Module, forward: Forward) -> Coupling:
    """Trace a model and return which channels of its Linear and convolution layers are one.

    The network's outputs, embeddings, the widths of attention heads, grouped convolutions (depthwise ones are followed) and
    whatever a LayerNorm, GroupNorm or RMSNorm normalises are left out, with the reason.

    Args:
        model: The module; it is left as it was, and runs once in eval mode.
        forward: Called with the model, runs it on real inputs and returns its outputs.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If no output depends on a parameter.
    """
    graph = _graph(model, forward)
    found, taken = Coupling(), _head_layers(model)
    done: set[str] = set()
    claimed: dict[tuple[str, str], Tensor] = {}
    for module in list(graph.module2node):
        name = graph._module2name.get(module) if isinstance(module, nn.Module) else None
        if name is None or not isinstance(module, nn.Linear | Conv) or name in done:
            continue
        if name in taken:
            found.left_out[name] = "they are the widths of attention heads"
            continue
        made, read, reason = _follow(graph, module)
        done |= set(_weighted(made, model))
        channels = Channels(_width(module)[1], *({n: _part(p) for n, p in side.items()} for side in (made, read)))
        lost = False
        for key, part in _places(channels):
            width = _width(model.get_submodule(key[1]))[key[0] == "out"]
            there = part.at[part.at < width]
            lost |= len(there) < max(len(part.at), 1)
            claimed.setdefault(key, torch.zeros(width, dtype=torch.int64))[there.unique()] += 1
        if reason is None and any(each in taken for each in made):
            reason = "they are the widths of attention heads"
        if reason is None and lost:
            reason = "torch-pruning loses track of them at a reshape"
        if reason is None and not read:
            reason = "no layer reads them"
        if reason is None:
            found.channels.append(channels)
        else:
            found.left_out |= dict.fromkeys(_weighted(made, model), reason)
    for channels in list(found.channels):
        torn = next((layer for (_, layer), c in _of(claimed, channels) if bool((c != 1).any())), None)
        if torn is not None:  # a place that nobody or two claim: the graph has mistaken how they meet there
            found.channels.remove(channels)
            reason = f"torch-pruning does not see how they meet others in {torn}"
            found.left_out |= dict.fromkeys(_weighted(channels.makers, model), reason)
    return found


def channel_groups(model: nn.Module, forward: Forward) -> tuple[list[Group], dict[str, str]]:
    """Return the tensors that make each channel as groups whose units are the channels, and what is left out and why.

    A unit is the row of each coupled Linear and convolution layer, with its bias' entry, and the entries of their
    BatchNorms. It is what has to be zero for a channel to be zero; so the columns that read it are no part of it (they
    are of another tensor's rows already: each tensor is in one group), and hold nothing that reaches the output. They
    go with it when the channel is removed (:func:`lightning_mask.export.shrink`).

    Args:
        model: The module.
        forward: Called with the model, runs it on real inputs and returns its outputs.

    Returns:
        Groups as :func:`lightning_mask.core.structures.heads` gives them, and the layers left out, each with a reason;
        channels of which a layer holds only some (it follows a concatenation, or is added to one) are among these.

    Raises:
        ImportError: If torch-pruning is not installed.
        ValueError: If no output depends on a parameter.
    """
    found = coupling(model, forward)
    names = {id(p): name for name, p in model.named_parameters()}
    groups: list[Group] = []
    for channels in found.channels:
        group: Group = {}
        odd = None
        for layer, part in channels.makers.items():
            module = model.get_submodule(layer)
            if not _in_order(part, channels.units, _width(module)[1]):
                odd = layer
                break
            for tensor, dim in outputs(module):
                if id(tensor) in names:
                    group[names[id(tensor)]] = Tiles(tuple(tensor.shape), (dim,))
        if odd is None:
            groups.append(group)
        else:
            reason = f"{odd} holds only some of them, behind a concatenation"
            found.left_out |= dict.fromkeys(_weighted(channels.makers, model), reason)
    return groups, found.left_out


def outputs(layer: nn.Module) -> list[tuple[Tensor, int]]:
    """Return the parameters of a layer that its outputs are in, each with the dimension."""
    dim = 1 if isinstance(layer, ConvTranspose) and not depthwise(layer) else 0
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return [(t, d) for t, d in ((weight, dim), (bias, 0)) if isinstance(t, Tensor)]


def inputs(layer: nn.Module) -> tuple[Tensor, int]:
    """Return the weight of a Linear or convolution layer and the dimension that its inputs are in."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight, 0 if isinstance(layer, ConvTranspose) else 1


def depthwise(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that reads one channel for each that it makes."""
    return isinstance(layer, Conv) and layer.groups == layer.out_channels == layer.in_channels and layer.groups > 1


def flat(outputs: Any) -> list[Tensor]:
    """Return the tensors in what a forward pass returned, in order."""
    if isinstance(outputs, Tensor):
        return [outputs]
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    return [t for value in values for t in flat(value)] if isinstance(outputs, Mapping | list | tuple) else []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back into the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


_Sides = dict[str, list[tuple[int, int]]]
"""Layer to pairs of a position along its inputs or outputs and a unit; an empty list where the units are not known."""


def _graph(model: nn.Module, forward: Forward) -> Any:
    try:
        from torch_pruning import DependencyGraph
    except ImportError:
        raise ImportError(
            "Which channels of a network are coupled is read by torch-pruning, which is not installed: "
            "pip install 'lightning-mask[export]'."
        ) from None

    def total(module: nn.Module, _: Any) -> Tensor:
        """One number of all outputs: so that what makes an output is followed to the end."""
        made = [out for out in flat(forward(module)) if out.grad_fn is not None]
        if not made:
            raise ValueError("forward(model) returned no tensor that depends on a parameter of the model.")
        return torch.stack([out.float().sum() for out in made]).sum()

    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = DependencyGraph().build_dependency(model, None, forward_fn=total, verbose=False)
    finally:
        for parameter, was in wanted:
            parameter.requires_grad_(was)
    for node in graph.module2node.values():
        if node.type.name == "EXPAND":
            node.enable_index_mapping = (
                False  # what is repeated is left out; followed through it, some groups have no end
            )
    return graph


def _follow(graph: Any, root: nn.Module) -> tuple[_Sides, _Sides, str | None]:
    """Who makes and who reads the outputs of ``root``, and why they must stay, if they must."""
    pruner = graph.get_pruner_of_module(root)
    group = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(_width(root)[1])))
    made: _Sides = {}
    read: _Sides = {}
    reason = None
    for item in group:
        module, kind = item.dep.target.module, item.dep.target.type.name
        reason = reason or _ENDS.get(kind)
        if isinstance(module, Conv) and module.groups > 1 and not depthwise(module):
            reason = reason or f"{graph._module2name[module]} is a grouped convolution"
        if not isinstance(module, nn.Linear | Conv | BatchNorm):
            continue
        out = graph.is_out_channel_pruning_fn(item.dep.handler)
        pairs = list(zip(item.idxs, item.root_idxs, strict=True))
        known = all(unit is not None for _, unit in pairs)
        side = made if out else read
        side.setdefault(graph._module2name[module], []).extend(pairs if known else [])
    return made, read, reason


def _width(layer: nn.Module) -> tuple[int, int]:
    """How many inputs and outputs a layer has."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, Conv):
        return layer.in_channels, layer.out_channels
    assert isinstance(layer, BatchNorm)
    return layer.num_features, layer.num_features


def _weighted(layers: Iterable[str], model: nn.Module) -> list[str]:
    """Those of ``layers`` that are no BatchNorm."""
    return [layer for layer in layers if not isinstance(model.get_submodule(layer), BatchNorm)]


def _places(channels: Channels) -> list[tuple[tuple[str, str], Part]]:
    """Each side of a layer that units are in."""
    sides = (("out", channels.makers), ("in", channels.readers))
    return [((side, layer), part) for side, parts in sides for layer, part in parts.items()]


def _of(claimed: Mapping[tuple[str, str], Tensor], channels: Channels) -> list[tuple[tuple[str, str], Tensor]]:
    return [(key, claimed[key]) for key, _ in _places(channels)]


def _part(pairs: list[tuple[int, int]]) -> Part:
    at, unit = torch.tensor(sorted(set(pairs)), dtype=torch.int64).view(-1, 2).unbind(1)
    return Part(at, unit)


def _in_order(part: Part, units: int, width: int) -> bool:
    """Whether unit ``i`` is position ``i``, and there are no others."""
    return width == units and torch.equal(part.at, torch.arange(width)) and torch.equal(part.unit, part.at)


def _head_layers(model: nn.Module) -> set[str]:
    """The projections whose outputs are heads; those that read heads make channels like any other layer."""
    layers = set()
    for group in heads(model):
        for name, tiles in group.items():
            layer, _, kind = name.rpartition(".")
            reads = kind == "weight" and tiles.dims == (1,) and len(tiles.view) == 3
            if not reads:
                layers.add(layer)
    return layers
