"""What the engine does to an optimizer besides masking: per-tensor rates, and state that starts afresh."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_mask.core.sharding import local


def parameters_of(optimizer: Optimizer) -> Iterable[Tensor]:
    """All parameters of an optimizer, group by group."""
    return (p for group in optimizer.param_groups for p in group["params"])


def innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer inside of a wrapper that has no step hooks of its own, such as accelerate's."""
    while "_optimizer_step_post_hooks" not in vars(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    inner: Optimizer = optimizer
    return inner


def moves_without_gradient(optimizer: Optimizer) -> bool:
    """Whether ``step`` may change a parameter that has no gradient (LBFGS takes it as zeros and has directions)."""
    return isinstance(optimizer, torch.optim.LBFGS)


_INITIAL: list[tuple[type[Optimizer], str, Callable[[Mapping[str, Any]], float]]] = [
    (torch.optim.Rprop, "step_size", lambda group: float(group["lr"])),
    (torch.optim.Adagrad, "sum", lambda group: float(group["initial_accumulator_value"])),
]
"""Per-entry state that does not start from zero: optimizer class, state key, value by param group."""


def initial_value(optimizer: Optimizer, parameter: Tensor, key: str) -> float:
    """Return the value that an entry's state ``key`` starts from; ``parameter`` is one of the optimizer's."""
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    return next((f(group) for cls, k, f in _INITIAL if k == key and isinstance(optimizer, cls)), 0.0)


def reset_state(optimizer: Optimizer, parameter: Tensor, entries: Tensor | None = None) -> None:
    """Start the optimizer's state of ``parameter`` afresh: all of it, or that of some entries.

    Whole: the state is dropped, and the optimizer makes a new one with its own step count at its next step. Entries:
    each state tensor of the parameter's shape gets its initial value there. LBFGS keeps one state for all parameters,
    which stays as it is.

    Args:
        optimizer: The optimizer that holds ``parameter``.
        parameter: One of its parameters.
        entries: Boolean, of the shape of this rank's part of the parameter: those that start afresh; None: all.
    """
    state = optimizer.state.get(parameter)
    if not state or isinstance(optimizer, torch.optim.LBFGS):
        return
    if entries is None and not isinstance(
        optimizer, torch.optim.Adagrad
    ):  # Adagrad makes its state only when it is made
        del optimizer.state[parameter]
        return
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if value.shape == parameter.shape:
            initial = initial_value(optimizer, parameter, key)
            mine = local(value)
            mine.fill_(initial) if entries is None else mine.masked_fill_(entries.to(mine.device), initial)
        elif entries is None and key == "step":
            value.zero_()


def reset_all(optimizer: Optimizer) -> None:
    """Start the whole state of an optimizer afresh, also what LBFGS keeps for all parameters together."""
    for parameter in list(optimizer.state):
        reset_state(optimizer, parameter)
    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.state.clear()


def begin_state(optimizer: Optimizer, parameter: Tensor) -> None:
    """Make the state of a tensor that joins others in mid-training, where the optimizer does not by itself.

    Fused SGD takes momentum buffers for all tensors or for none; a buffer of zeros gives the first step that a missing
    one gives (with dampening, the first step is damped).
    """
    if not isinstance(optimizer, torch.optim.SGD) or not optimizer.state or optimizer.state.get(parameter):
        return
    group = next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
    if group.get("fused") and group["momentum"] and any("momentum_buffer" in s for s in optimizer.state.values()):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def wrap_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrap: Callable[[Callable[[], Any]], Callable[[], Any]]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In a step pre-hook: return the arguments of ``step`` with its closure wrapped, or None if it was given none."""
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrap(args[1]), *args[2:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrap(kwargs["closure"])}
    return None


class RateFactors:
    """Multiplies the learning rate of single tensors for the length of a step, without changing the param groups.

    While the optimizer updates, each group stands split by factor; before and after that, and while a closure given to
    ``step`` runs (Lightning's training step does), the groups are the user's own objects in their own order, so that
    schedulers, loggers, checkpoints and the training step see nothing.

    Args:
        optimizer: The optimizer to wrap with step hooks.
        factors: Parameter to factor; tensors that are absent keep their rate.

    Raises:
        ValueError: If the optimizer takes a single param group (LBFGS) and the factors differ.
    """

    def __init__(self, optimizer: Optimizer, factors: Mapping[Tensor, float]) -> None:
        self.optimizer = optimizer
        self._own: list[dict[str, Any]] | None = None
        self._parts_meanwhile: list[dict[str, Any]] | None = None
        self.change(factors)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._join),
            optimizer.register_state_dict_pre_hook(self._show_own),
            optimizer.register_state_dict_post_hook(self._hide_own),
        ]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The user's own param groups, also while they stand split."""
        return self.optimizer.param_groups if self._own is None else self._own

    def change(self, factors: Mapping[Tensor, float]) -> None:
        """Use these factors from the next update on.

        Raises:
            ValueError: As the constructor does.
        """
        self._factors = {id(p): f for p, f in factors.items()}
        values = {self._factors.get(id(p), 1.0) for p in parameters_of(self.optimizer)}
        if len(values) > 1 and isinstance(self.optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS takes one learning rate for all tensors; give lr_scale one number that covers them all."
            )

    def remove(self) -> None:
        """Take the hooks away and leave the groups as they were."""
        self._join()
        for handle in self._handles:
            handle.remove()

    def _before_step(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._split()
        return wrap_closure(args, kwargs, self._apart)

    def _apart(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self._join()
            result = closure()
            self._split()
            return result

        return run

    def _split(self) -> None:
        self._join()
        self._own = self.optimizer.param_groups
        self.optimizer.param_groups = [part for group in self._own for part in self._parts(group)]

    def _parts(self, group: dict[str, Any]) -> list[dict[str, Any]]:
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(self._factors.get(id(parameter), 1.0), []).append(parameter)
        if set(by_factor) <= {1.0}:
            return [group]
        return [{**group, "params": params, "lr": group["lr"] * f, "_of": group} for f, params in by_factor.items()]

    def _show_own(self, *_: Any) -> None:
        """A state_dict taken in mid-step is of the user's groups, and the step goes on at its rates."""
        if self._own is not None:
            self._parts_meanwhile = self.optimizer.param_groups
            self._join()

    def _hide_own(self, *_: Any) -> None:
        if self._parts_meanwhile is not None:
            self._own, self.optimizer.param_groups = self.optimizer.param_groups, self._parts_meanwhile
            self._parts_meanwhile = None

    def _join(self, *_: Any) -> None:
        if self._own is None:
            return
        for part in self.optimizer.param_groups:  # some optimizers keep numbers of theirs in the group
            group = part.get("_of")
            if group is not None:
                group.update({k: v for k, v in part.items() if k not in ("params", "lr", "_of")})
        self.optimizer.param_groups, self._own = self._own, None
