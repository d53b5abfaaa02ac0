"""Wire: a communication hook for DistributedDataParallel that puts only the active entries on the wire.

DDP hands its hook one bucket of gradients after the other while backward goes on. Of each bucket the active entries are
gathered into one tensor, reduced, and written back to where they were, with one index for the whole bucket.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    bf16_compress_wrapper,
    fp16_compress_hook,
    fp16_compress_wrapper,
)

Hook = Callable[..., torch.futures.Future[Tensor]]

_ENTRYWISE = (allreduce_hook, fp16_compress_hook, bf16_compress_hook)
_WRAPPERS = tuple(wrapper(allreduce_hook).__code__ for wrapper in (fp16_compress_wrapper, bf16_compress_wrapper))
_INT32_LIMIT = 2**31
_COMPRESSED_BYTES = 2


class Wire:
    """The state of :func:`reduce_active`: which entries are active, and how many bytes were sent.

    Args:
        process_group: The group that gradients are averaged over; None is the default group. Of no use with ``inner``.
        inner: A hook that the user chose for compression, and its state; it is given the active entries alone.

    Attributes:
        bytes: Bytes handed to all-reduce, elements times their size on the wire, since the Wire was made or this was
            last set to 0.

    Raises:
        ValueError: If ``inner`` is not a hook that :func:`compatible` knows.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> wire = Wire()
        >>> wire.set({model.weight: torch.tensor([0, 2])})
        >>> # ddp = DistributedDataParallel(model); ddp.register_comm_hook(wire, reduce_active)
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None, inner: tuple[Hook, Any] | None = None) -> None:
        self._hook: Hook = inner[0] if inner else allreduce_hook
        self._state: Any = inner[1] if inner else process_group
        if not compatible(self._hook):
            raise ValueError(
                f"The communication hook {getattr(self._hook, '__name__', self._hook)!r} cannot be given the active entries "
                "alone; use fp16_compress_hook, bf16_compress_hook or a wrapper of them, or leave it to reduce everything."
            )
        self.bytes = 0
        self._active: dict[Tensor, Tensor] = {}
        self._plans: dict[int, _Plan] = {}

    def set(self, active: Mapping[Tensor, Tensor]) -> None:
        """Reduce these entries from the next backward on; call it on all ranks alike, between two backwards.

        Args:
            active: The parameter itself to the flat indices of its active entries: 1-D, int32 or int64, sorted, without
                repeats, counted in row-major order. A parameter that is absent is reduced whole.

        Raises:
            ValueError: If indices are not such a tensor, or point outside their parameter.
        """
        for parameter, index in active.items():
            if index.dim() != 1 or index.dtype not in (torch.int32, torch.int64):
                raise ValueError(
                    f"The active entries of a tensor of shape {tuple(parameter.shape)} came as {index.dtype} of shape "
                    f"{tuple(index.shape)}; give flat indices, 1-D, int32 or int64."
                )
            if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < parameter.numel():
                raise ValueError(
                    f"Active entries {int(index[0])} to {int(index[-1])} do not fit a tensor of shape "
                    f"{tuple(parameter.shape)}; give sorted indices from 0 to {parameter.numel() - 1}."
                )
        self._active = {p: index for p, index in active.items() if len(index) < p.numel()}
        self._plans.clear()

    def _index(self, bucket: dist.GradBucket) -> Tensor | None:
        """Return where in the bucket the entries to reduce are, None if it is all of them."""
        parameters = bucket.parameters()
        plan = self._plans.get(bucket.index())
        if plan is None or not plan.serves(parameters):
            if plan is not None:  # DDP has made its buckets anew, so the other plans are stale too
                self._plans.clear()
            partly = any(p in self._active for p in parameters)
            plan = _Plan(parameters, self._places(parameters, bucket.buffer()) if partly else None)
            self._plans[bucket.index()] = plan
        return plan.index

    def _places(self, parameters: list[Tensor], buffer: Tensor) -> Tensor:
        dtype = torch.int32 if buffer.numel() < _INT32_LIMIT else torch.int64
        places, offset = [], 0
        for parameter in parameters:
            active = self._active.get(parameter)
            if active is None:
                inside = torch.arange(parameter.numel(), device=buffer.device)
            else:
                inside = _in_memory_order(parameter, active.to(buffer.device, torch.int64))
            places.append((inside + offset).to(dtype))
            offset += parameter.numel()
        return torch.cat(places)

    def _send(self, bucket: "dist.GradBucket | _Gathered") -> torch.futures.Future[Tensor]:
        tensor = bucket.buffer()
        parts = (tensor._values(), tensor._indices()) if tensor.is_sparse else (tensor,)
        for part in parts:
            self.bytes += part.numel() * (part.element_size() if self._hook is allreduce_hook else _COMPRESSED_BYTES)
        return self._hook(self._state, bucket)


def reduce_active(wire: Wire, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """Average the active entries of a bucket over all ranks; register it with ``ddp.register_comm_hook(wire, reduce_active)``.

    The average is that of torch's ``allreduce_hook`` (divide, then add), or of the hook that the Wire was given; from three
    ranks on, a backend adds in an order that depends on an entry's place in what is sent (its last bit may differ). A held
    entry keeps what this rank's own backward left there, as under ``no_sync``: it is neither divided nor sent, differs
    from rank to rank and need not be finite. That costs nothing, and MaskEngine reads or clears it before a step;
    who looks at ``p.grad`` earlier (a hook on the tensor, a callback before ours) sees it.

    Every rank must have been given the same active entries; a difference makes the all-reduce fail.
    """
    buffer, index = bucket.buffer(), wire._index(bucket)
    if index is None:
        return wire._send(bucket)
    if not len(index):
        return _done(buffer)
    future = wire._send(_Gathered(buffer.index_select(0, index)))
    return future.then(lambda done: buffer.scatter_(0, index.long(), done.value().to(buffer.dtype)))


def compatible(hook: Hook) -> bool:
    """Return whether ``hook`` treats every entry by itself, so that it can be given the active ones alone.

    So do torch's ``allreduce_hook``, ``fp16_compress_hook``, ``bf16_compress_hook`` and ``fp16_compress_wrapper`` or
    ``bf16_compress_wrapper`` around any of them. PowerSGD (a matrix at a time), post-localSGD (which does not reduce
    over all ranks) and hooks that are not known do not.
    """
    if any(hook is known for known in _ENTRYWISE):
        return True
    if getattr(hook, "__code__", None) not in _WRAPPERS:
        return False
    return compatible(inspect.getclosurevars(hook).nonlocals["hook"])


@dataclass
class _Plan:
    """The parameters in a bucket, and where in it the entries to reduce are."""

    parameters: list[Tensor]
    index: Tensor | None

    def serves(self, parameters: list[Tensor]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            a is b for a, b in zip(parameters, self.parameters, strict=True)
        )


class _Gathered:
    """What entrywise hooks use of a ``GradBucket``, which Python cannot make."""

    def __init__(self, buffer: Tensor) -> None:
        self._buffer = buffer

    def buffer(self) -> Tensor:
        return self._buffer

    def set_buffer(self, buffer: Tensor) -> None:
        self._buffer = buffer


def _in_memory_order(parameter: Tensor, index: Tensor) -> Tensor:
    """Return where in its span of the bucket each entry is: DDP lays a gradient out like its parameter, if that is dense."""
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    if parameter.is_contiguous() or not dense:
        return index
    places, rest = torch.zeros_like(index), index
    for size, stride in zip(reversed(parameter.shape), reversed(parameter.stride()), strict=True):
        places += rest % size * stride
        rest = rest // size
    return places.sort().values


def _done(buffer: Tensor) -> torch.futures.Future[Tensor]:
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
    future.set_result(buffer)
    return future
