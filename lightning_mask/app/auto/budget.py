"""How many entries may train, and how many a strategy would."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from lightning_mask import FreezeMask, PhaseUnfreeze
from lightning_mask.callbacks import GradientMask
from lightning_mask.core.allocation import share
from lightning_mask.core.choosing import share_out, taken_of
from lightning_mask.core.patterns import resolve
from lightning_mask.core.selection import Selection

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def limit_of(budget: int | float | str | None, cfg: DictConfig, model: nn.Module) -> int | None:
    """Return the budget as a number of entries; None: no limit.

    Raises:
        ValueError: If it is no number, share or bytes, or in bytes while there is no optimizer.
    """
    if budget is None:
        return None
    total = sum(p.numel() for p in model.parameters())
    limit: int | float
    if isinstance(budget, str):
        each = _bytes_of_an_entry(cfg)
        # What is held densely (a tensor most of whose entries train) takes state for all of its entries: a tenth is for that.
        limit = min(total, int(0.9 * bytes_of(budget) / each)) if each else total
    else:
        limit = share(budget, total) if isinstance(budget, float) and 0 < budget <= 1 else budget
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"mask.budget={budget!r} must be a number of entries from 1, a share in (0, 1], or bytes such as '10 MB'."
        )
    return limit


def bytes_of(budget: str) -> int:
    """Return how many bytes a text such as "10 MB" says.

    Raises:
        ValueError: If it says none.
    """
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B)\s*", budget.upper())
    if not found:
        raise ValueError(f"mask.budget={budget!r} must be bytes such as '10 MB', or a number or share of entries.")
    return int(float(found[1]) * _UNITS[found[2]])


def exceeds(budget: int | float | str | None, facts: Mapping[str, Any]) -> str | None:
    """Return by how much a run went beyond the budget when the most entries trained; None: it kept to it, or is not known.

    Args:
        budget: As of :func:`limit_of`.
        facts: What :meth:`lightning_mask.callbacks.RunReport.results` returned.
    """
    if isinstance(budget, str):
        taken, most, what = facts.get("optimizer_bytes"), bytes_of(budget), "bytes of optimizer state"
    elif budget is not None and "most_active" in facts:
        taken, what = facts["most_active"], "entries"
        most = share(budget, facts["total"]) if isinstance(budget, float) else budget
    else:
        return None
    return None if taken is None or taken <= most else f"{taken:,} {what} are more than the budget of {most:,}"


def _bytes_of_an_entry(cfg: DictConfig) -> float:
    """Bytes of state that the optimizer keeps for an entry, from one step of it."""
    if cfg.get("optimizer") is None:
        raise ValueError("A budget in bytes needs to know the optimizer: give optimizer=..., or the budget in entries.")
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    optimizer = instantiate(cfg.optimizer)([parameter])
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.numel() > 1]
    return sum(t.numel() * t.element_size() for t in tensors) / 4096


def entries(callback: Any, model: nn.Module) -> int | None:
    """Return how many entries a callback lets train, from its patterns and shares alone; None: that takes a run.

    Of phases, those of the one with the most. Where units differ in size, what was asked for, near which it will be.

    Args:
        callback: The mask; None: all trains.
        model: Whose entries.
    """
    everything = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if callback is None or isinstance(callback, GradientMask):
        return everything
    if isinstance(callback, PhaseUnfreeze):
        each = [phase.selection for phase in callback.phases]
        if not each or any(selection.empty for selection in each):  # "gradual" ends with everything
            return everything
        return max(_selected(selection, model) for selection in each)
    return _selected(callback.selection, model) if isinstance(callback, FreezeMask) else None


def _selected(selection: Selection, model: nn.Module) -> int:
    selection.check(model)
    if selection.mask is not None:
        return selection.given(model).count()
    whole = sum(model.get_parameter(name).numel() for name in resolve(selection.train, model, "train"))
    names = selection.scope_names(model)
    if not names:
        return whole
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    groups = share_out(shapes, selection.budgets(model), selection.structure, selection.allocation, model)
    return whole + sum(taken_of(units, keep) for units, keep in groups)
