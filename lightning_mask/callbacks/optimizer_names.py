"""Optimizer state by parameter name: a checkpoint can be resumed from with other param groups, or in another order."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_mask.core.optimizers import parameters_of


def names_of(optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]) -> list[list[str]]:
    """Return, for each optimizer, the names of its parameters in the order of its groups; "" for one without a name."""
    return [[names.get(p, "") for p in parameters_of(optimizer)] for optimizer in optimizers]


def arrange(
    states: list[dict[str, Any]], saved: list[list[str]], optimizers: Sequence[Optimizer], names: Mapping[Tensor, str]
) -> None:
    """Rewrite ``optimizer_states`` of a checkpoint so that each state belongs to the parameter of the same name.

    A parameter that had no state in the checkpoint starts without one; a group takes its options from the group that its
    first parameter with a saved name was in. Nothing changes where the names are the same in the same groups.

    Args:
        states: As ``Optimizer.state_dict`` returned them, one for each optimizer; rewritten in place.
        saved: What :func:`names_of` returned when they were.
        optimizers: Those that the states are for.
        names: Parameter to name, now.
    """
    if len(states) != len(optimizers) or len(saved) != len(optimizers):
        return
    for i, optimizer in enumerate(optimizers):
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        now = names_of([optimizer], names)[0]
        if now == saved[i] and sizes == [len(group["params"]) for group in states[i]["param_groups"]]:
            continue
        at = {name: position for position, name in enumerate(saved[i]) if name}
        options = {position: group for group in states[i]["param_groups"] for position in group["params"]}
        groups = optimizer.state_dict()["param_groups"]
        for group in groups:
            known = [at[now[position]] for position in group["params"] if now[position] in at]
            if known:
                group.update({k: v for k, v in options[known[0]].items() if k != "params"})
        state = {n: states[i]["state"].get(at[name]) for n, name in enumerate(now) if name in at}
        states[i] = {"state": {n: s for n, s in state.items() if s is not None}, "param_groups": groups}
