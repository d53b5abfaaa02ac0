"""Embedding tables of which a few rows or entries train: against the dense backward, and never as large as the table."""

import copy

import pytest
import torch
from tensor_sizes import Sizes
from torch import nn

from lightning_mask.core import MaskEngine
from lightning_mask.core.compact import Slots
from lightning_mask.core.rows import EntryGradients, RowGradients


def test_four_rows_of_two_million_cost_nothing_like_the_table():
    with torch.no_grad():
        table = nn.Embedding(2_000_000, 64, _weight=torch.zeros(1).expand(2_000_000, 64), _freeze=True)
    index = torch.tensor([7, 1000, 1_999_998, 1_999_999])
    rows = RowGradients(table, nn.Parameter(torch.zeros(4, 64)), index, dim=0)
    text = torch.randint(2_000_000, (8, 32), generator=torch.Generator().manual_seed(0))
    text[:, :4] = index
    with Sizes() as sizes:
        table(text).sum().backward()
    assert sizes.largest == 8 * 32 * 64 * 4  # the output; the table would be 512 MB
    assert torch.equal(rows.values.grad, torch.full((4, 64), 8.0))
    assert rows.values.grad.untyped_storage().nbytes() <= 5 * 64 * 4


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("shape", [(50, 16), (37, 9)])
def test_scattered_entries_of_a_table_get_the_dense_gradient(shape: tuple[int, int], padding: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    table = nn.Embedding(*shape, padding_idx=padding)
    dense = copy.deepcopy(table)
    mask = torch.rand(shape, generator=generator) < 0.3
    mask[-1, -1] = True  # in the last incomplete vector of the smaller table
    slots = Slots(mask)
    table.weight.requires_grad_(False)
    values = nn.Parameter(slots.gather(table.weight.detach()))
    entries = EntryGradients(table, values, slots.index, slots.places())
    for _ in range(2):
        tokens = torch.randint(0, shape[0], (4, 30), generator=generator)
        tokens[0, :3] = torch.tensor([3, 3, shape[0] - 1])
        weight = torch.randn(4, 30, shape[1], generator=generator)
        for module in (table, dense):
            (module(tokens) * weight).sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, slots.gather(dense.weight.grad))
    assert bool(values.grad.any())
    entries.remove()
    assert not table._forward_hooks
    table(tokens[:0]).sum()  # no token at all


def test_entries_of_a_large_table_never_make_it() -> None:
    table = nn.Embedding(200_000, 64).requires_grad_(False)
    mask = torch.zeros(200_000, 64, dtype=torch.bool)
    mask.view(-1)[:: 200 * 64 + 7] = True
    slots = Slots(mask)
    values = nn.Parameter(slots.gather(table.weight))
    EntryGradients(table, values, slots.index, slots.places())
    tokens = torch.arange(0, 200_000, 50).view(4, -1)
    with Sizes() as sizes:
        table(tokens).square().sum().backward()
    assert values.grad is not None
    assert sizes.largest <= tokens.numel() * 64 * 8


def test_other_entries_of_a_table_train_when_the_mask_changes():
    """The table has entries enough to be served by its module; every entry that ever trains is of a token that is seen."""
    ends = {}
    for way in ("dense", "compact"):
        torch.manual_seed(0)
        table = nn.Embedding(600, 8)
        start = table.weight.detach().clone()
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.1)
        first, then = (torch.rand(600, 8, generator=torch.Generator().manual_seed(seed)) < 0.2 for seed in (1, 2))
        engine = MaskEngine(table, optimizer, {"weight": first}, engine=way, early=way == "compact")
        for step in range(6):
            if step == 3:
                engine.update({"weight": then})
            table(torch.arange(step, 600, 2)).square().sum().backward()
            engine.after_backward()
            optimizer.step()
            optimizer.zero_grad()
        ends[way] = table.weight.detach()
    assert ((ends["dense"] != start) & then & ~first).any()
    assert torch.equal(ends["compact"], ends["dense"])
