"""Steps, figures and optimizers that all classifiers share."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn.functional import cross_entropy
from two_ranks import measure

from lightning_mask.data import ImageData
from lightning_mask.tasks import ImageClassifier, ResNet, linear_warmup_decay

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def trainer(root: Path, **options: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        **{"logger": False, "enable_checkpointing": False, **options},  # type: ignore[arg-type]
    )


def test_digits_are_learnt_and_measured_right(tmp_path: Path) -> None:
    torch.manual_seed(0)
    digits = ImageData(batch_size=64)
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    model = ImageClassifier(10, optimizer, linear_warmup_decay, width=8, depth=1)
    run = trainer(tmp_path, max_epochs=2)
    run.fit(model, digits)
    assert {"train/loss", "train/loss_epoch", "val/loss", "val/accuracy", "val/macro_f1"} <= set(run.callback_metrics)
    (logged,) = run.test(model, digits, verbose=False)
    assert set(logged) == {"test/loss", "test/accuracy", "test/macro_f1"}
    assert logged["test/accuracy"] > 0.85

    model.eval()
    with torch.no_grad():
        batches = list(digits.test_dataloader())
        logits = torch.cat([model(batch) for batch in batches])
        labels = torch.cat([batch["labels"] for batch in batches])
    predicted = logits.argmax(dim=1)
    confusion = torch.zeros(10, 10, dtype=torch.int64)
    for true, said in zip(labels, predicted, strict=True):
        confusion[true, said] += 1
    assert model.confusion_matrix == confusion.tolist()
    assert logged["test/accuracy"] == pytest.approx(float((predicted == labels).float().mean()), abs=1e-6)
    assert logged["test/loss"] == pytest.approx(float(cross_entropy(logits, labels)), rel=1e-4)
    right = confusion.diag().float()
    f1 = 2 * right / (confusion.sum(dim=0) + confusion.sum(dim=1))
    assert logged["test/macro_f1"] == pytest.approx(float(f1.mean()), abs=1e-5)


def test_two_ranks_measure_what_one_measures(tmp_path: Path) -> None:
    alone = measure(tmp_path, 1)
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, str(script), str(tmp_path), "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pair = json.loads((tmp_path / "measured.json").read_text())
    assert pair["confusion"] == alone["confusion"]
    assert sum(map(sum, alone["confusion"])) == 37
    assert pair["test"] == pytest.approx(alone["test"], rel=1e-5)
    assert set(pair["fit"]) == set(alone["fit"])
    assert all(0 <= value < 10 for value in pair["fit"].values())


def test_the_optimizer_gets_every_parameter(tmp_path: Path) -> None:
    model = ImageClassifier(3, SGD, width=4, depth=1)
    model.net.stem.requires_grad_(False)
    optimizer = model.configure_optimizers()
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    assert model.state_dict().keys() == {f"net.{name}" for name in model.net.state_dict()}


def test_mask_loss_is_the_training_loss_and_logs_nothing() -> None:
    model = ImageClassifier(3, SGD, width=4, depth=1).eval()
    batch = {"pixel_values": torch.randn(4, 1, 8, 8), "labels": torch.tensor([0, 1, 2, 0])}
    loss = model.mask_loss(batch)
    assert torch.equal(loss, cross_entropy(model.net(batch["pixel_values"]), batch["labels"]))
    loss.backward()
    assert model.net.classifier.weight.grad is not None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    digits = ImageData(train_size=50)
    with pytest.raises(ValueError, match="ImageClassifier has no optimizer: give it optimizer="):
        trainer(tmp_path, max_epochs=1).fit(ImageClassifier(10), digits)
    with pytest.raises(ValueError, match="A scheduler needs a run with an end"):
        trainer(tmp_path, max_epochs=-1).fit(ImageClassifier(10, SGD, linear_warmup_decay), digits)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_network_takes_grey_and_colour(channels: int) -> None:
    net = ResNet(7, channels=channels, width=4, depth=2)
    assert net(torch.randn(2, channels, 28, 28)).shape == (2, 7)
    assert len([module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]) == 15
    with pytest.raises(ValueError, match="width=0"):
        ResNet(7, width=0)
