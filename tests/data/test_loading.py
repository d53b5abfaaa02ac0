"""Loaders: what each rank reads, and what they leave alone."""

import copy
from itertools import pairwise

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_mask.data.loading import ResumableLoader, ShardSampler, _even_batch_size, eval_loader, train_loader


def numbers(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(size))


def collate(examples: list) -> dict:
    return {"numbers": torch.stack([example[0] for example in examples])}


def loader(size: int = 20, batch_size: int = 4, seed: int = 0) -> ResumableLoader:
    return train_loader(numbers(size), collate=collate, batch_size=batch_size, seed=seed)


def read(batches: object) -> list[list[int]]:
    return [batch["numbers"].tolist() for batch in batches]  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [1, 7, 43, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_ranks_share_an_epoch_evenly(size: int, world: int, batch_size: int) -> None:
    shards = [
        ShardSampler(range(size), batch_size, world=world, rank=rank, shuffle=True, seed=1) for rank in range(world)
    ]
    read = [list(shard) for shard in shards]
    assert {len(part) for part in read} == {len(shards[0])}
    assert {number for part in read for number in part} == set(range(size))
    assert sum(map(len, read)) < size + world


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_every_example_is_evaluated_once_in_equally_many_batches(world: int, batch_size: int) -> None:
    for size in range(world, 60):
        even = _even_batch_size(size, batch_size, world)
        shards = [
            ShardSampler(range(size), even, world=world, rank=rank, shuffle=False, seed=0) for rank in range(world)
        ]
        assert sorted(number for shard in shards for number in shard) == list(range(size))
        assert len({-(-len(shard) // even) for shard in shards}) == 1, (size, even)
        assert all(len(list(shard)) == len(shard) for shard in shards)
        assert even <= max(batch_size, 8)


@pytest.mark.parametrize("lengths", [None, torch.arange(64) % 9])
def test_two_ranks_learn_from_the_batches_of_one(lengths: torch.Tensor | None) -> None:
    alone = list(ShardSampler(range(64), 8, world=1, rank=0, shuffle=True, seed=5, lengths=lengths))
    pair = [
        list(ShardSampler(range(64), 4, world=2, rank=rank, shuffle=True, seed=5, lengths=lengths)) for rank in (0, 1)
    ]
    for step in range(8):
        together = [number for part in pair for number in part[4 * step : 4 * step + 4]]
        assert sorted(together) == sorted(alone[8 * step : 8 * step + 8])


def test_examples_of_like_length_come_together() -> None:
    lengths = torch.randint(1, 60, (1003,), generator=torch.Generator().manual_seed(0))
    sampler = ShardSampler(range(1003), 8, world=1, rank=0, shuffle=True, seed=0, lengths=lengths)

    def padded(order: list[int]) -> float:
        batches = lengths[torch.tensor(order)].split(8)
        return sum(int(batch.max()) * len(batch) for batch in batches) / int(lengths.sum())

    first = list(sampler)
    assert sorted(first) == list(range(1003))
    assert padded(first) < 1.1
    assert padded(torch.randperm(1003).tolist()) > 1.5
    sampler.set_epoch(1)
    second = list(sampler)
    assert {frozenset(second[i : i + 8]) for i in range(0, 1000, 8)} != {
        frozenset(first[i : i + 8]) for i in range(0, 1000, 8)
    }
    longest = [int(lengths[first[i : i + 8]].max()) for i in range(0, 1000, 8)]
    assert sum(a > b for a, b in pairwise(longest)) > 30  # no run from short to long
    plain = ShardSampler(range(1003), 8, world=1, rank=0, shuffle=False, seed=0, lengths=lengths)
    assert padded(list(plain)) < 1.01


def test_order_depends_on_seed_and_epoch_alone() -> None:
    first = loader()
    assert read(first) == read(loader())
    assert read(first) == read(first)
    assert read(first) != read(loader(seed=1))
    before = read(first)
    first.sampler.set_epoch(1)
    assert read(first) != before


def test_the_epoch_set_after_the_iterator_was_made_counts() -> None:
    early = loader()
    iterator = iter(early)
    early.sampler.set_epoch(3)
    late = loader()
    late.sampler.set_epoch(3)
    assert read(iterator) == read(late)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(loader())
    assert torch.equal(before, torch.get_rng_state())


def test_a_copy_in_mid_epoch_disturbs_nothing() -> None:
    whole = read(loader())
    running = loader()
    iterator = iter(running)
    seen = [next(iterator)["numbers"].tolist() for _ in range(2)]
    state = running.state_dict()
    clone = copy.copy(running)
    clone._iterator = None
    assert read(clone) == whole
    assert running.state_dict() == state
    assert seen + read(iterator) == whole
    resumed = loader()
    resumed.load_state_dict(state)
    assert read(resumed) == whole[2:]
    assert read(resumed) == whole


def test_another_batch_size_goes_on_behind_the_last_example() -> None:
    first = loader(size=24, batch_size=4)
    iterator = iter(first)
    seen = [number for _ in range(2) for number in next(iterator)["numbers"].tolist()]
    larger = loader(size=24, batch_size=8)
    larger.load_state_dict(first.state_dict())
    rest = [number for batch in read(larger) for number in batch]
    assert sorted(seen + rest) == list(range(24))


def test_state_of_a_finished_epoch_starts_the_next() -> None:
    first = loader()
    read(first)
    second = loader()
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert len(read(second)) == 5


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        loader(batch_size=0)
    with pytest.raises(ValueError, match="0 examples, which is too few for 1 rank"):
        eval_loader(numbers(0), collate=collate, batch_size=2)


def test_it_is_a_loader() -> None:
    assert isinstance(loader(), DataLoader)
    assert len(loader(size=21)) == 6
