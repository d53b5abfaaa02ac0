"""Structures: which entries are chosen together, as one unit; a unit may span several tensors.

A structure lays equal tiles over each tensor and numbers them. Tiles of one group that have the same number are one unit:
rows are tiles of one tensor each, a head is a tile of each projection of its attention layer. Tiles are a reshape and a
choice of dimensions, so no index as large as a tensor is ever made.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import torch
from torch import Tensor, nn

from lightning_mask.core.patterns import repeated_blocks
from lightning_mask.core.sharding import is_sharded, shard, whole
from lightning_mask.core.transposed import is_conv1d, turned, turned_shape

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Tiles:
    """How the entries of one tensor form tiles of one size.

    Attributes:
        view: The shape that the tensor is seen in; a reshape of its own.
        dims: Ascending dimensions of ``view`` that count the tiles, in order; the others lie within a tile.
        turned: Of a weight that lies as ``(in, out, ...)`` and is seen as ``(out, in, ...)``, the number of its groups; else 0.
    """

    view: Shape
    dims: Shape
    turned: int = 0

    @property
    def size(self) -> int:
        """Entries in one tile."""
        return math.prod(n for d, n in enumerate(self.view) if d not in self.dims)

    def within(self) -> Shape:
        """Dimensions of ``view`` that lie within a tile."""
        return tuple(d for d in range(len(self.view)) if d not in self.dims)


Group = dict[str, Tiles]
"""Tensors with equally many tiles: those of the same number are one unit."""


def unit_size(group: Group) -> int:
    """Return how many entries each unit of a group has."""
    return sum(tiles.size for tiles in group.values())


def unit_shape(group: Group) -> Shape:
    """Return the shape in which the units of a group are numbered: of single entries, that of their tensor."""
    tiles = next(iter(group.values()))
    return tuple(tiles.view[d] for d in tiles.dims)


def unit_scores(scores: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return the mean score of each unit of a group.

    Args:
        scores: Name to real scores of the parameter's shape; those of the group are read.
        group: As a structure gives it; no tensor of it is empty.

    Returns:
        Real scores of any shape, unit by unit in order; for single entries the scores themselves, not a copy of them. Of
        sharded tensors the scores of larger units are whole, one tensor at a time, and equal on all ranks.
    """
    if len(group) == 1:
        ((name, tiles),) = group.items()
        if not tiles.within():
            return _seen(scores[name], tiles) if tiles.turned else scores[name]
        return _seen(scores[name], tiles).mean(tiles.within(), dtype=torch.float32)
    total = torch.zeros(math.prod(unit_shape(group)), dtype=torch.float64)
    for name, tiles in group.items():
        seen = _seen(scores[name], tiles)
        summed = seen.sum(tiles.within(), dtype=torch.float32) if tiles.within() else seen
        total += summed.reshape(-1).cpu().double()
    return (total / unit_size(group)).float()


def _seen(scores: Tensor, tiles: Tiles) -> Tensor:
    """The whole tensor in the shape that its tiles are laid over."""
    return turned(whole(scores), tiles.turned).reshape(tiles.view)


def spread(units: Tensor, group: Group, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks of a group's tensors from a mask of its units.

    Args:
        units: Boolean, one for each unit, as many and in the order that :func:`unit_scores` gave.
        group: As a structure gives it.
        scores: Tensors of the shapes and on the devices that the masks shall have.
    """
    masks = {}
    for name, tiles in group.items():
        if is_sharded(units):  # single entries
            masks[name] = units
            continue
        mine, shape = units.reshape(-1).to(scores[name].device), tuple(scores[name].shape)
        if not tiles.dims:
            mask = mine.view([1] * len(shape)).expand(shape)
        else:
            seen = mine.view([n if d in tiles.dims else 1 for d, n in enumerate(tiles.view)]).expand(tiles.view)
            mask = turned(seen.reshape(turned_shape(shape, tiles.turned)), tiles.turned).contiguous()
        masks[name] = shard(mask, scores[name])
    return masks


def _each(tile: Callable[[Shape], Tiles]) -> "Structure":
    """The structure that lays the same kind of tiles over each tensor by itself."""
    return lambda shapes, model: [{name: tile(shape)} for name, shape in shapes.items()]


def _column(shape: Shape) -> Tiles:
    return Tiles(shape, (1,) if len(shape) > 1 else tuple(range(len(shape))))


def _block(rows: int, columns: int) -> "Structure":
    """Tiles of ``rows`` x ``columns`` over dimension 0 and the others flattened; along a vector, of ``rows`` entries."""

    def layout(shapes: Shapes, model: nn.Module | None) -> list[Group]:
        return [{name: tile(name, shape)} for name, shape in shapes.items()]

    def tile(name: str, shape: Shape) -> Tiles:
        height, width = (shape[0] if shape else 1), math.prod(shape[1:])
        vector = len(shape) < 2
        if height % rows or (not vector and width % columns):
            what = f"a vector of {height} entries" if vector else f"{height} x {width}"
            by = f"{rows}" if vector else f"{rows} x {columns}"
            raise ValueError(
                f"structure='block:{rows}x{columns}': {name} of shape {shape}, {what}, is not divisible into blocks of {by}; "
                "take it out of the scope, or choose a block that divides it."
            )
        if vector:
            return Tiles((height // rows, rows), (0,))
        return Tiles((height // rows, rows, width // columns, columns), (0, 2))

    return layout


def _layers(shapes: Shapes, model: nn.Module | None) -> list[Group]:
    """One unit for each repeated block of the model, and one for each module that owns tensors outside of any block."""
    blocks = repeated_blocks(_required(model, "layer"))
    groups: dict[str, Group] = {}
    for name, shape in shapes.items():
        block = next((b for b in blocks if name.startswith(f"{b}.")), None)
        groups.setdefault(name.rpartition(".")[0] if block is None else block, {})[name] = Tiles(shape, ())
    return list(groups.values())


def _head_groups(shapes: Shapes, model: nn.Module | None) -> list[Group]:
    """The groups of :func:`heads`, of those of their tensors that are in scope."""
    every = heads(_required(model, "head"))
    known = [name for group in every for name in group]
    odd = next((name for name in shapes if name not in set(known)), None)
    if odd is not None:
        _refuse_headless(odd, known)
    groups = [{name: tiles for name, tiles in group.items() if name in shapes} for group in every]
    return [group for group in groups if group]


def _refuse_headless(name: str, known: list[str]) -> NoReturn:
    if not known:
        raise ValueError(
            f"structure='head': {name} has no attention heads, nor has any tensor of this model: an attention layer with "
            "projections of a known name, and num_heads on it or a config with num_attention_heads around it, were not found; "
            "choose another structure."
        )
    patterns = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", each) for each in known))
    raise ValueError(
        f"structure='head': {name} has no attention heads; leave scope out, or name in it only what has: "
        f"{', '.join(patterns[:8])}."
    )


def _channels(shapes: Shapes, model: nn.Module | None) -> list[Group]:
    raise ValueError(
        "structure='channel' is read from a forward pass on a batch, which PruneMask makes; elsewhere choose 'row', or pass "
        "what lightning_mask.core.channels.channel_groups finds."
    )


def _required(model: nn.Module | None, structure: str) -> nn.Module:
    if model is None:
        raise ValueError(f"structure={structure!r} is read from the model; pass the model too.")
    return model


_SEPARATE = (
    ("self.query", "self.key", "self.value", "output.dense"),  # BERT and its kin
    ("attention.query", "attention.key", "attention.value", "output.dense"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama and its kin
    ("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, BART, CLIP
    ("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ("q", "k", "v", "o"),  # T5
)
_FUSED = (("c_attn", "c_proj"), ("qkv", "proj"))  # GPT-2; timm

_Part = tuple[Tensor | None, int, Shape, int]
"""A tensor, its dimension to split, into which sizes, and which of them counts the heads."""


def heads(model: nn.Module) -> list[Group]:
    """Return the tensors of each attention layer of ``model`` as a group whose units are its heads.

    A head is the rows of the query, key and value projections that make it (with their biases' entries) and the columns of
    the output projection that read it; the output's bias belongs to no head. Where several query heads share a key and
    value head (grouped queries), the layer is two groups: a query head is its query rows and output columns, and each key
    and value head is a unit of its own: it serves all of its queries, so none of them can claim it.

    Layers are ``torch.nn.MultiheadAttention``, and modules with projections named as in BERT, Llama, OPT, DistilBERT, T5,
    GPT-2 or timm's vision transformers. The number of heads is the layer's own (``num_heads``, ``num_attention_heads``), or
    that of the nearest module around it with a ``config.num_attention_heads``. A layer whose shapes contradict its
    numbers is left out.
    """
    return [group for layer in attention_layers(model) for group in layer]


def attention_layers(model: nn.Module) -> list[list[Group]]:
    """Return the groups of :func:`heads` layer by layer: that of the query heads, then that of shared keys and values."""
    names = {id(p): name for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    layers: list[list[Group]] = []
    for path, module in modules.items():
        groups: list[Group] = []
        for parts in _attention(path, module, modules):
            group: Group = {}
            for tensor, dim, sizes, counts in parts:
                name = names.pop(id(tensor), None)  # of a tensor that several layers share, the first is told
                if name is not None and tensor is not None:
                    shape = tuple(tensor.shape)
                    group[name] = Tiles((*shape[:dim], *sizes, *shape[dim + 1 :]), (dim + counts,))
            groups += [group] if group else []
        layers += [groups] if groups else []
    return layers


def _attention(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> list[list[_Part]]:
    """The parts of each group of an attention layer; none of another module, or if a shape is not that of the heads."""
    found = [[part for part in parts if part[0] is not None] for parts in _parts_by_name(path, module, modules)]
    fit = all(
        tensor is not None and tensor.shape[dim] == math.prod(sizes) for p in found for tensor, dim, sizes, _ in p
    )
    return found if fit else []


def _parts_by_name(path: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> list[list[_Part]]:
    def below(name: str) -> nn.Module | None:
        return modules.get(f"{path}.{name}" if path else name)

    if isinstance(module, nn.MultiheadAttention):
        each = (module.num_heads, module.head_dim)
        rows = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        fused = (module.in_proj_weight, module.in_proj_bias)
        return [
            [
                *((tensor, 0, (3, *each), 1) for tensor in fused),
                *((tensor, 0, each, 0) for tensor in rows),
                *((tensor, 2, each, 0) for tensor in (module.bias_k, module.bias_v)),
                (module.out_proj.weight, 1, each, 0),
            ]
        ]
    for names in _SEPARATE:
        q, k, v, o = (below(name) for name in names)
        if q is not None and k is not None and v is not None and o is not None:
            inner = names[0].rpartition(".")[0]
            count, shared, width = _numbers(path, [below(inner)] if inner else [], modules, _outputs(q))
            queries, reads = _makes(q, (count, width), 0), [_reads(o, (count, width))]
            pairs = [*_makes(k, (shared, width), 0), *_makes(v, (shared, width), 0)]
            return [[*queries, *pairs, *reads]] if shared == count else [[*queries, *reads], pairs]
    for together, output in _FUSED:
        qkv, o = below(together), below(output)
        if qkv is not None and o is not None:
            count, shared, width = _numbers(path, [], modules, _outputs(qkv) // 3)
            if shared == count:
                return [[*_makes(qkv, (3, count, width), 1), _reads(o, (count, width))]]
    return []


def _numbers(
    path: str, inner: list[nn.Module | None], modules: Mapping[str, nn.Module], outputs: int
) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the width of a head, of the attention layer at ``path``."""
    around = [path]
    while around[-1]:
        around.append(around[-1].rpartition(".")[0])
    own = [module for module in (*inner, modules[path]) if module is not None]
    configs = [config for at in around if (config := getattr(modules.get(at), "config", None)) is not None]
    config = next((c for c in configs if isinstance(getattr(c, "num_attention_heads", None), int)), None)
    given = [getattr(module, key, None) for module in own for key in ("num_heads", "num_attention_heads")]
    count = next((n for n in [*given, getattr(config, "num_attention_heads", None)] if isinstance(n, int)), 0)
    width = getattr(config, "head_dim", None) or outputs // max(count, 1)
    return count, getattr(config, "num_key_value_heads", None) or count, width


def _outputs(layer: nn.Module) -> int:
    weight = getattr(layer, "weight", None)
    return 0 if weight is None or weight.dim() < 2 else int(weight.shape[1 if is_conv1d(layer) else 0])


def _makes(layer: nn.Module, sizes: Shape, counts: int) -> list[_Part]:
    """The parts of a projection whose outputs are those of heads."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    return [(weight, 1 if is_conv1d(layer) else 0, sizes, counts), (bias, 0, sizes, counts)]


def _reads(layer: nn.Module, sizes: Shape) -> _Part:
    """The part of a projection whose inputs are heads."""
    return (getattr(layer, "weight", None), 0 if is_conv1d(layer) else 1, sizes, 0)


Structure = Callable[[Shapes, nn.Module | None], list[Group]]
"""Shapes of the tensors in scope, none of them empty, and their model, to groups that hold each tensor once.

Where :func:`tells_sides`, the shapes are ``(out, in, ...)``, also of weights that lie the other way round: :func:`facing`."""

STRUCTURES: dict[str, Structure] = {
    "entry": _each(lambda shape: Tiles(shape, tuple(range(len(shape))))),
    # An output unit: dimension 0 of a weight (dimension 1 of one that lies as (in, out, ...)); each entry of a vector.
    "row": _each(lambda shape: Tiles(shape, (0,) if shape else ())),
    # An input unit: the other one of the two; each entry of a vector.
    "column": _each(_column),
    "tensor": _each(lambda shape: Tiles(shape, ())),
    "head": _head_groups,
    "layer": _layers,
    "channel": _channels,
}

_OF_THE_MODEL = ("head", "layer")


def tells_sides(structure: "str | Structure", allocation: str) -> bool:
    """Whether a structure or an allocation tells the output units of a weight from its input units by their dimensions."""
    if not isinstance(structure, str):
        return allocation == "row"
    return structure in ("row", "column") or structure.startswith("block:") or allocation == "row"


def facing(groups: Sequence[Group], transposed: Mapping[str, int]) -> list[Group]:
    """Return groups whose tiles are laid over shapes ``(out, in, ...)`` as those of tensors that may lie the other way round.

    Args:
        groups: As a structure gave them.
        transposed: As :func:`lightning_mask.core.transposed.transposed_weights` gives them.
    """
    return [{name: replace(tiles, turned=transposed.get(name, 0)) for name, tiles in group.items()} for group in groups]


def get(name: str | Structure) -> Structure:
    """Return the structure of that name, or the structure itself; ``block:RxC`` is one of R x C blocks.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(name, str) and (match := re.fullmatch(r"block:([1-9]\d*)x([1-9]\d*)", name)):
        return _block(int(match[1]), int(match[2]))
    if not isinstance(name, str):
        return name
    if name not in STRUCTURES:
        known = sorted((*STRUCTURES, "block:RxC (e.g. block:4x4)"))
        raise ValueError(f"structure={name!r} is unknown; there are {', '.join(known)}.")
    return STRUCTURES[name]


def default_scope(name: str, tensors: Sequence[str], model: nn.Module) -> list[str]:
    """Return those of ``tensors`` that are ranked where the user names none: all that can have units of that structure.

    Raises:
        ValueError: If none can.
    """
    if name != "head" or not tensors:
        return list(tensors)
    known = {tensor for layer in heads(model) for tensor in layer}
    found = [tensor for tensor in tensors if tensor in known]
    if not found:
        _refuse_headless(tensors[0], list(known))
    return found


def needs_model(name: str) -> bool:
    """Whether the units depend on the model and not on the tensors' shapes alone."""
    return name in _OF_THE_MODEL
