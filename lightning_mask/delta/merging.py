"""Several deltas of one base as one."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_mask.core.allocation import share
from lightning_mask.core.files import PathLike
from lightning_mask.core.ranking import top_k
from lightning_mask.delta.applying import find_all
from lightning_mask.delta.file import DeltaFile, open_delta, write_delta
from lightning_mask.delta.items import DIGEST, Item, Part, put, take
from lightning_mask.delta.saving import form_of, numbers_of
from lightning_mask.delta.stream import Spec, bits
from lightning_mask.delta.weights import Weights, digest, open_weights

How = Literal["error", "sum", "mean", "ties"]


def merge(
    deltas: Sequence[PathLike],
    out: PathLike,
    *,
    how: How = "error",
    base: PathLike | None = None,
    density: float = 0.2,
) -> None:
    """Write one delta that does what several do.

    Deltas with no entry in common are united exactly, whatever ``how``; a tensor that the base lacks (a head) may be in several
    where it is equal. Else entries that are active in several are combined
    as differences from the base, base + f(value_1 - base, value_2 - base, ...), in float64, rounded once; those that are
    active in one keep its value, but for ``"ties"``, which trims them, too.

    One tensor of each delta is in memory at a time, with all of its entries. ``"ties"`` ranks all active entries of a delta
    together, and keeps five bytes of each.

    Args:
        deltas: Two or more files of :func:`~lightning_mask.delta.save_delta`, all of one base.
        out: The file to write.
        how: What to do about an entry that is active in several. ``"error"``: refuse; ``"sum"``: add the differences;
            ``"mean"``: their mean over the deltas that have the entry; ``"ties"``: TIES-merging (Yadav et al. 2023,
            arXiv:2306.01708): of each delta the largest differences are kept, each entry's sign is that of the sum of those,
            and the result is the mean over those that agree with it.
        base: The base; needed where entries are in common and the deltas have no originals.
        density: For ``"ties"``: the share of each delta's active entries that is kept.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the deltas are of several bases, entries are in common and ``how`` is ``"error"`` or they are not
            floating-point, the base's values are needed and nowhere to be had, or a file is damaged; ``out`` is as it was then.
    """
    if how not in get_args(How):
        raise ValueError(f"how={how!r} is no way to merge: expected one of {', '.join(get_args(How))}.")
    if len(deltas) < 2:
        raise ValueError(f"There are {len(deltas)} deltas to merge: give two or more.")
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must be above 0 and at most 1: a share of each delta's entries.")
    with ExitStack() as stack:
        files = [stack.enter_context(open_delta(path)) for path in deltas]
        _check_one_base(files)
        old = stack.enter_context(open_weights(base)) if base is not None else None
        merger = _Merger(files, old, how, density)
        items = merger.items()
        write_delta(
            out,
            items,
            {name: next(f.digests[name] for f in files if name in f.digests) for name in items},
            merger.part,
            originals=all(file.has_originals for file in files),
            aliases={alias: name for file in files for alias, name in file.aliases.items()},
            recipe={"merged": [file.own for file in files], "how": how if merger.overlap else "union"}
            | ({"density": density} if how == "ties" and merger.overlap else {}),
            metrics={},
            base=files[0].base,
        )


def _check_one_base(files: Sequence[DeltaFile]) -> None:
    for first, other in combinations(files, 2):
        common = [name for name in first.items if name in other.items]
        if not common:
            raise ValueError(
                f"{first.path} and {other.path} are not of one base: they have no tensor's name in common."
            )
        for name in common:
            one, two = first.items[name].spec, other.items[name].spec
            shapes = f"is {one.code} {one.shape} in {first.path} and {two.code} {two.shape} in {other.path}"
            if first.items[name].form == other.items[name].form == "a":
                if one != two or not torch.equal(bits(first.part(name).values), bits(other.part(name).values)):
                    what = shapes if one != two else f"has other values in {first.path} than in {other.path}"
                    raise ValueError(
                        f"{name}, which their base lacks, {what}: give it another name in one of the tuned models, and make "
                        "its delta again."
                    )
            elif one != two or first.digests[name] != other.digests[name]:
                what = shapes if one != two else f"differs in those of {first.path} and {other.path}"
                raise ValueError(f"These deltas are not of one base: {name} {what}.")


class _Share(NamedTuple):
    """What one delta has of a tensor, over all of its entries."""

    active: Tensor
    """Flat mask."""
    values: Tensor
    """Flat; anything where it is not active."""
    originals: Tensor | None


class _Merger:
    def __init__(self, files: Sequence[DeltaFile], old: Weights | None, how: How, density: float) -> None:
        self._files, self._old, self._how = files, old, how
        self._places = (
            {mine: there for f in files for there, mine in find_all(f, old).items()} if old is not None else {}
        )
        self._check_base()
        self.overlap = any(bool(self._several(name).any()) for name in self._names())
        self._trimmed = [self._trim(file, density) if how == "ties" and self.overlap else {} for file in files]

    def _names(self) -> list[str]:
        return list(dict.fromkeys(name for file in self._files for name in file.items))

    def _check_base(self) -> None:
        for file in self._files:
            for name, there in self._places.items():
                if (
                    self._old is not None
                    and name in file.items
                    and digest(self._old.read(there))[:DIGEST] != file.digests[name]
                ):
                    raise ValueError(
                        f"{self._old.where} is not the base that {file.path} was made from: {there} differs."
                    )

    def _several(self, name: str) -> Tensor:
        """Flat mask of the entries that are active in more than one delta; refuse it where that is to be refused."""
        masks = [
            (file, self._share(file, name).active)
            for file in self._files
            if file.items.get(name, _NONE).form not in "na"
        ]
        if len(masks) < 2:
            return torch.zeros(1, dtype=torch.bool)
        several = torch.stack([mask.to(torch.uint8) for _, mask in masks]).sum(0, dtype=torch.int16) > 1
        if self._how == "error" and bool(several.any()):
            both = [str(file.path) for file, mask in masks if bool((mask & several).any())]
            raise ValueError(
                f"{name}: {int(several.count_nonzero()):,} entries are active in {' and '.join(both)}; say how to combine "
                "them: sum, mean or ties."
            )
        return several

    def _share(self, file: DeltaFile, name: str) -> _Share:
        item, part = file.items[name], file.part(name)
        empty = torch.zeros(item.spec.shape, dtype=item.spec.dtype)
        values = put(empty, item, part.indices, part.values).reshape(-1)
        originals = None if part.originals is None else put(empty, item, part.indices, part.originals).reshape(-1)
        if part.indices is not None:
            ones = torch.ones(item.stored, dtype=torch.bool)
            where = Item(name, item.form, Spec("BOOL", item.spec.shape), item.count)
            active = put(torch.zeros(item.spec.shape, dtype=torch.bool), where, part.indices, ones).reshape(-1)
        else:
            before = originals if originals is not None else self._base(name)
            known = item.count < item.spec.numel and before is not None
            active = (
                bits(values) != bits(before)
                if known and before is not None
                else torch.ones(item.spec.numel, dtype=torch.bool)
            )
        return _Share(active, values, originals)

    def _base(self, name: str) -> Tensor | None:
        return (
            self._old.read(self._places[name]).reshape(-1) if self._old is not None and name in self._places else None
        )

    def _trim(self, file: DeltaFile, density: float) -> dict[str, Tensor]:
        """Return, of each tensor that a delta changes, which of its active entries are among the delta's largest differences.

        A tensor that the base lacks differs from nothing, and is not trimmed.
        """
        far: dict[str, Tensor] = {}
        for name, item in file.items.items():
            if item.form not in "na" and item.spec.dtype.is_floating_point:
                mine = self._share(file, name)
                apart = mine.values[mine.active].double() - self._before(name, [mine])[mine.active].double()
                far[name] = apart.abs().nan_to_num(torch.inf).float()
        kept = top_k(list(far.values()), share(density, sum(len(one) for one in far.values())))
        return dict(zip(far, kept, strict=True))

    def _before(self, name: str, shares: Sequence[_Share]) -> Tensor:
        """The base's values, flat: all of them, or those that are active in a delta."""
        base = self._base(name)
        if base is not None:
            return base
        if any(mine.originals is None for mine in shares):
            raise ValueError(
                f"{name}: to combine differences takes the base's values: give the base, or deltas with originals."
            )
        made = torch.zeros_like(shares[0].values)
        for mine in shares:
            assert mine.originals is not None
            bits(made)[mine.active] = bits(mine.originals)[mine.active]
        return made

    def _merged(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Flat: which entries are active, their values, and the base's, where the deltas have them."""
        pairs = [
            (self._share(f, name), t, f.items[name].form)
            for f, t in zip(self._files, self._trimmed, strict=True)
            if f.items.get(name, _NONE).form != "n"
        ]
        shares = [
            mine
            if name not in trimmed
            else mine._replace(active=mine.active.masked_scatter(mine.active, trimmed[name]))
            for mine, trimmed, _ in pairs
        ]
        values = torch.zeros_like(shares[0].values)
        for mine in shares:
            bits(values)[mine.active] = bits(mine.values)[mine.active]
        masks = torch.stack([mine.active for mine in shares])
        several = (masks.sum(0, dtype=torch.int16) > 1).nonzero().view(-1)
        if len(several) and pairs[0][2] != "a":  # what the base lacks is equal in all
            values[several] = self._combined(name, shares, several)
        known = all(mine.originals is not None for mine in shares)
        return masks.any(0), values, self._before(name, shares) if known else None

    def _combined(self, name: str, shares: Sequence[_Share], at: Tensor) -> Tensor:
        masks = torch.stack([mine.active[at] for mine in shares])
        values = torch.stack([mine.values[at] for mine in shares])
        if not values.is_floating_point():
            different = (
                bits(values).view(values.shape) != bits(values[masks.byte().argmax(0), torch.arange(len(at))])
            ) & masks
            if bool(different.any()):
                raise ValueError(
                    f"{name} is {values.dtype} and differs in the deltas: there is no {self._how} of such values."
                )
            return values[masks.byte().argmax(0), torch.arange(len(at))]
        base = self._before(name, shares)[at].double()
        apart = torch.where(masks, values.double() - base, 0)
        if self._how == "ties":
            masks = masks & (apart * apart.sum(0).sign() > 0)
            apart = torch.where(masks, apart, 0)
        count = masks.sum(0)
        made = (base + apart.sum(0) / (1 if self._how == "sum" else count.clamp(min=1))).to(values.dtype)
        alone = count == 1  # not even rounded
        made[alone] = values[masks.byte().argmax(0), torch.arange(len(at))][alone]
        return made

    def items(self) -> dict[str, Item]:
        """Return what the merged delta has of each tensor."""
        made = {}
        for name in self._names():
            item = next(file.items[name] for file in self._files if name in file.items)
            if any(file.items.get(name, _NONE).form != "n" for file in self._files):
                active, _, _ = self._merged(name)
                form, count = form_of(active, item.spec, exact=True)
                item = Item(name, "a" if item.form == "a" else form, item.spec, count)
            made[name] = item
        return made

    def part(self, item: Item) -> Part:
        """Return the content of a merged item."""
        active, values, originals = self._merged(item.name)
        numbers = None if item.form in "wa" else numbers_of(active, item)
        return Part(
            numbers,
            take(values, item, numbers),
            None if originals is None else take(originals, item, numbers),
        )


_NONE = Item("", "n", Spec("U8", (0,)), 0)
