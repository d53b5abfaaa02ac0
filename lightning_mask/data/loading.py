"""Loaders that resume: the one place where the data modules make a loader.

A pass over the data is a pure function of (seed, epoch, number of ranks, batch size), and the place reached in it is one
integer. So the state of a loader is four numbers, it does not touch any global random state, and a second iteration over a
copy of the loader cannot disturb the first.
"""

from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

Batch = dict[str, Tensor]

_WINDOW = 32  # slices of the random order that are sorted by length together


class ShardSampler(DistributedSampler[int]):
    """The indices one rank reads in one epoch, so dealt that every rank has the same number of batches.

    Batch ``k`` over all ranks is the ``k``-th slice of ``world * batch_size`` indices; rank ``r`` takes every ``world``-th one
    from ``r`` on. A run on two ranks with batches of 16 thus learns from the same examples, step by step, as a run on one
    rank with batches of 32. When training (``shuffle``), the last slice is filled up to a multiple of ``world`` with
    indices from the front; else every index is read exactly once, over all ranks together, so that metrics are exact.

    It is a :class:`~torch.utils.data.distributed.DistributedSampler`, so Lightning leaves it alone and calls ``set_epoch``.

    Args:
        dataset: What is sampled; only its length counts.
        batch_size: Batch size of one rank.
        world: Number of ranks.
        rank: This rank, from 0.
        shuffle: Another order in each epoch, from ``seed`` and the epoch; else always the same.
        seed: Seed of the order.
        lengths: Length of each example, [n]: examples of like length then come together, so that little is padded. When
            training, this sorts within every 32 slices of the random order and then mixes the slices; else, all.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        *,
        world: int,
        rank: int,
        shuffle: bool,
        seed: int,
        lengths: Tensor | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = len(dataset)
        self.batch_size = batch_size
        self.lengths = lengths
        self.start = 0  # batches that the next pass leaves out

    def __iter__(self) -> Iterator[int]:
        order = self._shuffled() if self.shuffle else self._in_order()
        return iter(order[self.rank :: self.num_replicas][self.start * self.batch_size :].tolist())

    def _in_order(self) -> Tensor:
        if self.lengths is None:
            return torch.arange(self.size)
        return torch.sort(self.lengths, descending=True, stable=True).indices

    def _shuffled(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator)
        together = self.batch_size * self.num_replicas
        whole = self.size // together
        if self.lengths is not None and whole:
            slices = []
            for window in order[: whole * together].split(_WINDOW * together):
                window = window[torch.sort(self.lengths[window], stable=True).indices]
                slices += list(window.split(together))
            shuffled = torch.randperm(whole, generator=generator).tolist()
            order = torch.cat([*(slices[index] for index in shuffled), order[whole * together :]])
        missing = -self.size % self.num_replicas
        return torch.cat([order, order.repeat(missing // self.size + 1)[:missing]]) if missing else order

    def __len__(self) -> int:
        """Number of indices of this rank in a whole epoch."""
        if self.shuffle:
            return -(-self.size // self.num_replicas)
        return len(range(self.rank, self.size, self.num_replicas))


class ResumableLoader(DataLoader[Any]):
    """A :class:`~torch.utils.data.DataLoader` over a :class:`ShardSampler` that knows where it is.

    The order of an epoch is fixed when its first batch is asked for, not when the iterator is made: Lightning makes the
    iterator before it tells the sampler which epoch it is. The place reached is dropped when the epoch has moved on since.
    Workers may read ahead: only batches that were handed out count.

    Args:
        dataset: Map-style dataset.
        sampler: A :class:`ShardSampler`. (Lightning's ``overfit_batches`` puts a plain sampler here; the loader then works,
            without resuming.)
        done: Returns how many batches of the running epoch are done with; default: the batches handed out. A trainer's
            count is the better one: it leaves out a batch that was being worked on when a signal had a checkpoint written.
        **options: As for :class:`~torch.utils.data.DataLoader`.
    """

    def __init__(
        self, dataset: Dataset[Any], *, sampler: Any, done: Callable[[], int] | None = None, **options: Any
    ) -> None:
        super().__init__(dataset, sampler=sampler, **options)
        self._done = done
        self._handed_out = 0
        self._restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self._start()
        if self.generator is not None:
            # Seeds of the workers: from the epoch, so that they are the same after a resume, and the global ones are left alone.
            self.generator.manual_seed(getattr(self.sampler, "seed", 0) * 1_000_003 + getattr(self.sampler, "epoch", 0))
        if isinstance(self.sampler, ShardSampler):
            self.sampler.start = start
        try:
            batches = super().__iter__()
            batch = next(batches, None)  # only now has the sampler surely read `start`
        finally:
            if isinstance(self.sampler, ShardSampler):
                self.sampler.start = 0
        self._handed_out = start
        while batch is not None:
            self._handed_out += 1
            yield batch
            batch = next(batches, None)

    def _start(self) -> int:
        restored, self._restored = self._restored, None
        sampler = self.sampler
        if restored is None or not isinstance(sampler, ShardSampler) or restored["epoch"] != sampler.epoch:
            return 0
        # With another number of ranks or batch size, go on behind the last example that was seen.
        examples = restored["batches"] * restored["batch_size"] * restored["world"]
        start = examples // (sampler.batch_size * sampler.num_replicas)
        return start if start < len(self) else 0

    def state_dict(self) -> dict[str, int]:
        """Return the place reached: epoch, batches done, batch size, number of ranks."""
        sampler = self.sampler
        if not isinstance(sampler, ShardSampler):
            return {}
        return {
            "epoch": sampler.epoch,
            "batches": self._handed_out if self._done is None else self._done(),
            "batch_size": sampler.batch_size,
            "world": sampler.num_replicas,
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on, at the next iteration over the same epoch, behind the place that ``state_dict`` tells."""
        self._restored = dict(state_dict) if state_dict else None


def ranks(trainer: Trainer | None) -> tuple[int, int]:
    """Return (number of ranks that share the data, this one's index); (1, 0) without a trainer."""
    sharing = None if trainer is None else trainer.distributed_sampler_kwargs
    return (sharing["num_replicas"], sharing["rank"]) if sharing else (1, 0)


def train_loader(
    dataset: Dataset[Any],
    *,
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    lengths: Tensor | None = None,
    trainer: Trainer | None = None,
) -> ResumableLoader:
    """Return a loader that shuffles by ``seed`` and the epoch, shares the data among the ranks, and resumes in mid-epoch.

    Args:
        dataset: Map-style dataset with a length.
        collate: Makes a batch of a list of examples.
        batch_size: Batch size of one rank.
        seed: Seed of the order; use the same on every rank.
        num_workers: Worker processes.
        lengths: Length of each example, [n]; see :class:`ShardSampler`.
        trainer: Gives the ranks and the number of batches that are done with; without one, there is one rank.

    Raises:
        ValueError: If the dataset is empty or ``batch_size`` is below 1.
    """
    done: Callable[[], int] | None = None
    if trainer is not None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        done = lambda: getattr(progress.current, "processed")  # noqa: E731, B009
    return _loader(dataset, collate, batch_size, True, seed, num_workers, lengths, trainer, done)


def eval_loader(
    dataset: Dataset[Any],
    *,
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    num_workers: int = 0,
    lengths: Tensor | None = None,
    trainer: Trainer | None = None,
) -> ResumableLoader:
    """Return a loader in a fixed order in which, over all ranks together, every example comes exactly once.

    All ranks have the same number of batches; ``batch_size`` is changed a little where that needs it.

    Args:
        dataset: Map-style dataset with a length.
        collate: Makes a batch of a list of examples.
        batch_size: Batch size of one rank.
        num_workers: Worker processes.
        lengths: Length of each example, [n]; see :class:`ShardSampler`.
        trainer: Gives the ranks; without one, there is one.

    Raises:
        ValueError: If the dataset has fewer examples than there are ranks, or ``batch_size`` is below 1.
    """
    return _loader(dataset, collate, batch_size, False, 0, num_workers, lengths, trainer, None)


def _loader(
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Batch],
    batch_size: int,
    shuffle: bool,
    seed: int,
    num_workers: int,
    lengths: Tensor | None,
    trainer: Trainer | None,
    done: Callable[[], int] | None,
) -> ResumableLoader:
    world, rank = ranks(trainer)
    size = len(dataset)  # type: ignore[arg-type]
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if size < (1 if shuffle else world):
        raise ValueError(
            f"A split has {size} examples, which is too few for {world} rank(s): give it more, or use fewer ranks."
        )
    if not shuffle:
        batch_size = _even_batch_size(size, batch_size, world)
    sampler = ShardSampler(
        dataset,  # type: ignore[arg-type]
        batch_size,
        world=world,
        rank=rank,
        shuffle=shuffle,
        seed=seed,
        lengths=lengths,
    )
    return ResumableLoader(
        dataset,
        sampler=sampler,
        done=done,
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )


def _even_batch_size(size: int, batch_size: int, world: int) -> int:
    """The batch size nearest to ``batch_size``, smaller ones first, that gives all ranks equally many batches.

    A rank has floor(size / world) examples or one more.
    """
    fewest, most = size // world, -(-size // world)
    for candidate in (*range(min(batch_size, most), 0, -1), *range(batch_size + 1, most)):
        if -(-fewest // candidate) == -(-most // candidate):
            return candidate
    return most
