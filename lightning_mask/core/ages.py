"""Ages: entries that began to train later than the rest of their tensor have a step count of their own.

Adam's moments start from zero, and its bias correction makes up for that by the number of steps. An optimizer keeps one
number for a tensor, so without more an entry that joins in mid-training would move several times too far at first.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mask.core.maskset import indices
from lightning_mask.core.sharding import first_entry, is_sharded, joined, local, totals

_CORRECTING: tuple[type[Optimizer], ...] = (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax)
_NEGLIGIBLE = 1e-4

Cohorts = list[tuple[int, Tensor]]


def corrects_bias(optimizer: Optimizer) -> bool:
    """Whether the optimizer corrects the bias of its moments in a way that :class:`Ages` knows."""
    return isinstance(optimizer, _CORRECTING)


class Ages:
    """Cohorts of entries of one tensor whose age differs from the tensor's step count.

    With moments m, v and age a, Adam moves an entry by ``lr * m / (1 - beta1^a) / (sqrt(v / (1 - beta2^a)) + eps)``
    (Kingma & Ba 2015, algorithm 1); the optimizer computes it with the tensor's step count t in place of a. The move of
    a cohort is multiplied by what this is wrong by, ``f(a) / f(t)`` with ``f(x) = sqrt(1 - beta2^x) / (1 - beta1^x)``
    (eps, which is beside the root, is left alone; for Adamax f is ``1 / (1 - beta1^x)``).

    Args:
        cohorts: Pairs of an offset (the cohort's age minus the tensor's step count) and int flat indices.
        like: The tensor. Of a sharded one the indices are of the whole tensor in ``cohorts`` and in :meth:`state`, and each
            rank keeps those of its part; all ranks have the same cohorts.
    """

    def __init__(self, cohorts: Sequence[tuple[int, Tensor]] = (), like: Tensor | None = None) -> None:
        self._like = torch.empty(0) if like is None else like
        self._first, count = first_entry(self._like), local(self._like).numel()
        self.cohorts: Cohorts = [(int(offset), index.long()) for offset, index in cohorts]
        if is_sharded(self._like):
            moved = [(offset, index - self._first) for offset, index in self.cohorts]
            self.cohorts = [(offset, index[(index >= 0) & (index < count)]) for offset, index in moved]
        self._before: list[Tensor] = []
        self._step = 0

    def state(self) -> list[list[Any]]:
        """Return the cohorts as plain values and int32 tensors (int64 from 2^31 entries on); a collective if sharded."""
        cohorts = [(offset, joined(index + self._first, self._like)) for offset, index in self.cohorts]
        return [[o, i.int() if not len(i) or int(i[-1]) < 2**31 else i] for o, i in cohorts]

    def keep(self, mask: Tensor) -> None:
        """Forget the entries that ``mask`` does not have."""
        flat = mask.reshape(-1)
        kept = [(offset, index[flat.to(index.device)[index]]) for offset, index in self.cohorts]
        sizes = self._sizes(kept) if kept else []
        self.cohorts = [cohort for cohort, size in zip(kept, sizes, strict=True) if size]

    def _sizes(self, cohorts: Cohorts) -> list[int]:
        """How many entries each of them has, on all ranks together."""
        return totals([len(index) for _, index in cohorts], self._like)

    def join(self, new: Tensor, mask: Tensor, step: int) -> int:
        """Let entries join that have not made a step; return the step count that the tensor is to have.

        The tensor counts the steps of its largest cohort, so that the corrected ones are few.

        Args:
            new: Boolean, the entries that join.
            mask: Boolean, all that are active, with ``new``.
            step: The tensor's step count so far.
        """
        self.keep(mask & ~new)
        rest = mask & ~new
        for _, index in self.cohorts:
            rest.view(-1)[index] = False
        cohorts = [(0, indices(rest)), *self.cohorts, (-step, indices(new))]
        sizes = self._sizes(cohorts)
        largest = cohorts[sizes.index(max(sizes))][0]
        merged: dict[int, list[Tensor]] = {}
        for (offset, index), size in zip(cohorts, sizes, strict=True):
            if offset != largest and size:
                merged.setdefault(offset - largest, []).append(index)
        self.cohorts = [(offset, torch.cat(parts).sort().values) for offset, parts in merged.items()]
        return step + largest

    def before_step(self, parameter: Tensor, step: int) -> None:
        """Remember where the cohorts stand."""
        flat = parameter.reshape(-1)
        self._step, self._before = step, [flat.index_select(0, index) for _, index in self.cohorts]

    def after_step(self, parameter: Tensor, step: int, group: Mapping[str, Any], optimizer: Optimizer) -> None:
        """Correct the move of each cohort, and forget those that no longer need it.

        Args:
            parameter: The tensor's data, after the step.
            step: Its step count, after the step; nothing is done if it did not rise (a gradient scaler skips steps).
            group: The param group by whose rates the step was made.
            optimizer: The optimizer.
        """
        if step <= self._step or len(self._before) != len(self.cohorts):
            return
        dense = parameter if parameter.is_contiguous() else parameter.contiguous()
        decay = 1.0
        if isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay"):
            decay = 1 - float(group["lr"]) * float(group["weight_decay"])
        left: Cohorts = []
        for (offset, index), before in zip(self.cohorts, self._before, strict=True):
            factor = _correction(step + offset, group, optimizer) / _correction(step, group, optimizer)
            if abs(factor - 1) < _NEGLIGIBLE:
                continue
            left.append((offset, index))
            start = before * decay
            dense.view(-1).index_copy_(0, index, start + (dense.view(-1).index_select(0, index) - start) * factor)
        if dense is not parameter:
            parameter.copy_(dense)
        self.cohorts, self._before = left, []


def _correction(age: int, group: Mapping[str, Any], optimizer: Optimizer) -> float:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    age = max(age, 1)  # somebody may have put an older state back
    second = 1.0 if isinstance(optimizer, torch.optim.Adamax) else math.sqrt(1 - beta2**age)
    return second / (1 - beta1**age)
