"""The delta file: what is in it, and how it is read.

One safetensors file. ``indices`` (int32, sorted within each tensor; ``indices.long``, int64, for tensors from 2^31 entries on)
and ``values.<dtype>``, ``originals.<dtype>`` hold what belongs to each tensor, one after another in the order of the names in
the metadata; so the header grows by a tensor's name, shape and count alone. ``base`` has the first 16 bytes of the digest of
each tensor of the base. The metadata says of each tensor its form, a letter:

====== ============================================================================
letter what is stored
====== ============================================================================
n      nothing: it is as in the base
e      the flat indices and the values of active entries
d      the values of active entries; which they are, the recipe's seed says
r      the numbers of active rows and the values of these rows
w      all values
a      all values, of a tensor that the base lacks
====== ============================================================================
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata as packages
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mask.core.files import PathLike, whole_file
from lightning_mask.core.maskset import indices as indices_of
from lightning_mask.delta.items import DIGEST, FORMS, LONG, Item, Part, draw
from lightning_mask.delta.stream import DTYPES, Spec, Writer, patch_header, raw, writing
from lightning_mask.delta.weights import TensorsFile

FORMAT = "lightning-mask delta 1"
_NO_HASH = "0" * 64
_AT_ONCE = 1 << 22


@dataclass
class Delta:
    """A delta in memory, for :func:`~lightning_mask.delta.switch`."""

    items: dict[str, Item]
    parts: dict[str, Part] = field(repr=False)
    aliases: dict[str, str] = field(default_factory=dict, repr=False)
    """Further names of tied tensors to those of ``items``."""
    facts: dict[str, Any] = field(default_factory=dict, repr=False)
    """What :func:`inspect` returns."""

    @classmethod
    def load(cls, path: PathLike) -> "Delta":
        """Read a file of :func:`~lightning_mask.delta.save_delta`.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, cut short, or no delta.
        """
        with open_delta(path) as file:
            parts = {name: file.part(name) for name, item in file.items.items() if item.form != "n"}
            return cls(file.items, parts, file.aliases, file.facts())


def inspect(delta: PathLike) -> dict[str, Any]:
    """Return what a delta file says about itself, after checking that it is whole.

    Returns:
        Plain values: ``hash`` (of the file's content), ``base`` (of the base:
        :func:`~lightning_mask.delta.content_hash`), ``active`` and ``total`` (entries),
        ``density``, ``bytes``, ``bytes_per_entry``, ``originals`` (whether it has them), ``recipe``, ``metrics``,
        ``versions``, and ``tensors``: a list of ``{name, shape, dtype, form, active, entries}`` with the form ``"none"``
        (as in the base), ``"entries"``, ``"drawn"`` (from the recipe's seed), ``"rows"``, ``"whole"``, or ``"added"`` (whole,
        and the base lacks it).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cut short, or no delta.
    """
    with open_delta(delta) as file:
        return file.facts()


class DeltaFile:
    """A delta file, open; see :func:`open_delta`."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path = path
        self._file = TensorsFile(path, stack)
        words = self._file.metadata
        if words.get("format") != FORMAT:
            raise ValueError(f"{path} is not a delta file of this package: save_delta writes them.")
        if _hash(self._file) != words.get("hash"):
            raise ValueError(f"The delta file {path} is damaged: its content does not match its hash; get it again.")
        try:
            self._read_table(words)
        except (KeyError, ValueError, TypeError) as error:
            raise self._damaged(repr(error)) from None

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"The delta file {self.path} is damaged ({why}); write it again.")

    def _read_table(self, words: Mapping[str, str]) -> None:
        names, shapes, counts = (json.loads(words[key]) for key in ("names", "shapes", "counts"))
        columns = zip(names, words["forms"], words["dtypes"].split(" "), shapes, counts, strict=True)
        self.items = {n: Item(n, f, Spec(d, tuple(s)), c) for n, f, d, s, c in columns}
        if not set(words["forms"]) <= FORMS.keys():
            raise ValueError("it has forms that this version does not know")
        self.aliases: dict[str, str] = json.loads(words["aliases"])
        self.recipe, self.metrics = json.loads(words["recipe"]), json.loads(words["metrics"])
        self.own, self.base = words["hash"], words["base"]
        expected = _layout(self.items.values(), self.has_originals)
        if self._file.specs != expected:
            raise ValueError("its tensors are not those that its header tells of")
        whole = bytes(raw(self._file.read("base")))
        self.digests = {n: whole[i * DIGEST : (i + 1) * DIGEST] for i, n in enumerate(names)}
        self._places, at = {}, dict.fromkeys(expected, 0)
        for item in self.items.values():
            self._places[item.name] = dict(at)
            for key, size in _pieces(item, self.has_originals).items():
                at[key] += size
        self._indices: dict[str, Tensor] | None = None

    @property
    def has_originals(self) -> bool:
        """Whether the base's values are kept beside the tuned ones."""
        return any(name.startswith("originals.") for name in self._file.specs)

    def part(self, name: str) -> Part:
        """Read what is stored of one tensor, whose form is not ``n``."""
        item = self.items[name]
        indices = self._drawn(item) if item.form == "d" else None
        if item.form in "er":
            indices = self._piece(item, item.indices, item.numbers)
            limit = item.spec.shape[0] if item.form == "r" else item.spec.numel
            if int(indices[0]) < 0 or int(indices[-1]) >= limit or not bool((indices[1:] > indices[:-1]).all()):
                raise self._damaged(f"{name}: indices out of order or out of range")
        kept = self.has_originals and item.form != "a"
        return Part(
            indices,
            self._piece(item, f"values.{item.spec.code}", item.stored),
            self._piece(item, f"originals.{item.spec.code}", item.stored) if kept else None,
        )

    def _piece(self, item: Item, key: str, size: int) -> Tensor:
        begin = self._places[item.name][key]
        return self._file.part(key, begin, begin + size)

    def _drawn(self, item: Item) -> Tensor:
        if self._indices is None:
            drawn = draw(self.recipe, {name: i.spec.shape for name, i in self.items.items()})
            self._indices = {
                name: indices_of(mask).to(torch.int32 if mask.numel() < LONG else torch.int64)
                for name, mask in drawn.items()
            }
        indices = self._indices.get(item.name)
        if indices is None or len(indices) != item.count:
            raise self._damaged(f"{item.name}: its recipe does not give as many entries")
        return indices

    def facts(self) -> dict[str, Any]:
        """Return what :func:`inspect` does."""
        items = self.items.values()
        active, total = sum(i.active for i in items), sum(i.spec.numel for i in items)
        size = self.path.stat().st_size
        return {
            "hash": self.own,
            "base": self.base,
            "active": active,
            "total": total,
            "density": active / max(total, 1),
            "bytes": size,
            "bytes_per_entry": size / max(active, 1),
            "originals": self.has_originals,
            "recipe": self.recipe,
            "metrics": self.metrics,
            "versions": json.loads(self._file.metadata["versions"]),
            "tensors": [
                {
                    "name": i.name,
                    "shape": list(i.spec.shape),
                    "dtype": str(i.spec.dtype).removeprefix("torch."),
                    "form": FORMS[i.form],
                    "active": i.active,
                    "entries": i.spec.numel,
                }
                for i in items
            ],
        }


@contextmanager
def open_delta(path: PathLike) -> Iterator[DeltaFile]:
    """Yield a delta file, checked, whose tensors are read one at a time.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, cut short, or no delta.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no delta file {str(path)!r}.")
    with ExitStack() as stack:
        yield DeltaFile(path, stack)


def write_delta(
    path: PathLike,
    items: Mapping[str, Item],
    digests: Mapping[str, bytes],
    part: Callable[[Item], Part],
    *,
    originals: bool,
    aliases: Mapping[str, str],
    recipe: Mapping[str, Any],
    metrics: Mapping[str, float],
    base: str,
) -> None:
    """Write a delta file, one tensor at a time.

    Args:
        path: The file.
        items: What there is of each tensor, by name.
        digests: Digest of each tensor of the base, by name; of one that the base lacks, zeros.
        part: Called once for each item with values, gives them.
        originals: Whether the parts' originals are kept.
        aliases: Further names of tied tensors.
        recipe: How the active entries were chosen.
        metrics: Figures of the tuned model.
        base: The base's hash.
    """
    words = {
        "format": FORMAT,
        "hash": _NO_HASH,
        "base": base,
        "names": _json(list(items)),
        "forms": "".join(item.form for item in items.values()),
        "dtypes": " ".join(item.spec.code for item in items.values()),
        "shapes": _json([item.spec.shape for item in items.values()]),
        "counts": _json([item.count for item in items.values()]),
        "aliases": _json(dict(aliases)),
        "recipe": _json(dict(recipe)),
        "metrics": _json(dict(metrics)),
        "versions": _json({name: packages.version(name) for name in ("lightning-mask", "torch", "safetensors")}),
    }
    layout = _layout(items.values(), originals)
    with whole_file(path) as temporary:
        with writing(temporary, layout, words) as file:
            _write_parts(file, items, part, originals, dict.fromkeys(layout, 0))
            packed = b"".join(digests[name][:DIGEST] for name in items)
            file.write("base", torch.frombuffer(bytearray(packed), dtype=torch.uint8))
        with ExitStack() as stack:
            own = _hash(TensorsFile(temporary, stack))
        patch_header(temporary, _NO_HASH, own)


def _write_parts(
    file: Writer, items: Mapping[str, Item], part: Callable[[Item], Part], originals: bool, at: dict[str, int]
) -> None:
    for item in items.values():
        pieces = _pieces(item, originals)
        if not pieces:
            continue
        indices, values, kept = part(item)
        for key, size in pieces.items():
            content = indices if key.startswith("indices") else values if key.startswith("values") else kept
            assert content is not None
            assert len(content) == size, f"{item.name}: {len(content)} {key}, expected {size}"
            file.write(
                key,
                content.to(DTYPES["I64" if key.endswith("long") else "I32"]) if content is indices else content,
                at[key],
            )
            at[key] += size


def _pieces(item: Item, originals: bool) -> dict[str, int]:
    """The tensors of the file that an item has a piece of, and the sizes of these pieces."""
    if item.form == "n":
        return {}
    pieces = {f"values.{item.spec.code}": item.stored}
    if item.numbers:
        pieces[item.indices] = item.numbers
    if originals and item.form != "a":
        pieces[f"originals.{item.spec.code}"] = item.stored
    return pieces


def _layout(items: Any, originals: bool) -> dict[str, Spec]:
    sizes: dict[str, int] = {}
    count = 0
    for item in items:
        count += 1
        for key, size in _pieces(item, originals).items():
            sizes[key] = sizes.get(key, 0) + size
    codes = {"indices": "I32", "indices.long": "I64"}
    layout = {key: Spec(codes.get(key) or key.partition(".")[2], (size,)) for key, size in sizes.items()}
    return layout | {"base": Spec("U8", (count * DIGEST,))}


def _hash(file: TensorsFile) -> str:
    """SHA-256 of all that a delta file holds: its metadata, without the hash itself, and its tensors."""
    made = hashlib.sha256(_json({k: v for k, v in sorted(file.metadata.items()) if k != "hash"}).encode())
    for name, spec in sorted(file.specs.items()):
        made.update(f"{name}|{spec.code}|{list(spec.shape)}|".encode())
        for begin in range(0, spec.shape[0] if spec.shape else 0, _AT_ONCE):
            made.update(raw(file.part(name, begin, begin + _AT_ONCE)))
    return made.hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
