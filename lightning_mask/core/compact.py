"""Compact: the active entries of a tensor as a small parameter, which takes the dense one's place in the optimizer."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mask.core.maskset import indices
from lightning_mask.core.optimizers import initial_value
from lightning_mask.core.rows import EntryGradients, RowGradients
from lightning_mask.core.sharding import is_sharded, joined, local, totals, whole, wrap

ELEMENTWISE: tuple[type[Optimizer], ...] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
)
"""Optimizers whose update of an entry depends on that entry alone, so that the others may be left out."""

BREAK_EVEN = 0.5
"""Up to this density a compact tensor takes no more time, and less memory, than a dense one (scripts/benchmark.py density)."""

LINES_FROM = 4096
"""A tensor of fewer entries is held entry by entry also where whole lines are active: there is nothing to save, and a
matrix product with a very short side is rounded in another way than its part (scripts/benchmark.py holders)."""

_LANES = 16


class Slots:
    """Where the active entries of a dense tensor stand in the compact one.

    The optimizers' CPU kernels work on vectors and round the entries left over at a tensor's end in another way. So
    that each entry is rounded as it would be in the dense tensor, the compact one is filled up to whole vectors, and the
    dense tensor's last incomplete vector, where it has active entries, is its last one too.

    Args:
        mask: Boolean, of the dense tensor's shape, True = active.
    """

    def __init__(self, mask: Tensor) -> None:
        self.shape, n = mask.shape, mask.numel()
        index = indices(mask)
        self.body = int((index < n - n % _LANES).sum())
        start = -(-self.body // _LANES) * _LANES
        self.tail = index[self.body :] - (n - n % _LANES) + start
        self.size = start + (n % _LANES if len(self.tail) else 0)
        self.compact_shape: tuple[int, ...] = (self.size,)
        self.index = index.to(torch.int32) if n < 2**31 else index

    def entries(self) -> Tensor:
        """Return the sorted flat indices of the active entries."""
        return self.index

    def places(self) -> Tensor:
        """Return where in the compact tensor each active entry stands, int64."""
        return torch.cat([torch.arange(self.body, device=self.tail.device), self.tail])

    def gather(self, dense: Tensor, fill: float = 0.0) -> Tensor:
        """Return the (size,) tensor of the active entries of ``dense``; ``fill`` stands where there is none."""
        compact = torch.empty((self.size,), dtype=dense.dtype, device=dense.device)
        compact[self.body :] = fill
        return self.gather_(dense, compact)

    def gather_(self, dense: Tensor, compact: Tensor) -> Tensor:
        """Write the active entries of ``dense`` into ``compact`` and return it; what fills it up is not touched."""
        index, flat = self.index.to(dense.device), dense.reshape(-1)
        if not len(self.tail):
            torch.index_select(flat, 0, index, out=compact[: self.body])
            return compact
        torch.index_select(flat, 0, index[: self.body], out=compact[: self.body])
        compact[self.tail.to(dense.device)] = flat.index_select(0, index[self.body :])
        return compact

    def scatter_(self, compact: Tensor, dense: Tensor) -> Tensor:
        """Write the active entries into ``dense`` (contiguous) and return it; its other entries are not touched."""
        values = compact[: self.body]
        if len(self.tail):
            values = torch.cat([values, compact[self.tail.to(compact.device)]])
        dense.view(-1).scatter_(0, self.index.to(dense.device, torch.int64), values)
        return dense

    def carry(self, old: "Slots") -> Callable[[Tensor, float], Tensor]:
        """Return what makes of a compact tensor of ``old`` one of these entries; of those that join, with a fill value."""
        stays, source = _in_both(self.index, old.index)
        return functools.partial(_carried, self.compact_shape, 0, self.places()[stays], old.places()[source])

    def scatter(self, compact: Tensor, fill: float = 0.0) -> Tensor:
        """Return a dense tensor with the active entries of ``compact``, and ``fill`` elsewhere."""
        dense = torch.full(self.shape, fill, dtype=compact.dtype, device=compact.device)
        return self.scatter_(compact, dense)


class Lines:
    """The same for a tensor of which whole rows or columns are active: the compact one is made of them.

    Args:
        shape: Shape of the dense tensor.
        dim: 0 for rows, 1 for columns.
        index: Sorted int64 indices of the active ones.
    """

    def __init__(self, shape: torch.Size, dim: int, index: Tensor) -> None:
        self.shape, self.dim, self.index = shape, dim, index
        self.compact_shape = (*shape[:dim], len(index), *shape[dim + 1 :])
        self.size = math.prod(self.compact_shape)

    def entries(self) -> Tensor:
        """Return the sorted flat indices of the active entries."""
        return Slots(self.scatter(torch.ones(self.compact_shape, dtype=torch.bool, device=self.index.device))).index

    def gather(self, dense: Tensor, fill: float = 0.0) -> Tensor:
        """Return the active lines of ``dense``."""
        return dense.index_select(self.dim, self.index.to(dense.device))

    def gather_(self, dense: Tensor, compact: Tensor) -> Tensor:
        """Write the active lines of ``dense`` into ``compact`` and return it."""
        return torch.index_select(dense, self.dim, self.index.to(dense.device), out=compact)

    def scatter_(self, compact: Tensor, dense: Tensor) -> Tensor:
        """Write the active lines into ``dense`` and return it; its other entries are not touched."""
        return dense.index_copy_(self.dim, self.index.to(dense.device), compact)

    def carry(self, old: "Lines") -> Callable[[Tensor, float], Tensor]:
        """Return what makes of the lines of ``old`` (along the same dimension) these lines, with a fill value."""
        return functools.partial(_carried, self.compact_shape, self.dim, *_in_both(self.index, old.index))

    def scatter(self, compact: Tensor, fill: float = 0.0) -> Tensor:
        """Return a dense tensor with the active lines of ``compact``, and ``fill`` elsewhere."""
        return self.scatter_(compact, torch.full(self.shape, fill, dtype=compact.dtype, device=compact.device))


def _in_both(index: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ``index`` those stand that are in ``old`` too, and where in ``old``; both are sorted, each number once."""
    at = torch.searchsorted(old, index).clamp_(max=max(len(old) - 1, 0))
    stays = (old[at] == index).nonzero().view(-1) if len(old) else at[:0]
    return stays, at[stays]


def _carried(shape: tuple[int, ...], dim: int, places: Tensor, source: Tensor, compact: Tensor, fill: float) -> Tensor:
    values = compact.index_select(dim, source.to(compact.device))
    return compact.new_full(shape, fill).index_copy_(dim, places.to(compact.device), values)


def servable(optimizer: Optimizer, parameter: Tensor) -> str | None:
    """Return None if the active entries of ``parameter`` can be handed to ``optimizer`` alone, else why they cannot."""
    if type(optimizer) not in ELEMENTWISE:
        return f"{type(optimizer).__name__} is not known to update each entry by itself"
    if not local(parameter).is_contiguous():
        return "its memory is not contiguous"
    return "it is complex" if parameter.is_complex() else None


class Compact:
    """Trains the active entries of one tensor through a parameter of their values.

    After backward their gradients are gathered and the dense gradient is freed (of whole lines of a module's weight,
    backward makes no other gradient); after the step the values are scattered back. The optimizer never sees a held
    entry, so none can move, and its state has the size of what is active. Of a sharded parameter each rank's values are
    of its own part; together they are a DTensor too, so that clipping by norm counts all of them.

    Args:
        name: The parameter's name, for errors.
        parameter: The dense parameter, contiguous.
        slots: Where its active entries stand, in this rank's part.
        optimizer: The elementwise optimizer that holds it; its group keeps its place, and its state is carried over.
        early: Gather as soon as backward has accumulated the gradient (not where it is still to be reduced over ranks).
        module: The module whose weight the parameter is, where backward can make the gradient of the active part alone.

    ``ahead`` says whether the optimizer may have changed the values since the dense parameter was last written; while
    ``paused``, gradients are left where they are.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        slots: Slots | Lines,
        optimizer: Optimizer,
        early: bool,
        module: nn.Module | None = None,
    ) -> None:
        self.name, self.parameter, self.optimizer = name, parameter, optimizer
        self.ahead = self.paused = False
        self._take(slots)
        self._put(parameter, self.values)
        if not is_compact(optimizer.state.get(parameter, {}), parameter, slots):
            _convert(optimizer, parameter, self.values, slots.gather)
        elif parameter in optimizer.state:
            state = optimizer.state.pop(parameter)
            optimizer.state[self.values] = {k: self._laid_out(v) for k, v in state.items()}
        self.gather()
        self.lines: RowGradients | None = None
        self._hook: RemovableHandle | None = None
        if module is not None:
            if isinstance(slots, Lines):
                self.lines = RowGradients(module, self.values, slots.index, slots.dim)
            else:
                self.lines = EntryGradients(module, self.values, slots.index, slots.places())
        if early:
            self._hook = parameter.register_post_accumulate_grad_hook(lambda _: self.gather())

    def _take(self, slots: Slots | Lines) -> None:
        part = slots.gather(local(self.parameter))
        self.slots, self._shape = slots, part.shape
        if is_sharded(self.parameter):
            self._shape = torch.Size([*totals([len(part)], self.parameter), *part.shape[1:]])
        self.values = nn.Parameter(wrap(part, self.parameter, self._shape))

    def change(self, slots: Slots | Lines) -> bool:
        """Train other entries from now on; those that stay keep their state and gradient, the others start afresh.

        Returns:
            False, with nothing done, if the one are whole lines and the others are not, or lines along another dimension.
        """
        old, values = self.slots, self.values
        if type(slots) is not type(old) or getattr(slots, "dim", None) != getattr(old, "dim", None):
            return False
        carry = slots.carry(old)  # type: ignore[arg-type]  # of the same kind
        if self.ahead:  # an interrupt came between the update and its end
            self.write()
        self._take(slots)
        self._put(values, self.values)
        _convert(self.optimizer, values, self.values, carry)
        if values.grad is not None:
            self.values.grad = self._laid_out(carry(local(values.grad), 0.0))
        if isinstance(self.lines, EntryGradients) and isinstance(slots, Slots):
            self.lines.change_entries(self.values, slots.index, slots.places())
        elif self.lines is not None and isinstance(slots, Lines):
            self.lines.change(self.values, slots.index, slots.dim)
        return True

    def gather(self) -> None:
        """Move the gradient of the active entries to the compact parameter, and free the dense one.

        Raises:
            ValueError: If the gradient is sparse.
        """
        dense = self.parameter.grad
        if dense is None or self.paused:
            return
        if not self.values.requires_grad:  # Lightning's toggle_optimizer leaves this optimizer's tensors out
            self.parameter.grad = None
            return
        if dense.is_sparse:
            raise ValueError(
                f"{self.name} is held in part and has a sparse gradient; make its layer with sparse=False."
            )
        gradient = self.slots.gather(local(dense))
        if self.values.grad is None:
            self.values.grad = self._laid_out(gradient)
        else:
            local(self.values.grad).add_(gradient)
        self.parameter.grad = None

    def read(self) -> None:
        """Take the values from the dense parameter, which others may have written to."""
        self.slots.gather_(local(self.parameter), local(self.values))
        self.ahead = True

    def write(self) -> None:
        """Put the values into the dense parameter; no other entry is touched."""
        self.slots.scatter_(local(self.values), local(self.parameter))
        self.ahead = False

    def remove(self) -> None:
        """Give the dense parameter its place back, with the state and gradient of the active entries, zero elsewhere."""
        if self.ahead:  # an interrupt came between the update and its end
            self.write()
        if self._hook is not None:
            self._hook.remove()
        if self.lines is not None:
            self.lines.remove()
        if self.values.grad is not None:
            self.parameter.grad = wrap(self.slots.scatter(local(self.values.grad)), self.parameter)
        self._put(self.values, self.parameter)
        _convert(self.optimizer, self.values, self.parameter, self.slots.scatter)

    def whole_state(self, mask: Tensor) -> dict[str, Any]:
        """Return the optimizer's state of all ranks' active entries, as a run on one process has it; a collective.

        Args:
            mask: The mask of the tensor, laid out as the parameter.
        """
        if not is_sharded(self.parameter):
            return dict(self.optimizer.state.get(self.values, {}))
        assert isinstance(self.slots, Slots)
        slots, places = Slots(whole(mask)), self.slots.places()
        state: dict[str, Any] = {}
        for key, value in self.optimizer.state.get(self.values, {}).items():
            state[key] = value
            if isinstance(value, Tensor) and value.shape == self._shape:
                entries = joined(local(value)[places], self.parameter)
                filled = entries.new_full((slots.size,), initial_value(self.optimizer, self.values, key))
                state[key] = filled.index_copy_(0, slots.places(), entries)
        return state

    def _laid_out(self, value: Any) -> Any:
        """A tensor of this rank's values, as its part of that of all ranks; anything else as it is."""
        mine = isinstance(value, Tensor) and value.shape == self.slots.compact_shape and not is_sharded(value)
        return wrap(value, self.parameter, self._shape) if mine else value

    def _put(self, old: Tensor, new: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]


def is_compact(state: dict[str, Any], parameter: Tensor, slots: Slots | Lines) -> bool:
    """Whether an optimizer's state is of the active entries alone (a dense tensor is never of a compact one's size).

    Of a sharded one the sizes of all ranks together say it: a rank's part of a vector may be as large either way.
    """
    if is_sharded(parameter):
        return any(isinstance(v, Tensor) and is_sharded(v) and v.shape != parameter.shape for v in state.values())
    dense = tuple(parameter.shape)
    return any(isinstance(v, Tensor) and v.shape == slots.compact_shape != dense for v in state.values())


def widen_state(optimizer: Optimizer, parameter: Tensor, slots: Slots | Lines) -> None:
    """Give a dense parameter dense state where a checkpoint of a compact run brought that of the active entries."""
    state = optimizer.state.get(parameter, {})
    if not is_compact(state, parameter, slots):
        return
    for key, value in state.items():
        if isinstance(value, Tensor) and local(value).shape == slots.compact_shape:
            state[key] = wrap(slots.scatter(local(value), initial_value(optimizer, parameter, key)), parameter)


def _convert(optimizer: Optimizer, old: Tensor, new: Tensor, change: Callable[[Tensor, float], Tensor]) -> None:
    """Move the state of ``old`` to ``new``; tensors of the shape of ``old`` are changed, everything else is kept."""
    if old not in optimizer.state:
        return
    state: dict[str, Any] = optimizer.state.pop(old)
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = wrap(change(local(value), initial_value(optimizer, new, key)), new, new.shape)
    optimizer.state[new] = state
