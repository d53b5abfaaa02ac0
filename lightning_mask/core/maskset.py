"""MaskSet: boolean masks by parameter name, with set algebra, a hash, and a file of packed bits."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mask.core import sharding
from lightning_mask.core.files import whole_file

_FORMAT = "lightning-mask 1"


class MaskSet(Mapping[str, Tensor]):
    """Boolean masks keyed by parameter name; True = the entry may change (freeze) or is alive (prune).

    A value: its masks are not written to after it is made, and what the caller does to the tensors that were passed does
    not reach them. A mask that is all True or all False takes one byte. Masks of parameters that ``fully_shard`` dealt out
    are boolean DTensors; reading or writing all of their bits (hash, state, file) is a collective over the ranks.

    Args:
        masks: Name to boolean tensor of the parameter's shape; or to a float or integer tensor of zeros and ones.
        recipe: Plain values that say how the masks came about; kept in the file.

    Raises:
        ValueError: If a value is not a tensor of zeros and ones.

    Example:
        >>> a = MaskSet({"w": torch.tensor([True, True, False, False])})
        >>> b = MaskSet({"w": torch.tensor([True, False, True, False])})
        >>> (a & b)["w"].tolist(), (a | ~b)["w"].tolist(), a.density()
        ([True, False, False, False], [True, True, False, True], 0.5)
    """

    def __init__(self, masks: Mapping[str, Tensor], recipe: Mapping[str, Any] | None = None) -> None:
        self._masks = {name: _keep(name, mask) for name, mask in masks.items()}
        self.recipe = dict(recipe or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} tensors, {self.count():,} of {self.numel():,} entries active)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MaskSet):
            return NotImplemented
        return self.keys() == other.keys() and all(sharding.equal(self[n], other[n]) for n in self)

    __hash__ = None  # type: ignore[assignment]

    def _combine(self, other: "MaskSet", op: Callable[[Tensor, Tensor], Tensor]) -> "MaskSet":
        if self.keys() != other.keys():
            odd = sorted(set(self) ^ set(other))
            raise ValueError(f"These masks are of different tensors; only one of them has {', '.join(odd[:5])}.")
        for name in self:
            if self[name].shape != other[name].shape:
                raise ValueError(
                    f"{name}: mask shapes differ, {tuple(self[name].shape)} and {tuple(other[name].shape)}."
                )
        return MaskSet({name: own(op(*_alike(self[name], other[name]))) for name in self})

    def __and__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, both)

    def __or__(self, other: "MaskSet") -> "MaskSet":
        return self._combine(other, torch.logical_or)

    def __invert__(self) -> "MaskSet":
        return MaskSet({name: own(~mask) for name, mask in self.items()})

    def count(self) -> int:
        """Number of active entries."""
        return sum(active(mask) for mask in self.values())

    def numel(self) -> int:
        """Number of entries."""
        return sum(mask.numel() for mask in self.values())

    def density(self) -> float:
        """Active entries over all entries; 0.0 for an empty set."""
        return self.count() / max(self.numel(), 1)

    def to(self, device: torch.device | str) -> "MaskSet":
        """Return the same masks on ``device``."""
        return MaskSet({name: own(mask.to(device)) for name, mask in self.items()}, self.recipe)

    def digests(self) -> dict[str, str]:
        """Return one hex SHA-256 for each tensor, over its name, shape and bits."""
        return {name: hashlib.sha256(_header(name, mask) + _content(mask)).hexdigest() for name, mask in self.items()}

    def hash(self) -> str:
        """Return one hex SHA-256 over all names, shapes and bits; the same on every machine and device."""
        return hashlib.sha256("".join(f"{n}{d}" for n, d in sorted(self.digests().items())).encode()).hexdigest()

    def to_state(self) -> dict[str, Any]:
        """Return plain values and uint8 tensors that a checkpoint can hold and ``weights_only=True`` can load."""
        masks = {}
        for name, mask in self.items():
            uniform = _uniform(mask)
            bits = torch.from_numpy(_pack(mask)) if uniform is None else uniform
            masks[name] = {"shape": list(mask.shape), "bits": bits}
        return {"masks": masks, "recipe": json.dumps(self.recipe)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "MaskSet":
        """Return the set that :meth:`to_state` gave away."""
        masks = {}
        for name, item in state["masks"].items():
            shape, bits = item["shape"], item["bits"]
            masks[name] = _full(bits, shape) if isinstance(bits, bool) else _unpack(bits.cpu().numpy(), shape)
        return cls(masks, json.loads(state["recipe"]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks to ``path`` as safetensors: packed bits, and shapes, hash and recipe in the metadata.

        The file appears whole or not at all (it is written under a temporary name, then renamed). A mask drawn from a
        seed alone is stored as its recipe, without bits. Sharded masks are saved by all ranks together; rank 0 writes.

        Raises:
            OSError: If the folder cannot be written to.
        """
        from safetensors.torch import save_file

        state = self.to_state()["masks"]
        recipe_only = _regenerable(self.recipe) and self._follows_recipe()
        bits = {n: i["bits"] for n, i in state.items() if isinstance(i["bits"], Tensor)} if not recipe_only else {}
        uniform = {n: i["bits"] for n, i in state.items() if isinstance(i["bits"], bool)}
        metadata = {
            "format": _FORMAT,
            "shapes": json.dumps({n: i["shape"] for n, i in state.items()}),
            "uniform": json.dumps(uniform),
            "hash": self.hash(),
            "recipe": json.dumps(self.recipe),
        }
        together = any(sharding.is_sharded(mask) for mask in self.values())
        try:
            if not together or dist.get_rank() == 0:
                with whole_file(path) as temporary:
                    save_file(bits, temporary, metadata=metadata)
        finally:
            if together:
                dist.barrier()  # on every rank the file is there when this returns

    def _follows_recipe(self) -> bool:
        """Whether drawing again, as :meth:`load` would, gives these very masks."""
        if not self.keys() >= set(self.recipe["scope_names"]):
            return False
        drawn = MaskSet(_regenerate(self.recipe, {name: list(mask.shape) for name, mask in self.items()}))
        return all(sharding.equal(self[name], mask) for name, mask in drawn.items())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "MaskSet":
        """Read a file that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, is no mask file, or its content does not match its hash.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no mask file {str(path)!r}.")
        bits: dict[str, Tensor] = {}
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") == _FORMAT:  # of a foreign file no tensor is read
                    bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"The mask file {str(path)!r} is damaged ({error}); write it again with MaskSet.save."
            ) from None
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{str(path)!r} is not a mask file of this package; write one with MaskSet.save.")
        try:
            shapes, uniform = json.loads(metadata["shapes"]), json.loads(metadata["uniform"])
            recipe = json.loads(metadata["recipe"])
            masks = {name: _full(value, shapes[name]) for name, value in uniform.items()}
            masks |= {name: _unpack(packed.numpy(), shapes[name]) for name, packed in bits.items()}
            if _regenerable(recipe) and masks.keys() != shapes.keys():
                masks = _regenerate(recipe, shapes) | masks
            loaded = cls({name: masks[name] for name in shapes}, recipe)
        except Exception as error:  # whatever a damaged header leads to
            raise ValueError(f"The mask file {str(path)!r} is damaged ({error!r}); write it again.") from None
        if loaded.hash() != metadata.get("hash"):
            raise ValueError(
                f"The mask file {str(path)!r} is damaged: its content does not match its hash; write it again."
            )
        return loaded


def both(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a & b`` laid out as ``a`` (as ``b`` where that alone is sharded); at no cost where one is all True."""
    a, b = _alike(a, b)
    if _uniform(b) is True:
        return a
    return b if _uniform(a) is True else a & b


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both masks on the device of the first, and sharded where one of them is."""
    if sharding.is_sharded(b):
        return sharding.shard(a, b), b
    return (a, sharding.shard(b, a)) if sharding.is_sharded(a) else (a, b.to(a.device))


def active(mask: Tensor) -> int:
    """Number of True entries of one mask; of a sharded one that is in no MaskSet, a collective."""
    known = getattr(mask, _COUNT, None)
    if known is not None:
        return int(known)
    uniform = _uniform(mask)
    return sharding.count(mask) if uniform is None else mask.numel() * uniform


def indices(mask: Tensor) -> Tensor:
    """Return the sorted flat indices of the True entries of a plain mask, int64."""
    flat = mask.reshape(-1)
    if mask.device.type == "cpu":  # NumPy passes over what is False several times faster
        return torch.from_numpy(np.flatnonzero(flat.numpy()))
    return flat.nonzero().view(-1)


def full(value: bool, like: Tensor) -> Tensor:
    """Return a mask that is ``value`` everywhere, laid out as the parameter ``like``, and takes one byte."""
    if not sharding.is_sharded(like):
        return _full(value, like.shape)
    part = sharding.local(like)
    mask = sharding.wrap(torch.tensor(bool(value), device=part.device).expand(part.shape), like)
    return own(mask, mask.numel() * bool(value))


def _full(value: bool, shape: Any) -> Tensor:
    return torch.tensor(bool(value)).expand(tuple(shape))


_COUNT = "_lightning_mask_count"
"""Where a mask that nobody writes to keeps its number of True entries, which a sharded one takes a collective to find."""


def _uniform(mask: Tensor) -> bool | None:
    """True or False where the mask is known to be that everywhere, else None."""
    if mask.numel() == 0:
        return False
    known = getattr(mask, _COUNT, None)
    if known is not None or sharding.is_sharded(mask):
        return bool(known) if known in (0, mask.numel()) else None
    one = not any(mask.stride()) or mask.numel() == 1
    return bool(mask[(0,) * mask.dim()]) if one else None


def own(mask: Tensor, count: int | None = None) -> Tensor:
    """Mark a mask that nobody else writes to, so that a :class:`MaskSet` need not copy it; return it.

    Args:
        mask: The mask.
        count: Its number of True entries, if that is known; it need not be found again then.
    """
    mask._lightning_mask_own = True  # type: ignore[attr-defined]
    if count is not None:
        setattr(mask, _COUNT, count)
    return mask


def _keep(name: str, mask: Any) -> Tensor:
    kept = _as_bool(name, mask)
    owned = kept is not mask or hasattr(mask, "_lightning_mask_own")
    if owned and hasattr(kept, _COUNT):
        return kept
    count, part = active(kept), sharding.local(kept)
    if count in (0, kept.numel()):
        part = torch.tensor(count > 0, device=part.device).expand(part.shape)
    elif not owned:
        part = part.clone()
    return own(sharding.wrap(part, kept), count)


def _as_bool(name: str, mask: Any) -> Tensor:
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: a mask must be a boolean tensor, got {type(mask).__name__}.")
    if mask.dtype != torch.bool:
        mask = mask.detach()
        if not bool(((sharding.local(mask) == 0) | (sharding.local(mask) == 1)).all()):
            raise ValueError(f"{name}: a mask must hold only zeros and ones (False and True); got dtype {mask.dtype}.")
        mask = mask.bool()
    return mask


def _pack(mask: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.packbits(sharding.whole(mask).cpu().contiguous().view(-1).numpy())


def _unpack(bits: np.ndarray[Any, Any], shape: list[int]) -> Tensor:
    n = math.prod(shape)
    if bits.dtype != np.uint8 or bits.size != (n + 7) // 8:
        raise ValueError(f"expected {(n + 7) // 8} bytes for shape {shape}, found {bits.size}")
    return own(torch.from_numpy(np.unpackbits(bits, count=n).astype(bool)).view(shape))


def _header(name: str, mask: Tensor) -> bytes:
    return f"{name}|{list(mask.shape)}|".encode()


def _content(mask: Tensor) -> bytes:
    uniform = _uniform(mask)
    return _pack(mask).tobytes() if uniform is None else (b"all" if uniform else b"none")


def _regenerable(recipe: Mapping[str, Any]) -> bool:
    return recipe.get("score") == "random" and "scope_names" in recipe


def _regenerate(recipe: Mapping[str, Any], shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    from lightning_mask.core.choosing import draw_random  # a recipe is read by the pipeline that wrote it

    return draw_random(recipe, {name: tuple(shapes[name]) for name in recipe["scope_names"]})
