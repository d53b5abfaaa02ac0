"""Exact top-k over many tensors, without sorting or concatenating their scores."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mask.core.sharding import is_sharded, local, ranks, summed, wrap

_CHUNK = 1 << 16
_HALF = 1 << 15


def top_k(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return one boolean mask for each tensor, True at the ``k`` largest of all entries together.

    Ties are broken by position: an earlier tensor, then a smaller flat index, wins. The k-th largest value is found by a
    radix histogram over the float's bits, 65,536 entries at a time, so that the memory taken beside scores and masks
    does not grow with the number of entries. Scores are ranked in float32. Of sharded scores (DTensors) each rank looks at
    its part; the histograms and the numbers of ties are all that is sent.

    Args:
        scores: Real tensors of any shapes, on one device or several; no nan. Plain ones are the same on all ranks.
        k: Number of entries to keep, between 0 and their total.

    Example:
        >>> [m.tolist() for m in top_k([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0, 1.0])], 3)]
        [[True, False], [True, True, False]]
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k must be between 0 and {total}, got {k}.")
    if k in (0, total):
        return [wrap(torch.full_like(local(s), k > 0, dtype=torch.bool), s) for s in scores]
    high, above = _descend(_histogram(scores, None), k)
    low, above_low = _descend(_histogram(scores, high), k - above)
    threshold = (high - _HALF) * 65536 + low
    ties = k - above - above_low
    shares = _shares_of_ties(scores, threshold, ties) if any(is_sharded(s) for s in scores) else None
    masks = []
    for i, score in enumerate(scores):
        ties = ties if shares is None else shares[i]
        mask = torch.empty(local(score).shape, dtype=torch.bool, device=score.device)
        flat, at = mask.view(-1), 0
        for keys in _keys(score):
            part = flat[at : at + keys.numel()]
            torch.gt(keys, threshold, out=part)
            if ties:
                equal = (keys == threshold).nonzero().view(-1)[:ties]
                part[equal] = True
                ties -= equal.numel()
            at += keys.numel()
        masks.append(wrap(mask, score))
    return masks


def _shares_of_ties(scores: Sequence[Tensor], threshold: int, ties: int) -> list[int]:
    """How many of the entries at the threshold are taken of this rank's part of each tensor: the first ones of all."""
    like = next(s for s in scores if is_sharded(s))
    rank, size = ranks(like)
    found = torch.zeros(len(scores), size, dtype=torch.int64)
    owners = [rank if is_sharded(s) else 0 for s in scores]
    for i, score in enumerate(scores):
        if owners[i] == rank:
            found[i, rank] = sum(int((keys == threshold).sum()) for keys in _keys(score))
    found = summed(found, like)
    before = found.view(-1).cumsum(0).view_as(found) - found
    left = (ties - before).clamp(min=0).minimum(found).tolist()
    return [left[i][owner] for i, owner in enumerate(owners)]


def _keys(score: Tensor) -> Iterator[Tensor]:
    """Int32 numbers in the order of the float32 scores, chunk by chunk."""
    flat = local(score).reshape(-1)
    for chunk in flat.split(_CHUNK):
        bits = (chunk.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0
        yield (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)  # turns all bits but the sign of negative ones


def _histogram(scores: Sequence[Tensor], high: int | None) -> Tensor:
    """Counts of the keys' high halves, or of the low halves of the keys whose high half is ``high``."""
    counts = torch.zeros(65536, dtype=torch.int64)
    like = next((s for s in scores if is_sharded(s)), counts)
    for score in scores:
        if not is_sharded(score) and ranks(like)[0]:  # the same on all ranks, so the first one counts it
            continue
        for keys in _keys(score):
            top = (keys >> 16) + _HALF
            values = top if high is None else (keys[top == high] & 0xFFFF)
            counts += torch.bincount(values, minlength=65536).cpu()
    return summed(counts, like)


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return 65535 - position, above
