"""Properties of the engines over random shapes, dtypes and densities: one equals the other, and both leave no trace."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_mask.core import MaskEngine
from lightning_mask.core.compact import Slots

SHAPES = st.one_of(
    st.tuples(st.integers(0, 70)),
    st.tuples(st.integers(0, 12), st.integers(1, 12)),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    st.just(()),
)
DENSITY = st.one_of(st.sampled_from(["none", "one", "all"]), st.floats(0.01, 0.99))
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def draw_mask(shape: tuple[int, ...], density: Any, seed: int) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if density == "all":
        return ~mask
    if density == "one" and mask.numel():
        mask.view(-1)[seed % mask.numel()] = True
    if isinstance(density, float):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    return mask


@given(shape=SHAPES, density=DENSITY, seed=st.integers(0, 99), dtype=DTYPES)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_gather_and_scatter_are_inverse(shape: tuple[int, ...], density: Any, seed: int, dtype: torch.dtype) -> None:
    mask = draw_mask(shape, density, seed)
    dense = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    slots = Slots(mask)
    compact = slots.gather(dense, 7.0)
    assert compact.shape == (slots.size,)
    assert slots.size <= int(mask.sum()) + 16 + 15
    assert torch.equal(slots.scatter(compact), torch.where(mask, dense, torch.zeros_like(dense)))
    other = torch.full(shape, 3.0, dtype=dtype)
    assert torch.equal(slots.scatter_(compact, other), torch.where(mask, dense, torch.full_like(dense, 3.0)))
    assert torch.equal(slots.index.long(), mask.reshape(-1).nonzero().view(-1))


class Bag(nn.Module):
    """Parameters of any shape; two names for one of them, and one whose memory is not contiguous."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))
        self.also = self.p0
        self.turned = nn.Parameter(torch.randn(5, 4, generator=generator).to(dtype).t())

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        total = torch.zeros((), dtype=torch.float64)
        for p in self.parameters():
            weight = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            total = total + (p.double() * weight).sum() + (p.double() ** 2).sum()
        return total


@given(
    shapes=st.lists(SHAPES, min_size=1, max_size=3),
    densities=st.lists(DENSITY, min_size=8, max_size=8),
    seed=st.integers(0, 99),
    dtype=DTYPES,
    way=st.sampled_from([{"foreach": False}, {"foreach": True}, {"fused": True}]),
)
@settings(max_examples=120, deadline=None, derandomize=True)
def test_compact_equals_dense_and_both_equal_the_reference(
    shapes: list[tuple[int, ...]], densities: list[Any], seed: int, dtype: torch.dtype, way: dict[str, bool]
) -> None:
    plain = Bag(shapes, dtype, seed)
    names = [n for n, _ in plain.named_parameters()]
    masks = {n: draw_mask(tuple(plain.get_parameter(n).shape), d, seed) for n, d in zip(names, densities, strict=False)}
    bags = {engine: copy.deepcopy(plain) for engine in ("compact", "dense")}
    for engine, bag in bags.items():
        optimizer = torch.optim.AdamW(bag.parameters(), lr=0.01, weight_decay=0.1, **way)  # type: ignore[arg-type]
        held = MaskEngine(bag, optimizer, masks, engine=engine, early=engine == "compact")
        for step in range(4):
            optimizer.zero_grad()
            loss = bag.loss(step)
            if loss.requires_grad:
                loss.backward()
            held.after_backward()
            optimizer.step()
        held.release()
        assert not any(p._post_accumulate_grad_hooks for p in bag.parameters())
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in bag.parameters()}
        assert all(p.requires_grad for p in bag.parameters())
        assert bag.also is bag.p0
    start = copy.deepcopy(plain)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1, **way)  # type: ignore[arg-type]
    for step in range(4):
        optimizer.zero_grad()
        plain.loss(step).backward()
        for n, p in plain.named_parameters():
            p.grad = torch.where(masks[n], p.grad, torch.zeros_like(p.grad)) if masks[n].any() else None  # type: ignore[arg-type]
            if p.grad is not None and not p.is_contiguous():
                p.grad = torch.empty_like(p).copy_(p.grad)
        optimizer.step()
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p.copy_(torch.where(masks[n], p, start.get_parameter(n)))
    for n, p in plain.named_parameters():
        assert torch.equal(bags["dense"].get_parameter(n), p), n
        assert torch.equal(bags["compact"].get_parameter(n), p), n


@pytest.mark.parametrize("n", [5, 16, 33, 100])
def test_what_fills_up_a_compact_tensor_is_the_fill(n: int) -> None:
    """It counts where gradients are clipped by their norm."""
    mask = torch.arange(n) % 3 == 0
    mask[-1] = True
    slots, dense = Slots(mask), torch.arange(n, dtype=torch.float32)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # memory that nothing was written to is nan
    try:
        compact = slots.gather(dense, 3.5)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(compact[slots.places()], dense[mask])
    filling = torch.ones(slots.size, dtype=torch.bool)
    filling[slots.places()] = False
    assert torch.equal(compact[filling], torch.full((int(filling.sum()),), 3.5))
