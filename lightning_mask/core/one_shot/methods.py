"""What is pruned of one layer, and what becomes of the rest: magnitude, Wanda, and OBS as in SparseGPT.

A method maps the rows of a weight, [groups, output units, inputs], the Gram matrix ``G = X^T X`` of what they meet,
[groups, inputs, inputs], and a quota to new rows and a boolean mask of the same shape, True = alive.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose, n_of_m


@dataclass(frozen=True)
class Quota:
    """How many entries of a weight stay.

    Attributes:
        keep: Number of entries that stay.
        rows: Output units of the weight.
        width: Entries of each.
        by_row: Whether each output unit keeps equally many; else all entries of the weight are ranked together.
        n_of_m: ``(n, m)``: n of every m neighbours of a unit stay; None: wherever the best are.
    """

    keep: int
    rows: int
    width: int
    by_row: bool = False
    n_of_m: tuple[int, int] | None = None

    def best(self, scores: Tensor, start: int = 0) -> Tensor:
        """Return the mask of the best entries of the columns from ``start`` on that ``scores`` holds.

        What stays of the columns before any column is the quota's share of these, rounded, so that the counts of consecutive
        parts add up to the quota.

        Args:
            scores: [groups, output units, columns].
            start: First column.
        """
        flat = scores.reshape(self.rows, -1)
        if self.n_of_m is not None:
            return n_of_m({"": flat}, *self.n_of_m)[""].view(scores.shape)
        keep = self._before(start + flat.shape[1]) - self._before(start)
        allocation = "row" if self.by_row else "uniform"
        return choose({"": flat}, [([""], Budget(keep))], "entry", allocation)[""].view(scores.shape)

    def _before(self, column: int) -> int:
        """How many entries stay of the columns before ``column``."""
        lines = self.rows if self.by_row else 1
        return lines * ((2 * (self.keep // lines) * column + self.width) // (2 * self.width))


@dataclass(frozen=True)
class Settings:
    """Of the inverse Hessian.

    Attributes:
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        block_size: Columns whose mask is chosen at once.
    """

    damping: float = 0.01
    block_size: int = 128


Method = Callable[[Tensor, Tensor, Quota, Settings], tuple[Tensor, Tensor]]


def magnitude(rows: Tensor, gram: Tensor, quota: Quota, settings: Settings) -> tuple[Tensor, Tensor]:
    """Keep the largest ``|w|`` (Han et al. 2015); what stays is as it was."""
    mask = quota.best(rows.abs())
    return rows.masked_fill(~mask, 0.0), mask


def wanda(rows: Tensor, gram: Tensor, quota: Quota, settings: Settings) -> tuple[Tensor, Tensor]:
    """Keep the largest ``|w_ij| * ||x_j||``; what stays is as it was.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (Wanda, 2023), equation (1).
    """
    norms = gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    mask = quota.best(rows.abs() * norms[:, None])
    return rows.masked_fill(~mask, 0.0), mask


def obs(rows: Tensor, gram: Tensor, quota: Quota, settings: Settings) -> tuple[Tensor, Tensor]:
    """Prune column by column, and move the later columns so that the outputs change least.

    With ``H = 2 G + damping``, and ``U`` the upper Cholesky factor of its inverse, the entry ``w_j`` of a row costs
    ``(w_j / U_jj)^2`` when the columns before j can no longer move; those of least cost among 128 columns of all rows are
    pruned (of n:m, among each m columns of a row). Pruning it moves the row by ``-w_j / U_jj * U_j``, which is the exact
    optimal step (Hassibi and Stork 1993, equation (5)) for the columns from j on. The factor 2 of H cancels, so G stands for
    it. Inputs that are always zero cost nothing and are pruned first.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot" (2023),
    algorithm 1, sections 3.3 and 3.4.

    Raises:
        ValueError: If the damped Hessian cannot be inverted.
    """
    rows, width = rows.clone(), rows.shape[2]
    upper, dead = _inverse_factor(gram, settings.damping)
    costs = upper.diagonal(dim1=1, dim2=2)
    mask = torch.empty(rows.shape, dtype=torch.bool, device=rows.device)
    together = quota.n_of_m[1] if quota.n_of_m is not None else 1
    step = max(settings.block_size // together, 1) * together
    for start in range(0, width, step):
        stop = min(start + step, width)
        part = rows[:, :, start:stop].transpose(1, 2).contiguous()  # a column is a line, which is what is worked on
        errors = torch.zeros_like(part)
        at_once = together if quota.n_of_m is not None else stop - start
        for j in range(stop - start):
            column = start + j
            if j % at_once == 0:
                now = slice(column, column + at_once)
                cost = (part[:, j : j + at_once] / costs[:, now, None]).square().masked_fill(dead[:, now, None], 0.0)
                mask[:, :, now] = quota.best(cost.transpose(1, 2), column)
            errors[:, j] = (part[:, j] / costs[:, column, None]).masked_fill(mask[:, :, column], 0.0)
            part[:, j:].baddbmm_(upper[:, column, column:stop, None], errors[:, j, None], alpha=-1)
        rows[:, :, start:stop] = part.transpose(1, 2)
        rows[:, :, stop:].baddbmm_(errors.transpose(1, 2), upper[:, start:stop, stop:], alpha=-1)
    return rows.masked_fill(~mask, 0.0), mask


METHODS: dict[str, Method] = {"magnitude": magnitude, "wanda": wanda, "obs": obs}


def _inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the damped Gram matrix, and which inputs are always zero."""
    hessian = gram.double()
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    hessian = hessian + torch.diag_embed(torch.where(dead, mean, damping * mean))
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if failed.any():
        raise ValueError(f"damping={damping} is too little for these inputs: raise it, or give more batches.")
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return upper.to(gram.dtype), dead
