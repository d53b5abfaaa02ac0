"""What the data modules share: a training, a validation and a test set, and their loaders."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mask.data.loading import Batch, ResumableLoader, eval_loader, train_loader


@dataclass(frozen=True)
class Part:
    """One set, as its loader takes it.

    Attributes:
        examples: Map-style dataset with a length.
        collate: Makes a batch of a list of examples.
        lengths: Length of each example, int64 [n]: those of like length come together; None: as they come.
    """

    examples: Dataset[Any]
    collate: Callable[[list[Any]], Batch]
    lengths: Tensor | None = None


class SplitData(LightningDataModule):
    """The sets "train", "validation" and "test"; training resumes in mid-epoch. A subclass gives the sets (``_part``).

    Args:
        batch_size: Training batch size of one rank.
        eval_batch_size: Batch size of one rank for validation and test.
        num_workers: Worker processes of each loader.
        seed: Seed of the order of training, of the subset, and of what is held out.
        train_size: Train on so many examples only; None: all. For the subclass to heed.
        hold_out: Share or number of the training examples to validate on instead; None: none. For the subclass to heed.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        num_workers: int,
        seed: int,
        train_size: int | None,
        hold_out: float | int | None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_size = train_size
        self.hold_out = hold_out

    def _part(self, name: str) -> Part:
        raise TypeError(f"{type(self).__name__} must define _part(name) that returns a Part.")

    def train_dataloader(self) -> ResumableLoader:
        """Return the loader for training: shuffled, and resumable in mid-epoch."""
        part = self._part("train")
        return train_loader(
            part.examples,
            collate=part.collate,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            lengths=part.lengths,
            trainer=self.trainer,
        )

    def val_dataloader(self) -> ResumableLoader:
        """Return the loader for validation: every example once over all ranks."""
        return self._eval("validation")

    def test_dataloader(self) -> ResumableLoader:
        """Return the loader for the test: every example once over all ranks."""
        return self._eval("test")

    def _eval(self, name: str) -> ResumableLoader:
        part = self._part(name)
        return eval_loader(
            part.examples,
            collate=part.collate,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            lengths=part.lengths,
            trainer=self.trainer,
        )
