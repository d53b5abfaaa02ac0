"""Normalisation modules that are held: their running statistics do not move, whatever ``model.train()`` says."""

from collections.abc import Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle


class HeldNorms:
    """Runs the forward of held normalisation modules in eval mode; a module's own mode stays what the user last set.

    Args:
        model: The module to look for them in.
        keep: Whether to keep copies of their statistics too, for :meth:`restore`.
    """

    def __init__(self, model: nn.Module, keep: bool) -> None:
        self.model, self.keep = model, keep
        self._hooks: dict[nn.Module, list[RemovableHandle]] = {}
        self._statistics: dict[nn.Module, dict[str, Tensor]] = {}

    def hold(self, held: Set[str]) -> None:
        """Hold the modules all of whose parameters are in ``held``, and let the others go.

        A module without parameters goes by those of the nearest module around it.
        """
        wanted = self._found(held)
        for module in [m for m in self._hooks if m not in wanted]:
            for handle in self._hooks.pop(module):
                handle.remove()
        for module in wanted - set(self._hooks):
            enter = module.register_forward_pre_hook(_enter_eval)
            leave = module.register_forward_hook(_leave_eval, always_call=True)
            self._hooks[module] = [enter, leave]
        self._statistics = {m: self._statistics.get(m) or _copies_of_buffers(m) for m in wanted if self.keep}

    @torch.no_grad()
    def restore(self) -> None:
        """Write the statistics back that were kept."""
        for module, kept in self._statistics.items():
            for name, value in kept.items():
                module.get_buffer(name).copy_(value)

    def _found(self, held: Set[str]) -> set[nn.Module]:
        names: dict[int, str] = {id(p): n for n, p in self.model.named_parameters()}
        modules = dict(self.model.named_modules())
        found: set[nn.Module] = set()
        for path, module in modules.items() if held else ():
            if not (isinstance(module, _NormBase) and module.track_running_stats):
                continue
            around = path
            while around and next(modules[around].parameters(), None) is None:
                around = around.rpartition(".")[0]
            inside = {names[id(p)] for p in modules[around].parameters()}
            if inside and inside <= held:
                found.add(module)
        return found


def _copies_of_buffers(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.detach().clone() for name, buffer in module.named_buffers()}


def _enter_eval(module: nn.Module, _: Any) -> None:
    if module.training:
        module.training = False
        module.__dict__[_TRAINS] = True


def _leave_eval(module: nn.Module, *_: Any) -> None:
    if module.__dict__.pop(_TRAINS, False):
        module.training = True


_TRAINS = "_lightning_mask_trains"
