"""Checkpoints of a model that ``fully_shard`` dealt out: the optimizers' state by parameter name, whatever it is held by.

torch saves and loads the state of parameters of the model only, and of those that require a gradient at that moment; what
stands in an optimizer for a partly held tensor is neither. So while masks are in force, the state goes another way:

- into one file (``save_distributed_checkpoint=False``) as a run on one process writes it, which one process, DDP and any
  number of shards can read;
- into a folder under torch's own keys; the active entries of a partly held tensor as one tensor of all ranks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_mask.callbacks.optimizer_names import arrange
from lightning_mask.callbacks.packages import twins
from lightning_mask.core.compact import Lines, Slots
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.optimizers import initial_value, parameters_of
from lightning_mask.core.rows import whole_lines
from lightning_mask.core.sharding import part, totals, whole, wrap

STORED = "lightning_mask"
"""The key in a checkpoint of what it takes to read the optimizers' state in it."""

_METHODS = ("lightning_module_state_dict", "optimizer_state", "load_checkpoint")


def take_over(trainer: Trainer, module: LightningModule, engine: Callable[[], MaskEngine | None]) -> None:
    """Save and load checkpoints of a sharded model as this file says, until :func:`give_back`.

    Args:
        trainer: The Trainer; with another strategy than ModelParallelStrategy nothing is done.
        module: Its module.
        engine: Called to get what holds the masks; None before it is made.
    """
    strategy, fits = trainer.strategy, trainer.state.fn == TrainerFn.FITTING
    if not isinstance(strategy, twins(ModelParallelStrategy)):
        return
    give_back(strategy)
    save_weights, save_state, load = (getattr(strategy, method) for method in _METHODS)

    def lightning_module_state_dict() -> dict[str, Any]:
        holds = engine()
        if holds is not None:
            holds.settle()
        return save_weights()

    def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
        holds = engine()
        if isinstance(optimizer, twins(LightningOptimizer)):
            optimizer = optimizer.optimizer
        if holds is None:
            return save_state(optimizer)
        return state_of(holds, optimizer, strategy)

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        if STORED not in _rest_of(path):
            return load(checkpoint_path, weights_only=weights_only)
        optimizers, strategy._optimizers = strategy._optimizers, []
        try:
            checkpoint: dict[str, Any] = load(checkpoint_path, weights_only=weights_only)
        finally:
            strategy._optimizers = optimizers
        if fits:
            _load_states(checkpoint, path, optimizers, module)
        return checkpoint

    replacements = (lightning_module_state_dict, optimizer_state, load_checkpoint)
    strategy.__dict__.update(zip(_METHODS, replacements, strict=True))


def give_back(strategy: Strategy) -> None:
    """Leave the strategy to save and load as it does by itself."""
    for method in _METHODS:
        strategy.__dict__.pop(method, None)


def _rest_of(path: Path) -> dict[str, Any]:
    """What a checkpoint holds besides the tensors of model and optimizers, or all of it, not read from disk yet."""
    file = path / "meta.pt" if path.is_dir() else path
    return torch.load(file, mmap=True, map_location="cpu", weights_only=True)


def state_of(engine: MaskEngine, optimizer: Optimizer, strategy: ModelParallelStrategy) -> dict[str, Any]:
    """Return the optimizer's state for a checkpoint, as this file says; a collective.

    Returns:
        For one file, its ``state_dict`` with whole tensors, on rank 0 alone; for a folder, this rank's shards, by name.
    """
    sharded = strategy._save_distributed_checkpoint
    packed, names = optimizer.state_dict(), engine.names()[engine.optimizers.index(optimizer)]
    state: dict[Any, dict[str, Any]] = {}
    for position, values in packed["state"].items():
        name = names[position]
        known = engine.whole_state(name) or values
        if sharded:
            state[name] = {key: value for key, value in known.items() if isinstance(value, Tensor)}
            continue
        all_of_it = ((key, whole(value) if isinstance(value, Tensor) else value) for key, value in known.items())
        kept = {key: _on_cpu(value) for key, value in all_of_it if strategy.is_global_zero}
        state |= {position: kept} if strategy.is_global_zero else {}
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in packed["param_groups"]]
    return {"state": state, "param_groups": groups if sharded else packed["param_groups"]}


def numbers_of(engine: MaskEngine) -> list[dict[str, dict[str, Any]]]:
    """Return, for each optimizer, by name, what its state holds besides tensors: a folder has no place for it."""
    found = []
    for optimizer, names in zip(engine.optimizers, engine.names(), strict=True):
        state = optimizer.state_dict()["state"]
        by_name = {
            names[n]: {k: v for k, v in values.items() if isinstance(v, int | float)} for n, values in state.items()
        }
        found.append({name: values for name, values in by_name.items() if values})
    return found


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _load_states(checkpoint: dict[str, Any], path: Path, optimizers: list[Optimizer], module: nn.Module) -> None:
    saved = checkpoint[STORED]
    stored, parameters = MaskSet.from_state(saved["stored"]), dict(module.named_parameters())
    names: dict[Tensor, str] = {p: name for name, p in parameters.items()}
    if path.is_dir():
        checkpoint["optimizer_states"] = _read_folder(path, saved, parameters)
    states = checkpoint["optimizer_states"]
    arrange(states, saved["names"], optimizers, names)
    for optimizer, state in zip(optimizers, states, strict=True):
        held = [names.get(p, "") for p in parameters_of(optimizer)]
        mine = {
            position: {
                key: _mine(value, parameters[held[position]], stored.get(held[position]), optimizer, key)
                for key, value in values.items()
            }
            for position, values in state["state"].items()
        }
        optimizer.load_state_dict({"state": mine, "param_groups": state["param_groups"]})


def _mine(value: Any, parameter: Tensor, stored: Tensor | None, optimizer: Optimizer, key: str) -> Any:
    """This rank's part of one value of a parameter's state; of a compact one, its own active entries."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if stored is not None:
        lines = whole_lines(stored)
        for slots in (Slots(stored), None if lines is None else Lines(stored.shape, *lines)):
            if slots is not None and value.shape == slots.compact_shape != tuple(parameter.shape):
                dense = slots.scatter(value, initial_value(optimizer, parameter, key))
                mine = Slots(part(stored, parameter)).gather(part(dense, parameter))
                return wrap(mine, parameter, totals([len(mine)], parameter))
    if value.shape == parameter.shape and value.dim():
        return wrap(part(value, parameter).clone(), parameter)
    return value


def _read_folder(path: Path, saved: dict[str, Any], parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizers' states from a folder of shards, as their ``state_dict`` was, with this rank's parts of DTensors."""
    metadata = dcp.FileSystemReader(path).read_metadata()
    wanted: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, where in (metadata.planner_data or {}).items():
        about = metadata.state_dict_metadata[key]
        if where[0].startswith("optimizer_") and where[1] == "state" and isinstance(about, TensorStorageMetadata):
            name, kind = where[2], where[3]
            values = wanted.setdefault(where[0], {}).setdefault(name, {})
            parameter = parameters.get(name)
            if parameter is not None and about.size == parameter.shape and parameter.dim():
                values[kind] = torch.empty_like(parameter.detach(), dtype=about.properties.dtype)
            else:
                values[kind] = torch.empty(about.size, dtype=about.properties.dtype)
    target = {key: {"state": state} for key, state in wanted.items()}
    if target:
        dcp.load(target, checkpoint_id=path)
    states = []
    for i, (names, groups, rest) in enumerate(zip(saved["names"], saved["groups"], saved["numbers"], strict=True)):
        tensors = wanted.get(f"optimizer_{i}", {})
        by_name = {name: tensors.get(name, {}) | rest.get(name, {}) for name in tensors.keys() | rest.keys()}
        states.append(
            {"state": {n: by_name[name] for n, name in enumerate(names) if name in by_name}, "param_groups": groups}
        )
    return states
