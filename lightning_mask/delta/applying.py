"""Putting a delta onto its base, and taking it off again."""

from contextlib import ExitStack

import torch
from torch import Tensor

from lightning_mask.core.files import PathLike
from lightning_mask.delta.file import DeltaFile, open_delta
from lightning_mask.delta.items import DIGEST, put, take
from lightning_mask.delta.names import Names
from lightning_mask.delta.rewriting import Change, check_target, write_like
from lightning_mask.delta.stream import bits
from lightning_mask.delta.weights import Weights, digest, open_weights


def apply(base: PathLike, delta: PathLike, out: PathLike, *, force: bool = False) -> None:
    """Write ``base`` with the delta's values to ``out``: equal, bit for bit, to the model that the delta was made from.

    Tensors keep the names that they have in ``base``. Tensors that ``base`` lacks and the delta has whole (a new head) are
    added; those of which the delta knows nothing are taken along. So are the further files of a folder, but for its weights in
    other forms than the one that ``from_pretrained`` loads first (a ``pytorch_model.bin`` or ``onnx/`` beside the
    ``model.safetensors``): they would be the base's still.

    A few tensors are in memory at a time. Entries that a recipe's seed stands for are drawn for all tensors at once, which
    takes a byte for each entry in its scope while it lasts: a budget that tensors share is one draw over all of them.

    Args:
        base: A checkpoint: a file, or a folder as ``save_pretrained`` writes it.
        delta: A file of :func:`~lightning_mask.delta.save_delta`.
        out: What to write, in the form of ``base``: a file or a folder; may be ``base`` itself. Another folder must be new or
            empty.
        force: Also take a base whose content is not the one that the delta was made from.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If the base is another one (names, shapes, content), or a file is damaged; ``out`` is as it was then.
    """
    with open_delta(delta) as file, open_weights(base) as weights:
        check_target(weights, out)
        places = find_all(file, weights)
        missing = [name for name in file.items if name not in places.values()]
        lacking = next((name for name in missing if file.items[name].form not in "wa"), None)
        if lacking is not None:
            names = Names(file.items, weights, file.aliases)
            raise ValueError(f"{base} is not the base of {delta}: it has no tensor {names.missing(lacking)}.")
        if not force:
            _check_base(file, weights, places)
        names = Names(file.items, weights, file.aliases)
        added = {names.new(name): name for name in missing}

        def value(name: str) -> Tensor:
            mine = places.get(name) or added[name]
            item, part = file.items[mine], file.part(mine)
            return put(weights.read(name) if part.indices is not None else part.values, item, part.indices, part.values)

        changed = {there for there, mine in places.items() if file.items[mine].form != "n"}
        specs = {new: file.items[mine].spec for new, mine in added.items()}
        write_like(weights, out, Change(value, changed, added=specs))


def revert(
    tuned: PathLike, delta: PathLike, out: PathLike, *, base: PathLike | None = None, force: bool = False
) -> None:
    """Write the base that ``tuned`` came from to ``out``, bit for bit.

    The values come from ``base`` where it is given, else from the originals in the delta. Tensors that the base lacked are
    left out.

    Args:
        tuned: A checkpoint that :func:`apply` wrote, or that the delta was made from.
        delta: A file of :func:`~lightning_mask.delta.save_delta`.
        out: What to write, in the form of ``tuned``, as for :func:`apply`.
        base: The base; needed where the delta has no originals.
        force: Also take off a delta that was not the last change of ``tuned``, or whose base was another one.

    Raises:
        FileNotFoundError: If a path leads nowhere.
        ValueError: If ``tuned`` is not the base with this delta, there are neither originals nor a base, or a file is
            damaged; ``out`` is as it was then.
    """
    with ExitStack() as stack:
        file = stack.enter_context(open_delta(delta))
        weights = stack.enter_context(open_weights(tuned))
        old = stack.enter_context(open_weights(base)) if base is not None else None
        check_target(weights, out)
        changes = any(item.form in "edrw" for item in file.items.values())
        if old is None and changes and not file.has_originals:
            raise ValueError(
                f"{delta} has no originals: give the base that it was made from (base, --base), or make the delta again with "
                "originals (originals=True, --originals)."
            )
        reverter = _Reverter(file, weights, old)
        if not force:
            reverter.check()
        write_like(weights, out, Change(reverter.value, reverter.changed, dropped=reverter.dropped))


class _Reverter:
    def __init__(self, file: DeltaFile, weights: Weights, old: Weights | None) -> None:
        self._file, self._weights, self._old = file, weights, old
        self._places = find_all(file, weights)
        names = Names(file.items, weights, file.aliases)
        lacking = next((name for name in file.items if name not in self._places.values()), None)
        if lacking is not None:
            raise ValueError(f"{weights.where} is not {file.path}'s model: it has no tensor {names.missing(lacking)}.")
        self._in_base = {mine: there for there, mine in find_all(file, old).items()} if old is not None else {}
        self.dropped: set[str] = set()
        self.changed: set[str] = set()
        for there, mine in self._places.items():
            item = file.items[mine]
            if item.form == "a" or (old is not None and mine not in self._in_base and item.form == "w"):
                self.dropped.add(there)
            elif item.form != "n":
                self.changed.add(there)
                if old is not None and mine not in self._in_base:
                    raise ValueError(f"{old.where} is not the base of {file.path}: it has no tensor {mine!r}.")

    def value(self, name: str) -> Tensor:
        """Return the base's tensor."""
        mine = self._places[name]
        item, part = self._file.items[mine], self._file.part(mine)
        tuned = self._weights.read(name)
        if self._old is not None:
            return put(tuned, item, part.indices, take(self._old.read(self._in_base[mine]), item, part.indices))
        assert part.originals is not None
        return put(tuned, item, part.indices, part.originals)

    def check(self) -> None:
        """Refuse what is not the base with the delta, or does not become the base."""
        for there, mine in self._places.items():
            item = self._file.items[mine]
            if item.form != "n":
                part, tuned = self._file.part(mine), self._weights.read(there)
                if not torch.equal(bits(take(tuned, item, part.indices)), bits(part.values)):
                    raise ValueError(
                        f"{self._weights.where} does not have the values of {self._file.path} in {there}: "
                        "it was changed since, or this delta was never applied (force does it anyway)."
                    )
            if there in self.dropped:
                continue
            made = self.value(there) if there in self.changed else self._weights.read(there)
            if digest(made)[:DIGEST] != self._file.digests[mine]:
                raise ValueError(
                    f"{self._weights.where} without {self._file.path} is not the base that the delta was made from: "
                    f"{there} differs (force does it anyway)."
                )


def find_all(file: DeltaFile, weights: Weights) -> dict[str, str]:
    """Return the checkpoint's name of each tensor of a delta that it has, to the delta's name.

    Raises:
        ValueError: If a tensor has another shape or dtype there, or none of them is there.
    """
    names = Names(file.items, weights, file.aliases)
    places: dict[str, str] = {}
    for name in (*file.items, *file.aliases):
        there = names.find(name)
        if there is None:
            continue
        mine = file.aliases.get(name, name)
        spec, wanted = weights.specs[there], file.items[mine].spec
        if spec != wanted:
            raise ValueError(
                f"{weights.where} does not go with {file.path}: {there} is {spec.code} {spec.shape} there, and "
                f"{wanted.code} {wanted.shape} in the delta."
            )
        places[there] = mine
    if not places:
        raise ValueError(
            f"{weights.where} does not go with {file.path}: none of the delta's tensors is there, such as "
            f"{names.missing(next(iter(file.items), ''))}."
        )
    return places


def _check_base(file: DeltaFile, weights: Weights, places: dict[str, str]) -> None:
    wrong = [there for there, mine in places.items() if digest(weights.read(there))[:DIGEST] != file.digests[mine]]
    if wrong:
        raise ValueError(
            f"{weights.where} is not the base that {file.path} was made from (hash {file.base[:12]}): {len(wrong)} of "
            f"{len(places)} tensors differ, the first is {wrong[0]}. Give that base (force applies the delta anyway)."
        )
