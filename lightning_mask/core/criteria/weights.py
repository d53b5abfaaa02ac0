"""Criteria from the weights alone."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.criteria.registry import Scores, criterion


def named_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed that differs from tensor to tensor and from seed to seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def random_scores(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Scores:
    """Return uniform float32 scores on the CPU, independent for each name and seed."""
    scores = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(named_seed(seed, name))
        scores[name] = torch.rand(shape, generator=generator)
    return scores


@criterion("random")
def random(params: Mapping[str, Tensor], context: Context) -> Scores:
    """Uniform noise, independent for each tensor and seed.

    Source: Xu and Zhang, "Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning" (2024).
    """
    return random_scores({name: tuple(p.shape) for name, p in params.items()}, context.seed)


@criterion("magnitude")
def magnitude(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w|``. Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015)."""
    return {name: p.detach().abs() for name, p in params.items()}
