"""The global random states of all ranks, as plain values and tensors."""

import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lightning_mask.core.distributed import gather, world_size


def collect() -> list[dict[str, Any]]:
    """Return one entry for each rank; a collective over all ranks."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(internal), gauss_next],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return gather(state)


def restore(states: list[dict[str, Any]]) -> None:
    """Put back this rank's states; does nothing when they were collected on another number of ranks."""
    if len(states) != world_size():
        return
    state = states[dist.get_rank() if world_size() > 1 else 0]
    torch.set_rng_state(state["torch"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
