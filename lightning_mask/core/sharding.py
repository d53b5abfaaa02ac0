"""Sharded tensors (FSDP2): what a rank holds of a tensor, and the few collectives that masks of such tensors need.

``fully_shard`` makes each parameter a DTensor whose rows are dealt out to the ranks in order. A mask of such a parameter
is a boolean DTensor of the same layout, so no rank holds more of it than of the parameter. Every function here takes plain
tensors too and leaves them alone. Reductions of a DTensor to a Python number give one rank's part without a word, so sums
go through :func:`totals`.
"""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a part of ``tensor``."""
    return isinstance(tensor, DTensor)


def deals_out(model: nn.Module) -> bool:
    """Whether ``fully_shard`` deals parameters of ``model`` out, also where gathered ones stand in their place just now."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(is_sharded(p) for p in model.parameters())


def offloaded(tensor: Tensor) -> bool:
    """Whether the parts of a sharded tensor lie on the CPU and its ranks are on other devices (``CPUOffloadPolicy``)."""
    return isinstance(tensor, DTensor) and tensor.device.type != tensor.device_mesh.device_type


def check_layout(name: str, tensor: Tensor) -> None:
    """Refuse a DTensor that is dealt out in another way than by rows, over one dimension of the device mesh.

    Raises:
        ValueError: Naming the tensor and its placements.
    """
    if not isinstance(tensor, DTensor):
        return
    sharded = [p for p in tensor.placements if not isinstance(p, Replicate)]
    if len(sharded) != 1 or type(sharded[0]) is not Shard or sharded[0].dim != 0:
        raise ValueError(
            f"{name} has placements {tensor.placements}; masks know parameters that fully_shard deals out by rows "
            "(Shard(0)), without tensor parallelism."
        )


def reshard(model: nn.Module) -> None:
    """Give a model its sharded parameters back where a forward without backward left the gathered ones in their place."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of ``tensor``, detached; a plain tensor is its own part. Memory is shared."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            return tensor.to_local()
    return tensor.detach()


def wrap(part: Tensor, like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return the DTensor of which ``part`` is this rank's, laid out as ``like``; ``part`` itself where that is plain.

    Args:
        part: Plain tensor.
        like: A parameter.
        shape: Global shape, if it is another than that of ``like``; the parts may be of any lengths then.
    """
    if not isinstance(like, DTensor):
        return part
    size = torch.Size(like.shape if shape is None else shape)
    strides = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=size, stride=strides)


def rows(like: Tensor) -> tuple[int, int]:
    """Return the first row of a tensor that this rank holds, and the number of them."""
    n = like.shape[0] if like.dim() else 1
    if not isinstance(like, DTensor):
        return 0, n
    rank, size = ranks(like)
    each = -(-n // size)
    first = min(rank * each, n)
    return first, min(each, n - first)


def first_entry(like: Tensor) -> int:
    """Return the flat index, in the whole tensor, of the first entry of this rank's part."""
    return rows(like)[0] * math.prod(like.shape[1:])


def part(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of ``tensor``, which is whole or laid out as the parameter ``like``; on its device."""
    if isinstance(tensor, DTensor):
        return local(tensor)
    if isinstance(like, DTensor):
        first, count = rows(like)
        tensor = tensor.narrow(0, first, count)
    return tensor.to(like.device)


def shard(tensor: Tensor, like: Tensor) -> Tensor:
    """Lay a whole tensor, equal on all ranks, out as ``like``; nothing is sent. A plain ``like`` leaves it as it is."""
    if isinstance(tensor, DTensor) and isinstance(like, DTensor) and tensor.placements != like.placements:
        return tensor.redistribute(placements=like.placements)
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor):
        return tensor
    return wrap(part(tensor, like).clone() if any(tensor.stride()) else part(tensor, like), like)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of ``tensor`` on every rank; a collective where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, for a checkpoint, tensors as they are; sharded ones whole and on the CPU, on rank 0 of all alone.

    A collective where some are sharded; one of them at a time is whole on the other ranks.
    """
    found = {}
    for name, tensor in tensors.items():
        value = whole(tensor)
        if value is tensor or dist.get_rank() == 0:
            found[name] = value if value is tensor else value.cpu()
    return found


def totals(numbers: Sequence[int], like: Tensor) -> list[int]:
    """Return the sum over the ranks that share ``like`` of each number; a collective where it is sharded."""
    if not isinstance(like, DTensor):
        return list(numbers)
    return summed(torch.tensor(list(numbers), dtype=torch.int64), like).tolist()


def summed(counts: Tensor, like: Tensor) -> Tensor:
    """Return the sum over the ranks that share ``like`` of a plain tensor, on its device; a collective if sharded."""
    if not isinstance(like, DTensor):
        return counts
    mesh, dim = _dealt(like)
    on_device = counts.to(like.device, copy=True)
    dist.all_reduce(on_device, group=mesh.get_group(dim))
    return on_device.to(counts.device)


def ranks(like: Tensor) -> tuple[int, int]:
    """Return this rank's place among those that share ``like``, and their number; (0, 1) if it is not sharded."""
    if not isinstance(like, DTensor):
        return 0, 1
    mesh, dim = _dealt(like)
    return mesh.get_local_rank(dim), mesh.size(dim)


def count(mask: Tensor) -> int:
    """Number of True entries; a collective where the mask is sharded."""
    return totals([int(local(mask).count_nonzero())], mask)[0]


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two masks are equal, on all ranks; one may be whole where the other is sharded."""
    if is_sharded(b) and not is_sharded(a):
        a, b = b, a
    return totals([int(not torch.equal(local(a), part(b, a)))], a)[0] == 0


def joined(part: Tensor, like: Tensor) -> Tensor:
    """Return the one-dimensional parts of all ranks that share ``like``, one after the other; a collective.

    The parts may be of any lengths.
    """
    if not isinstance(like, DTensor):
        return part
    rank, size = ranks(like)
    sizes = totals([len(part) if each == rank else 0 for each in range(size)], like)
    mesh, dim = _dealt(like)
    padded = part.new_zeros(max(sizes))
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=mesh.get_group(dim))
    return torch.cat([each[:size] for each, size in zip(parts, sizes, strict=True)])


def _dealt(tensor: DTensor) -> tuple[DeviceMesh, int]:
    """The device mesh, and its dimension over which the rows are dealt out."""
    return tensor.device_mesh, next(i for i, p in enumerate(tensor.placements) if isinstance(p, Shard))
