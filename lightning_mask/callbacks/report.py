"""RunReport: what a person sees of a run: what is held, when that changes, and whether it was really held."""

import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_mask.callbacks.base import MaskCallback
from lightning_mask.callbacks.packages import AnyCallback
from lightning_mask.callbacks.session import Session
from lightning_mask.core.engine import Row
from lightning_mask.core.maskset import MaskSet, active
from lightning_mask.core.sharding import local, part, reshard, totals


class RunReport(AnyCallback):
    """Print a table of what is held and what trains, and keep the facts of the run.

    Works beside any mask callbacks, also beside none. When training ends, the masks in force are written to
    ``masks.safetensors``.

    Args:
        dirpath: Folder for ``masks.safetensors``; None: nothing is written.
        check_held: Compare every held entry bit for bit with a copy taken when it became held; the copy takes as much
            memory as the tensors that are held in full or in part.
    """

    def __init__(self, dirpath: str | None = None, check_held: bool = True) -> None:
        self.dirpath, self.check_held = dirpath, check_held
        self._facts: dict[str, Any] = {}
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}
        self._phase_active: dict[int, dict[str, int]] = {}
        self._checked = self._changed = self._most_active = 0
        self._seconds, self._steps, self._since = 0.0, 0, 0.0

    def results(self) -> dict[str, Any]:
        """Return the facts of the last fit.

        Keys: ``active``, ``most_active`` (at any step), ``total`` (entries), ``density``, ``sparsity`` (of what PruneMask has in
        scope, None without),
        ``held_checked``, ``held_changed`` (entries), ``steps``, ``seconds_per_step``, ``optimizer_bytes`` (of this rank's
        optimizer state), ``phases`` (the history), ``phase_active`` (of each phase, the active entries of each tensor as it
        ended), ``tensors`` (rows of the table).
        """
        return dict(self._facts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table where no mask callback announces the masks."""
        self._seconds, self._steps, self._checked, self._changed, self._most_active = 0.0, 0, 0, 0, 0
        if session_of(trainer) is None and trainer.is_global_zero:
            _print_table(rows_of(trainer, pl_module))

    def on_masks_changing(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        """Check what was held until now."""
        self._check(pl_module)
        self._copies = {}

    def on_masks_changed(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        """Copy what is held from now on; print the table at the start."""
        if reason == "start" and trainer.is_global_zero:
            _print_table(rows_of(trainer, pl_module))
        session = session_of(trainer)
        if reason == "start":
            self._phase_active = {}
        if session is not None and session.phases is not None and trainer.is_global_zero:
            self._phase_active[session.phases.phase] = {r.name: r.active for r in rows_of(trainer, pl_module)}
        if self.check_held and session is not None and session.engine is not None:
            masks = session.engine.masks
            parameters = dict(pl_module.named_parameters())
            self._copies = {
                name: (mask, local(parameters[name]).clone())
                for name, mask in masks.items()
                if active(mask) < mask.numel()
            }

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock, and count what trains."""
        self._seconds += time.perf_counter() - self._since
        self._steps += 1
        session = session_of(trainer)
        self._most_active = max(self._most_active, 0 if session is None else session.facts.active)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what is held, and keep the facts."""
        self._check(pl_module)
        self._copies = {}
        rows = rows_of(trainer, pl_module)
        session = session_of(trainer)
        count, total = sum(r.active for r in rows), sum(numel(r) for r in rows)
        pruned = session.pruners if session is not None else []
        entries = sum(p.masks.numel() for p in pruned)
        self._facts = {
            "active": count,
            "most_active": max(count, self._most_active),
            "total": total,
            "density": count / max(total, 1),
            "sparsity": 1 - sum(p.masks.count() for p in pruned) / entries if entries else None,
            "held_checked": self._checked,
            "held_changed": self._changed,
            "steps": trainer.global_step,
            "optimizer_bytes": _state_bytes(trainer),
            "seconds_per_step": self._seconds / max(self._steps, 1) * trainer.accumulate_grad_batches,
            "phases": list(session.phases.history) if session is not None and session.phases is not None else [],
            "phase_active": [{"phase": phase, "active": counts} for phase, counts in self._phase_active.items()],
            "tensors": [vars(row) for row in rows],
        }
        if (
            self.dirpath
            and session is not None
            and session.engine is not None
            and (trainer.is_global_zero or session.sharded)
        ):
            masks = session.engine.masks
            recipes = [m.masks.recipe for m in session.members]
            MaskSet(masks, {"recipes": recipes}).save(Path(self.dirpath) / "masks.safetensors")

    def _check(self, module: LightningModule) -> None:
        reshard(module)
        parameters = dict(module.named_parameters())
        checked = changed = 0
        for name, (mask, copy) in self._copies.items():
            parameter = parameters[name]
            differ = (_bits(local(parameter)) != _bits(copy)).logical_and(~part(mask, parameter))
            checked += mask.numel() - active(mask)
            changed += totals([int(differ.count_nonzero())], parameter)[0]
        self._checked, self._changed = max(self._checked, checked), self._changed + changed


def session_of(trainer: Trainer) -> Session | None:
    """Return what the mask callbacks of a Trainer share; None: it has none, or is not training."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MaskCallback) and callback._session is not None and not callback._session.closed:
            return callback._session
    return None


def rows_of(trainer: Trainer, module: LightningModule) -> list[Row]:
    """Return what is held now, one row for each tensor; without any mask callback, by what requires a gradient."""
    session = session_of(trainer)
    if session is not None and session.engine is not None:
        return session.engine.summary()
    return [
        Row(
            n,
            tuple(p.shape),
            p.numel() * p.requires_grad,
            float(p.requires_grad),
            "-" if p.requires_grad else "requires_grad",
        )
        for n, p in module.named_parameters()
    ]


def _state_bytes(trainer: Trainer) -> int:
    states = [s for optimizer in trainer.optimizers for s in optimizer.state.values() if isinstance(s, dict)]
    tensors = [local(value) for s in states for value in s.values() if isinstance(value, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def numel(row: Row) -> int:
    """Return the number of entries of a row's tensor."""
    return int(torch.Size(row.shape).numel())


def _bits(tensor: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size())
    return tensor.contiguous().view(integer) if integer and not tensor.is_complex() else tensor


def group_rows(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Put together what differs in the numbers of blocks alone and is held alike; ``*`` stands for the numbers."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        key = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
        groups.setdefault((key, row.held_by), []).append(row)
    return [(members[0].name if len(members) == 1 else key, members) for (key, _), members in groups.items()]


def _print_table(rows: list[Row]) -> None:
    table = Table(title="What trains and what is held")
    for column, justify in (
        ("tensor", "left"),
        ("tensors", "right"),
        ("entries", "right"),
        ("active", "right"),
        ("density", "right"),
        ("held by", "left"),
    ):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for name, members in group_rows(rows):
        total, count = sum(numel(r) for r in members), sum(r.active for r in members)
        share, held_by = f"{count / max(total, 1):.2%}", members[0].held_by
        table.add_row(name, str(len(members)), f"{total:,}", f"{count:,}", share, held_by)
    total, count = sum(numel(r) for r in rows), sum(r.active for r in rows)
    table.add_section()
    table.add_row("all", str(len(rows)), f"{total:,}", f"{count:,}", f"{count / max(total, 1):.2%}", "")
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
