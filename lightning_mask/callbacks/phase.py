"""Phase: one span of training as data; how phases are made from a model's blocks, read, and written."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lightning_mask.callbacks.base import plain
from lightning_mask.callbacks.freeze import (
    Strings,
    make_selection,
    parse_refresh,
)
from lightning_mask.core.engine import check_engine
from lightning_mask.core.files import whole_file
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.patterns import repeated_blocks
from lightning_mask.core.schedules import Moment, Plateau, parse_until
from lightning_mask.core.selection import Selection
from lightning_mask.core.sharding import is_sharded

_SELECTION = ("train", "score", "density", "scope", "structure", "allocation", "batches", "seed", "mask")


class Phase:
    """A span of training with one selection of active entries.

    A phase that names a selection takes the place of all FreezeMasks while it lasts; one that names none leaves them in
    force (without any, everything trains).

    Args:
        until: What ends the phase: a moment counted from the start of training (``"500 steps"``, ``"2 epochs"``,
            ``"30%"``), or ``{"monitor": "val/loss", "patience": 2, "mode": "min", "min_delta": 0.0}``: a logged metric that
            stops improving. None for the last phase.
        train, score, density, scope, structure, allocation, batches, seed, mask, refresh, engine: As in ``FreezeMask``.
        lr_scale: Factor on the learning rate of what trains; or a dict of patterns to factors (the first that matches
            counts, 1.0 elsewhere).
        warmup: How long the factor rises from 0, linearly, counted from the start of the phase: ``"100 steps"``.
        restore_best: Go back to the best weights the phase saw when a metric ends it, also where the run ends in that very
            moment. A run that is over before the metric has ended the phase keeps its last weights.
        restart: Choose the mask, then begin again: all weights and buffers, held ones too, go back to what they were when
            training started (what is pruned stays zero), and the moments of all that trains start afresh. With
            ``score="change"``, the lottery ticket of LT-SFT. Steps and the learning rate's schedule go on; this phase's
            ``lr_scale`` and ``warmup`` make up for that. Not for the first phase.
        name: What it is called in the history and the logs.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        until: str | Mapping[str, Any] | None = None,
        *,
        train: Strings = None,
        score: str | Callable[..., Any] | None = None,
        density: int | float | dict[str, int | float] | None = None,
        scope: Strings = None,
        structure: str = "entry",
        allocation: str = "global",
        batches: int = 32,
        seed: int = 0,
        mask: str | os.PathLike[str] | MaskSet | None = None,
        refresh: str | None = None,
        engine: str = "auto",
        lr_scale: float | Mapping[str, float] = 1.0,
        warmup: str | None = None,
        restore_best: bool = False,
        restart: bool = False,
        name: str | None = None,
    ) -> None:
        where = f"Phase {name!r}" if name else "Phase"
        check_engine(engine)
        self.engine, self.name, self.restore_best, self.restart = engine, name, restore_best, restart
        self.until = parse_until(plain(until), f"{where}: until")
        self.selection = make_selection(
            where,
            train=train,
            score=score,
            density=density,
            scope=scope,
            structure=structure,
            allocation=allocation,
            batches=batches,
            seed=seed,
            mask=mask,
        )
        self.refresh = parse_refresh(refresh, self.selection, where)
        self.lr_scale: float | dict[str, float] = plain(lr_scale)
        factors = self.lr_scale.values() if isinstance(self.lr_scale, dict) else [self.lr_scale]
        if not all(isinstance(f, float | int) and f > 0 for f in factors):
            raise ValueError(f"{where}: lr_scale={self.lr_scale!r} must be a positive number or a dict of them.")
        self.warmup = None if warmup is None else Moment.parse(warmup, f"{where}: warmup")
        if restore_best and not isinstance(self.until, Plateau):
            raise ValueError(
                f"{where}: restore_best needs a metric to know what is best; give until={{'monitor': ...}}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments as plain values, defaults left out; ``Phase(**phase.to_dict())`` is the same phase."""
        until: Any = self.until
        if isinstance(until, Plateau):
            until = {
                "monitor": until.monitor,
                "patience": until.patience,
                "mode": until.mode,
                "min_delta": until.min_delta,
            }
        elif until is not None:
            until = str(until)
        recipe = self.selection.recipe()
        default = Selection().recipe()
        values = {
            "name": self.name,
            "until": until,
            **{key: recipe[key] for key in _SELECTION if recipe[key] != default[key]},
            "refresh": None if self.refresh is None else str(self.refresh),
            "engine": None if self.engine == "auto" else self.engine,
            "lr_scale": None if self.lr_scale == 1.0 else self.lr_scale,
            "warmup": None if self.warmup is None else str(self.warmup),
            "restore_best": self.restore_best or None,
            "restart": self.restart or None,
        }
        return {key: value for key, value in values.items() if value is not None}


def gradual(module: nn.Module, every: Moment, lr_decay: float) -> list[Phase]:
    """Return the phases of gradual unfreezing: what follows the blocks, then one block more at a time, then everything.

    Block ``l`` counted from the output trains with its rate divided by ``lr_decay ** l``.
    Source: Howard and Ruder (2018), sections 3.2 and 3.3.

    Raises:
        ValueError: If the model has no repeated blocks.
    """
    blocks = repeated_blocks(module)
    if not blocks:
        raise ValueError(
            "PhaseUnfreeze: 'gradual' needs a model with repeated blocks, and found none; list the phases instead."
        )
    names = [name for name, _ in module.named_parameters()]
    inside = [n for n in names if n.startswith(tuple(f"{b}." for b in blocks))]
    last = names.index(inside[-1])
    head = [n for n in names[last + 1 :] if n not in inside]
    stem = [n for n in names[:last] if n not in inside]
    parts: list[tuple[str, list[str]]] = [("head", head)] if head else []
    parts += [(block, [block]) for block in reversed(blocks)]
    parts += [("stem", stem)] if stem else []
    phases = []
    for i in range(len(parts)):
        train = [pattern for _, patterns in parts[: i + 1] for pattern in patterns]
        scale = {p: lr_decay**-depth for depth, (_, patterns) in enumerate(parts[: i + 1]) for p in patterns}
        until = str(Moment(every.value * (i + 1), every.unit)) if i < len(parts) - 1 else None
        phases.append(Phase(until, train=train, lr_scale=1.0 if lr_decay == 1.0 else scale, name=f"+ {parts[i][0]}"))
    return phases


def write_phases(phases: Sequence[Phase], path: Path, writes: bool = True) -> None:
    """Write phases as YAML that ``PhaseUnfreeze(path)`` reads; under a temporary name first, then renamed.

    A phase's ``MaskSet`` is written beside it, as ``<stem>.<number of the phase>.safetensors``. A rank that ``writes`` not
    takes part all the same where such a mask is dealt out over the ranks.
    """
    given = [phase.to_dict() for phase in phases]
    for i, phase in enumerate(phases):
        mask = phase.selection.mask
        if isinstance(mask, MaskSet) and (writes or any(is_sharded(each) for each in mask.values())):
            file = path.with_name(f"{path.stem}.{i}.safetensors").absolute()
            mask.save(file)
            given[i]["mask"] = str(file)
    if not writes:
        return
    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(given, sort_keys=False))


def read_phases(path: str | os.PathLike[str]) -> list[Any]:
    """Read what :func:`write_phases` wrote, or a user's own list of phases.

    Raises:
        ValueError: If there is no such file, or it holds no list.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"PhaseUnfreeze: phases={str(path)!r} is neither 'gradual' nor the path of a YAML file.")
    try:
        given = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"PhaseUnfreeze: {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(given, list):
        raise ValueError(f"PhaseUnfreeze: {str(path)!r} must hold a list of phases.")
    return given


def make_phases(given: Iterable[Phase | Mapping[str, Any]]) -> list[Phase]:
    """Make a phase of each dict of a phase's arguments.

    Raises:
        ValueError: If one has an unknown argument, naming it.
    """
    known = ("until", *_SELECTION, "refresh", "engine", "lr_scale", "warmup", "restore_best", "restart", "name")
    phases = []
    for i, item in enumerate(given):
        if isinstance(item, Phase):
            phases.append(item)
            continue
        if not isinstance(item, Mapping):
            raise ValueError(f"PhaseUnfreeze: phase {i} must be a Phase or a dict of its arguments, got {item!r}.")
        odd = sorted(set(item) - set(known))
        if odd:
            close = get_close_matches(odd[0], known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}."
            raise ValueError(f"PhaseUnfreeze: phase {i} has the unknown argument {odd[0]!r}{hint}")
        phases.append(Phase(**item))
    return phases


def recipe_of(phase: Phase, module: nn.Module) -> dict[str, Any]:
    """What makes a phase the same phase: its arguments but for what it is called and how it is held, its mask by content."""
    values = {key: value for key, value in phase.to_dict().items() if key not in ("name", "engine")}
    if phase.selection.mask is not None:
        values["mask"] = phase.selection.given(module).hash()
    return values
