"""Every optimizer of ``torch.optim`` that trains dense tensors, in each of its implementations, found by looking."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

NOT_TESTED = {
    "Optimizer": "the base class",
    "SparseAdam": "takes sparse gradients only, which a mask over entries does not go with",
}
_ON = {"weight_decay": 0.1, "momentum": 0.9}
_FLAGS = ("amsgrad", "maximize", "nesterov", "centered", "decoupled_weight_decay")


@dataclass(frozen=True)
class OptimizerCase:
    """A class and the arguments to make it with."""

    name: str
    cls: type[Optimizer]
    arguments: dict[str, Any] = field(hash=False)

    def takes(self, parameter: Tensor) -> bool:
        """Whether the class trains a tensor of this shape (Muon takes matrices only)."""
        try:
            self.cls([nn.Parameter(parameter.detach().clone())], **self.arguments)
        except ValueError:
            return False
        return True

    def make(self, parameters: Iterable[Any]) -> Optimizer:
        return self.cls(parameters, **self.arguments)


def optimizer_classes() -> list[type[Optimizer]]:
    found = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    assert NOT_TESTED.keys() <= found.keys()
    return [c for n, c in sorted(found.items()) if n not in NOT_TESTED]


def optimizer_cases() -> list[OptimizerCase]:
    cases = []
    for cls in optimizer_classes():
        known = set(inspect.signature(cls.__init__).parameters)
        plain = {"lr": 0.01, **{k: v for k, v in _ON.items() if k in known}}
        cases.append(OptimizerCase(cls.__name__, cls, plain))
        flags = {flag: True for flag in _FLAGS if flag in known}
        if flags:
            cases.append(OptimizerCase(f"{cls.__name__} {' '.join(flags)}", cls, {**plain, **flags}))
        for way in ("foreach", "fused"):
            if way in known:
                cases.append(OptimizerCase(f"{cls.__name__} {way}", cls, {**plain, way: True}))
        if "line_search_fn" in known:
            searching = {**plain, "line_search_fn": "strong_wolfe"}
            cases.append(OptimizerCase(f"{cls.__name__} strong_wolfe", cls, searching))
    return cases
