"""The few collectives that masks need; each does nothing in a single process."""

import socket
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks, 1 outside a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's place among the ranks, 0 outside a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Return the mean of ``tensor`` over all ranks, equal on all of them."""
    if world_size() == 1:
        return tensor
    tensor = tensor.contiguous().clone()
    dist.all_reduce(tensor)
    return tensor / world_size()


def gather(value: Any) -> list[Any]:
    """Return every rank's ``value``, in the order of ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_equal(value: Any, what: str) -> None:
    """Stop every rank unless all of them hold an equal ``value``.

    Raises:
        RuntimeError: On all ranks, naming the first rank that differs from rank 0 and both values.
    """
    values = gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            raise RuntimeError(f"{what} differs between ranks: rank 0 has {values[0]!r}, rank {rank} has {other!r}.")


def require_equal_masks(digests: Mapping[str, str], what: str) -> None:
    """Stop every rank unless all of them hold the same masks; ``digests`` is ``MaskSet.digests()``.

    Raises:
        RuntimeError: On all ranks, naming the first rank that differs, its tensors and the hosts.
    """
    ranks = gather((socket.gethostname(), dict(digests)))
    values = [value for _, value in ranks]
    for rank, other in enumerate(values):
        odd = sorted(n for n in {*other, *values[0]} if other.get(n) != values[0].get(n))
        if odd:
            raise RuntimeError(
                f"{what}: rank {rank} holds another mask than rank 0 in {', '.join(odd[:5])}"
                f"{f' and {len(odd) - 5} more tensors' if len(odd) > 5 else ''} (on {ranks[rank][0]} and {ranks[0][0]}). "
                "A criterion must give every rank the same scores: draw random numbers from context.seed, and take data only "
                "from context.batches. A file of masks and a checkpoint must be the same on all machines."
            )


def synchronised(flag: bool, device: torch.device) -> bool:
    """Return True on all ranks when ``flag`` is True on any of them."""
    if world_size() == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())
