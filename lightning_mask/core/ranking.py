"""Exact top-k over many tensors, without sorting or concatenating their scores."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 16
_HALF = 1 << 15


def top_k(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Return one boolean mask for each tensor, True at the ``k`` largest of all entries together.

    Ties are broken by position: an earlier tensor, then a smaller flat index, wins. The k-th largest value is found by a
    radix histogram over the float's bits, 65,536 entries at a time, so that the memory taken beside scores and masks
    does not grow with the number of entries. Scores are ranked in float32.

    Args:
        scores: Real tensors of any shapes, on one device or several; no nan.
        k: Number of entries to keep, between 0 and their total.

    Example:
        >>> [m.tolist() for m in top_k([torch.tensor([3.0, 1.0]), torch.tensor([2.0, 3.0, 1.0])], 3)]
        [[True, False], [True, True, False]]
    """
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"k must be between 0 and {total}, got {k}.")
    if k in (0, total):
        return [torch.full(s.shape, k > 0, dtype=torch.bool, device=s.device) for s in scores]
    high, above = _descend(_histogram(scores, None), k)
    low, above_low = _descend(_histogram(scores, high), k - above)
    threshold = (high - _HALF) * 65536 + low
    ties = k - above - above_low
    masks = []
    for score in scores:
        mask = torch.empty(score.shape, dtype=torch.bool, device=score.device)
        flat, at = mask.view(-1), 0
        for keys in _keys(score):
            part = flat[at : at + keys.numel()]
            torch.gt(keys, threshold, out=part)
            if ties:
                equal = (keys == threshold).nonzero().view(-1)[:ties]
                part[equal] = True
                ties -= equal.numel()
            at += keys.numel()
        masks.append(mask)
    return masks


def _keys(score: Tensor) -> Iterator[Tensor]:
    """Int32 numbers in the order of the float32 scores, chunk by chunk."""
    flat = score.detach().reshape(-1)
    for chunk in flat.split(_CHUNK):
        bits = (chunk.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is +0.0
        yield torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _histogram(scores: Sequence[Tensor], high: int | None) -> Tensor:
    """Counts of the keys' high halves, or of the low halves of the keys whose high half is ``high``."""
    counts = torch.zeros(65536, dtype=torch.int64)
    for score in scores:
        for keys in _keys(score):
            top = (keys >> 16) + _HALF
            values = top if high is None else (keys[top == high] & 0xFFFF)
            counts += torch.bincount(values, minlength=65536).cpu()
    return counts


def _descend(counts: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, k))
    above = int(from_top[position - 1]) if position else 0
    return 65535 - position, above
