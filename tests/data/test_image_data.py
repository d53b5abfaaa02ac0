"""Images from a package and from a folder."""

from functools import partial
from pathlib import Path

import pytest
import torch

from lightning_mask.data import ImageData, folder, mnist5k, shifted


def test_digits() -> None:
    digits = ImageData(batch_size=64)
    assert digits.num_classes == 10
    batches = list(digits.train_dataloader())
    pixels = torch.cat([batch["pixel_values"] for batch in batches])
    labels = torch.cat([batch["labels"] for batch in batches])
    assert pixels.shape == (4000, 1, 28, 28)
    assert pixels.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [400] * 10
    assert abs(float(pixels.mean())) < 1e-4
    assert abs(float(pixels.std()) - 1) < 1e-3
    for loader in (digits.val_dataloader(), digits.test_dataloader()):
        assert torch.cat([batch["labels"] for batch in loader]).bincount().tolist() == [50] * 10


def test_no_digit_is_trained_on_and_tested_on() -> None:
    splits = mnist5k()
    assert splits.test == mnist5k().test
    assert not set(splits.train) & set(splits.test)
    assert sorted(splits.train + splits.validation + splits.test) == list(range(5000))


def test_shifts_of_input_and_output() -> None:
    plain = mnist5k()
    noisy = shifted(noise=0.2)
    added = noisy.images.float() - plain.images.float()
    inside = (plain.images > 100) & (plain.images < 156)  # where hardly any noise is cut off
    assert abs(float(added[inside].std()) / (0.2 * 255) - 1) < 0.02
    assert torch.equal(noisy.images, shifted(noise=0.2).images)
    assert not torch.equal(noisy.images, shifted(noise=0.2, seed=1).images)
    assert torch.equal(noisy.labels, plain.labels)
    assert noisy.test == plain.test

    rotated = shifted(partial(mnist5k, test=0.2), rotate_labels=3)
    assert torch.equal(rotated.images, plain.images)
    assert torch.equal(rotated.labels, (plain.labels + 3) % 10)
    assert len(rotated.test) == 1000
    with pytest.raises(ValueError, match="noise must be at least 0"):
        shifted(noise=-0.1)
    with pytest.raises(ValueError, match="rotate_labels must be a whole number"):
        shifted(rotate_labels=1.0)  # type: ignore[arg-type]


def make_folder(root: Path) -> str:
    from PIL import Image

    for shade, name in ((40, "dark"), (200, "light")):
        (root / name).mkdir()
        for i in range(20):
            Image.new("RGB", (10 + i, 14), (shade, i, 0)).save(root / name / f"{i}.png")
    return str(root)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder(tmp_path: Path, channels: int) -> None:
    images = ImageData(partial(folder, make_folder(tmp_path), size=8, channels=channels), batch_size=5)
    batch = next(iter(images.train_dataloader()))
    assert batch["pixel_values"].shape == (5, channels, 8, 8)
    assert images.class_names == ["dark", "light"]
    splits = folder(str(tmp_path), size=8, channels=channels)
    dark = splits.images[splits.labels == 0, 0].float().mean()
    assert dark < splits.images[splits.labels == 1, 0].float().mean()


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder '.*nowhere'"):
        folder(str(tmp_path / "nowhere"))
    (tmp_path / "one").mkdir()
    with pytest.raises(ValueError, match="has 1 subfolders"):
        folder(str(tmp_path))
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match=r"folder '.*one' has no images"):
        folder(str(tmp_path))
    for name in ("sets", "sets/train", "sets/Test"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"subfolders of '.*sets' are Test, train, .*such as '.*sets/train'"):
        folder(str(tmp_path / "sets"))
    (tmp_path / "sets/train").rmdir()
    (tmp_path / "sets/Test").rmdir()
    (tmp_path / "sets").rmdir()
    for name in ("one", "two"):
        (tmp_path / name / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        folder(str(tmp_path))


def test_pixels_as_a_checkpoint_wants_them() -> None:
    digits = ImageData(partial(mnist5k), batch_size=4, mean=127 / 255, deviation=128 / 255)
    raw = mnist5k().images[:4]
    pixels = digits.val_dataloader().collate_fn([(image, torch.tensor(0)) for image in raw])["pixel_values"]
    assert torch.allclose(pixels, (raw.float() - 127) / 128, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"mean and deviation \(above 0\) go together, got mean=0\.5 and deviation=None"
    ):
        ImageData(mean=0.5)


def test_a_part_of_the_training_set_in_place_of_the_validation_set() -> None:
    splits = mnist5k()
    whole, held = ImageData(lambda: splits, train_size=1000), ImageData(lambda: splits, train_size=1000, hold_out=200)
    assert held.sizes == {"train": 800, "validation": 200, "test": 500}
    sets = {name: {image.numpy().tobytes() for image in part.tensors[0]} for name, part in held._load().items()}
    assert not sets["train"] & sets["validation"]
    assert sets["train"] | sets["validation"] == {
        image.numpy().tobytes() for image in whole._load()["train"].tensors[0]
    }
    assert held._load()["validation"].tensors[1].bincount().tolist() == [20] * 10
    assert ImageData(lambda: splits, hold_out=0.5).sizes["validation"] == 2000
    for amount in (0, 0.0, 1.0, 4000, 1):  # one of ten classes is less than half an example of each
        with pytest.raises(ValueError, match=r"hold_out=.* of 4000 training examples leaves nothing"):
            ImageData(lambda: splits, hold_out=amount).train_dataloader()
