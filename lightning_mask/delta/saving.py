"""Making a delta from a base and what training made of it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_mask.core.files import PathLike
from lightning_mask.core.maskset import MaskSet, indices
from lightning_mask.core.sharding import whole
from lightning_mask.delta.file import write_delta
from lightning_mask.delta.items import DIGEST, LONG, Item, Part, draw, take
from lightning_mask.delta.names import Names
from lightning_mask.delta.stream import Spec, bits
from lightning_mask.delta.weights import Source, Weights, digest, hash_of, open_weights

_ABSENT = bytes(DIGEST)


def save_delta(
    path: PathLike,
    base: Source,
    tuned: Source,
    masks: MaskSet | PathLike | None = None,
    *,
    originals: bool = False,
    recipe: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float | Tensor] | None = None,
) -> None:
    """Write to ``path`` what ``tuned`` has other than ``base``.

    Both are gone through twice, one tensor at a time. Masks are in memory as a whole, a byte for each entry; those of a
    random recipe twice, since they are drawn to see whether the recipe can stand for them.

    Args:
        path: The file to write, usually ``*.safetensors``.
        base: What training started from: a checkpoint's path, a state dict, or a module. Tensors that it lacks (a new head)
            are stored whole.
        tuned: What came of it, likewise; the delta has its names.
        masks: Which entries were active, or a file of them; the delta then has exactly these. Tensors that the masks do not
            name (buffers) go by what differs. None: all goes by what differs, bit for bit, and a tensor is stored whole
            where that is shorter.
        originals: Keep the base's values beside the tuned ones, so that the base is not needed for
            :func:`~lightning_mask.delta.revert`.
        recipe: How the masks came about, as plain values; default: that of ``masks``.
        metrics: Figures of the tuned model, to be read by :func:`~lightning_mask.delta.inspect`.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the two are not of one model (a tensor's shape or dtype differs), a held entry differs, the masks are
            of another model, or a checkpoint is damaged.
    """
    if masks is not None and not isinstance(masks, MaskSet):
        masks = MaskSet.load(masks)
    given = dict(recipe or (masks.recipe if masks is not None else {}))
    with open_weights(base) as old, open_weights(tuned) as new:
        maker = _Maker(old, new, masks, given)
        write_delta(
            path,
            maker.items,
            maker.digests,
            maker.part,
            originals=originals,
            aliases=new.aliases,
            recipe=given,
            metrics={name: float(value) for name, value in (metrics or {}).items()},
            base=maker.base,
        )


class _Maker:
    """What differs between two checkpoints, found tensor by tensor: the items now, their content when it is asked for."""

    def __init__(self, old: Weights, new: Weights, masks: MaskSet | None, recipe: Mapping[str, Any]) -> None:
        self._old, self._new = old, new
        self._names = Names(new.specs, old, new.aliases)
        self._masks = {} if masks is None else _masks_by_name(masks, new)
        self._exact = masks is not None
        self._drawn = draw(recipe, {name: mask.shape for name, mask in self._masks.items()})
        self.items: dict[str, Item] = {}
        self.digests: dict[str, bytes] = {}
        of_base: dict[str, bytes] = {}
        for name, spec in new.specs.items():
            self.items[name] = self._item(name, spec)
            there = self._names.find(name)
            if there is not None:
                of_base[there] = self.digests[name]
        of_base |= {name: digest(old.read(name)) for name in old.specs if name not in of_base}
        self.base = hash_of(of_base)

    def _item(self, name: str, spec: Spec) -> Item:
        there = self._names.find(name)
        if there is None:
            self.digests[name] = _ABSENT
            return Item(name, "a", spec, spec.numel)
        if self._old.specs[there] != spec:
            raise ValueError(
                f"{name} is {spec.code} {spec.shape} in {self._new.where}, and {_words(self._old, there)}."
            )
        base = self._old.read(there)
        self.digests[name] = digest(base)
        chosen = self._active(name, base)
        form, count = form_of(chosen, spec, exact=name in self._masks)
        if form == "e" and name in self._drawn and torch.equal(self._drawn[name].view(-1), chosen):
            form = "d"
        return Item(name, form, spec, count)

    def _active(self, name: str, base: Tensor) -> Tensor:
        """Flat mask of the active entries."""
        differ = bits(base) != bits(self._new.read(name))
        if name not in self._masks:
            return differ
        mask = self._masks[name].reshape(-1)
        stray = int(differ.logical_and_(~mask).count_nonzero())
        if stray:
            raise ValueError(
                f"{name}: {stray:,} entries changed that the masks hold, so these masks are not those of this training; "
                "without masks the delta has whatever differs."
            )
        return mask

    def part(self, item: Item) -> Part:
        """Read both tensors again for what the item says."""
        tuned = self._new.read(item.name)
        if item.form == "a":
            return Part(None, bits(tuned).view(tuned.dtype), None)
        there = self._names.find(item.name)
        assert there is not None
        base = self._old.read(there)
        numbers = None if item.form == "w" else numbers_of(self._active(item.name, base), item)
        return Part(numbers, take(tuned, item, numbers), take(base, item, numbers))


def form_of(chosen: Tensor, spec: Spec, *, exact: bool) -> tuple[str, int]:
    """Return how the active entries of a tensor are stored, as a letter, and the count of :class:`Item`.

    Args:
        chosen: Flat mask of the active entries.
        spec: The tensor's dtype and shape.
        exact: Keep to these entries even where the whole tensor would be shorter.
    """
    count = int(chosen.count_nonzero())
    if count in (0, spec.numel):
        return ("w", count) if count else ("n", 0)
    if len(spec.shape) > 1:
        rows = chosen.view(spec.shape[0], -1)
        if torch.equal(rows.any(1), rows.all(1)):
            return "r", int(rows[:, 0].count_nonzero())
    width = 4 if spec.numel < LONG else 8
    if not exact and count * (spec.dtype.itemsize + width) >= spec.size:
        return "w", count
    return "e", count


def numbers_of(chosen: Tensor, item: Item) -> Tensor:
    """Return the sorted flat indices, or row numbers, of a flat mask of active entries."""
    return indices(chosen.view(item.spec.shape[0], -1)[:, 0].contiguous() if item.form == "r" else chosen)


def _masks_by_name(masks: MaskSet, new: Weights) -> dict[str, Tensor]:
    """The masks by the names of the tuned checkpoint."""
    names = Names(list(masks), new)
    found: dict[str, Tensor] = {}
    for name, mask in masks.items():
        there = names.find(name)
        if there is None:
            raise ValueError(f"The masks are of another model: {new.where} has no {names.missing(name)}.")
        if tuple(mask.shape) != new.specs[there].shape:
            raise ValueError(
                f"The masks are of another model: that of {name} is {tuple(mask.shape)}, and {_words(new, there)}."
            )
        found[there] = whole(mask).cpu()
    return found


def _words(weights: Weights, name: str) -> str:
    spec = weights.specs[name]
    return f"{spec.code} {spec.shape} in {weights.where}"
