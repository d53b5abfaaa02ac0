import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mask.core.ranking import top_k

INF = float("inf")
VALUES = [0.0, -0.0, 1.0, -1.0, INF, -INF, 1e-45, -1e-45, 1.0000001, 3.4e38, -3.4e38, 2.5, 1.5, 1.4999999]


def by_stable_sort(scores: list[Tensor], k: int) -> list[Tensor]:
    """The definition: sort everything in float32, the earlier of two equals first, keep k."""
    every = torch.cat([s.detach().float().reshape(-1) for s in scores]) if scores else torch.zeros(0)
    order = torch.argsort(every, descending=True, stable=True)
    mask = torch.zeros(len(every), dtype=torch.bool)
    mask[order[:k]] = True
    parts = mask.split([s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def check(scores: list[Tensor], k: int) -> None:
    masks = top_k(scores, k)
    assert len(masks) == len(scores)
    for mask, expected, score in zip(masks, by_stable_sort(scores, k), scores, strict=True):
        assert mask.dtype == torch.bool
        assert mask.shape == score.shape
        assert torch.equal(mask, expected), (scores, k)
    assert sum(int(m.sum()) for m in masks) == k


@given(st.data())
@settings(max_examples=300, deadline=None, derandomize=True)
def test_equal_to_a_stable_sort(data: st.DataObject):
    number = st.one_of(st.sampled_from(VALUES), st.floats(width=32, allow_nan=False))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32]))
    scores = []
    for shape in data.draw(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=4)):
        n = int(torch.Size(shape).numel())
        values = torch.tensor(data.draw(st.lists(number, min_size=n, max_size=n)), dtype=torch.float64)
        values = values.nan_to_num(posinf=9, neginf=-9).clamp(-9e8, 9e8) if dtype == torch.int32 else values
        scores.append(values.to(dtype).view(shape))
    total = sum(s.numel() for s in scores)
    check(scores, data.draw(st.integers(0, total)))


@pytest.mark.parametrize("k", [0, 1, 2, 7, 8, 9, 13, 14])
def test_ties_and_signed_zeros(k: int):
    check([torch.tensor(VALUES)], k)
    check([torch.zeros(7), -torch.zeros(7)], k)
    check([torch.ones(2, 3), torch.ones(()), torch.ones(0, 5), torch.ones(7)], k)


@pytest.mark.parametrize("seed", range(4))
def test_more_than_one_chunk_with_many_ties(seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(-3, 3, (n,), generator=generator).float() for n in (70_000, 3, 140_000, 65_536)]
    total = sum(s.numel() for s in scores)
    for k in (1, 65_536, 65_537, total // 3, total - 1, total):
        check(scores, k)
    fine = [torch.randn(n, generator=generator) for n in (70_000, 66_000)]
    fine = [torch.cat([s, s[:500]]) for s in fine]
    for k in (1, 999, 70_001, 100_000):
        check(fine, k)


def test_any_layout_and_scores_that_carry_a_graph():
    base = torch.randn(6, 8, requires_grad=True)
    check([base.t(), base[::2, 1::3], base[:, :1].expand(6, 3), base.view(2, 3, 8).permute(2, 0, 1)], 31)
    conv = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    check([conv], 10)


def test_scores_are_left_as_they_are():
    scores = [torch.tensor([-0.0, 1.0, -2.0])]
    top_k(scores, 2)
    assert str(scores[0].tolist()) == "[-0.0, 1.0, -2.0]"


@pytest.mark.parametrize("k", [-1, 4])
def test_a_k_out_of_range_is_refused(k: int):
    with pytest.raises(ValueError, match="between 0 and 3"):
        top_k([torch.zeros(3)], k)


class Allocations(TorchDispatchMode):
    """The largest storage in bytes that any operation returned, by address."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, list | tuple) else [result]:
            if isinstance(item, Tensor):
                at, size = item.untyped_storage().data_ptr(), item.untyped_storage().nbytes()
                self.sizes[at] = max(size, self.sizes.get(at, 0))  # freed memory is used again
        return result


def test_memory_beside_scores_and_masks_does_not_grow_with_the_entries():
    largest = []
    for n in (2_000_000, 8_000_000):
        scores = [torch.randn(n), torch.randn(n // 4)]
        own = {s.untyped_storage().data_ptr() for s in scores}
        with Allocations() as seen:
            masks = top_k(scores, n // 3)
        masks_at = {m.untyped_storage().data_ptr() for m in masks}
        largest.append(max(size for at, size in seen.sizes.items() if at not in own | masks_at))
    assert max(largest) <= 1 << 20, "bytes of the largest tensor that is neither a score nor a mask"
    assert largest[0] == largest[1]
