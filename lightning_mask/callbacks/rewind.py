"""Rewind: go back to the weights and the learning rate of an earlier step, as lottery tickets do."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_mask.core.sharding import gathered

if TYPE_CHECKING:
    from lightning_mask.callbacks.session import Session


class Rewind:
    """Keeps the weights of a step, and the schedulers' state, and goes back to them when asked.

    Source: Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (2020), section 2 (to step k); Renda
    et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning" (2020), section 3, for the learning rate.

    Args:
        rate: Whether the learning rate goes back too.
    """

    def __init__(self, rate: bool) -> None:
        self.rate = rate
        self.step: int | None = None
        self._weights: dict[str, Tensor] = {}
        self._schedulers: list[dict[str, Any]] = []
        self._rates: list[list[dict[str, Any]]] = []
        self.due = False

    def keep(self, session: "Session") -> None:
        """Copy at the first chance: by hand, several steps may lie between two batches."""
        if self.step is None or session.step < self.step or self._weights:
            return
        self._weights = {n: p.detach().clone() for n, p in session.module.named_parameters()}
        self._schedulers = [copy.deepcopy(c.scheduler.state_dict()) for c in session.trainer.lr_scheduler_configs]
        self._rates = [[_scheduled(group) for group in o.param_groups] for o in session.trainer.optimizers]

    def go_back(self, session: "Session") -> None:
        """Set everything that trains to the weights that were kept, with fresh moments, if it is due."""
        if not self.due or session.engine is None:
            return
        self.due = False
        session.engine.rewind(self._weights)
        if not self.rate:
            return
        for config, state in zip(session.trainer.lr_scheduler_configs, self._schedulers, strict=True):
            config.scheduler.load_state_dict(copy.deepcopy(state))
        for optimizer, rates in zip(session.trainer.optimizers, self._rates, strict=True):
            for group, kept in zip(optimizer.param_groups, rates, strict=True):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(kept["lr"])
                    kept = {key: value for key, value in kept.items() if key != "lr"}
                group.update(kept)

    def forget(self) -> None:
        """Begin anew."""
        self._weights, self._schedulers, self._rates, self.due = {}, [], [], False

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors; of a sharded model, rank 0 gets the weights whole."""
        kept = {"schedulers": copy.deepcopy(self._schedulers), "rates": self._rates}
        return {"weights": gathered(self._weights), "due": self.due, **kept}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave away."""
        self._weights, self.due = dict(state["weights"]), state["due"]
        self._schedulers, self._rates = state["schedulers"], state["rates"]


def _scheduled(group: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a param group that schedulers change; some cycle the momentum too."""
    return {"lr": float(group["lr"])} | {key: group[key] for key in ("momentum", "betas") if key in group}
