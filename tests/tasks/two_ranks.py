"""Tests and trains an image classifier on 2 processes, for test_classifier.py; writes what rank 0 measured."""

import json
import sys
from functools import partial
from pathlib import Path

import lightning as L
import torch

from lightning_mask.data import ImageData
from lightning_mask.data.images import ImageSplits
from lightning_mask.tasks import ImageClassifier


def source() -> ImageSplits:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (101, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (101,), generator=generator)
    return ImageSplits(images, labels, list(range(48)), list(range(48, 64)), list(range(64, 101)), list("abc"))


def measure(root: Path, devices: int) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ImageClassifier(3, optimizer=partial(torch.optim.SGD, lr=0.05), width=4, depth=1)
    model.net.eval()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
    )
    data = ImageData(source, batch_size=8 // devices, eval_batch_size=6)
    (before,) = trainer.test(model, data, verbose=False)
    confusion = model.confusion_matrix
    model.net.apply(lambda module: setattr(module, "momentum", 0.0) if hasattr(module, "momentum") else None)
    trainer.fit(model, data)
    figures = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {"test": before, "confusion": confusion, "fit": figures}


def main() -> None:
    root, devices = Path(sys.argv[1]), int(sys.argv[2])
    measured = measure(root, devices)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        (root / "measured.json").write_text(json.dumps(measured))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
