"""Trains a tiny model on 43 numbered examples, with a checkpoint at every step, then resumes from each of them.

Run as a script by test_resume.py, on one process or on two under DDP. Writes a JSON list of findings; empty means all is well.
"""

import copy
import json
import sys
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import Dataset

from lightning_mask.data.loading import Batch, eval_loader, train_loader


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def collate(numbers: list[int]) -> Batch:
    return {"numbers": torch.tensor(numbers)}


class NumberData(L.LightningDataModule):
    def __init__(self, workers: int = 0, batch_size: int = 4, by_length: bool = False) -> None:
        super().__init__()
        self.workers, self.batch_size, self.by_length = workers, batch_size, by_length

    def train_dataloader(self) -> object:
        return train_loader(
            Numbers(43),
            collate=collate,
            batch_size=self.batch_size,
            seed=3,
            num_workers=self.workers,
            lengths=torch.arange(43) % 7 if self.by_length else None,
            trainer=self.trainer,
        )

    def val_dataloader(self) -> object:
        return eval_loader(Numbers(7), collate=collate, batch_size=2, trainer=self.trainer)


class Recorder(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Linear(2, 1)
        self.seen: list[tuple[int, int, int, tuple[int, ...]]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        numbers = batch["numbers"]
        self.seen.append((self.current_epoch, batch_idx, self.global_step, tuple(numbers.tolist())))
        x = torch.stack([numbers / 43, torch.ones_like(numbers)], dim=1).float()
        return (self.net(x).squeeze(1) - (numbers % 5)).pow(2).mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class Peek(Callback):
    """Reads a few batches from a copy of the running loader in mid-epoch, as a criterion that needs data does."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        clone = copy.copy(trainer.train_dataloader)
        clone._iterator = None
        for _, _batch in zip(range(3), iter(clone), strict=False):
            pass


class SaveInMidStep(Callback):
    """Has a checkpoint written while a batch is being worked on, as a pre-emption signal does."""

    def on_before_backward(self, trainer: L.Trainer, *args: object) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx in (0, 5, 10, 14):
            trainer.save_checkpoint(
                Path(trainer.default_root_dir) / f"mid-{trainer.fit_loop.epoch_loop.total_batch_idx}.ckpt"
            )


def fit(root: Path, devices: int, ckpt_path: str | None, case: dict, save: bool) -> Recorder:
    model = Recorder()
    callbacks: list[Callback] = []
    if save:
        callbacks = [
            ModelCheckpoint(root, filename="{epoch}-{step}", save_top_k=-1, every_n_train_steps=1),
            ModelCheckpoint(root, filename="end-{epoch}-{step}", save_top_k=-1, save_on_train_epoch_end=True),
        ]
    if case.get("mid_step"):
        callbacks = [SaveInMidStep()]
    if case.get("peek"):
        callbacks.append(Peek())
    trainer = L.Trainer(
        max_epochs=case.get("epochs", 3),
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        num_sanity_val_steps=case.get("sanity", 0),
        **case.get("trainer", {}),
    )
    data = NumberData(case.get("workers", 0), case.get("batch_size", 4), case.get("by_length", False))
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return model


def check(root: Path, devices: int, case: dict) -> list[str]:
    whole = fit(root, devices, None, case, save=True)
    findings = []
    per_epoch = len({entry[1] for entry in whole.seen})
    epochs = case.get("epochs", 3)
    if len(whole.seen) != epochs * per_epoch:
        findings.append(f"{case}: {len(whole.seen)} batches in {epochs} epochs of {per_epoch}")
    checkpoints = sorted(root.glob("*.ckpt"))
    for path in checkpoints:
        saved = torch.load(path, weights_only=True)
        resumed = fit(root, devices, str(path), {**case, "peek": False, "mid_step": False}, save=False)
        progress = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        expected = whole.seen[progress:]
        if resumed.seen != expected:
            findings.append(
                f"{case} {path.name}: saw {resumed.seen[:2]} ({len(resumed.seen)}), not {expected[:2]} ({len(expected)})"
            )
        for name, tensor in whole.state_dict().items():
            if not torch.equal(tensor, resumed.state_dict()[name]):
                findings.append(f"{case} {path.name}: {name} differs")
    if not checkpoints:
        findings.append("no checkpoint")
    return findings


def main() -> None:
    root, devices, cases = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    findings = []
    for number, case in enumerate(cases):
        if "resume" in case:  # from a checkpoint of a run with another number of processes
            seen = fit(root, devices, case["resume"], {}, save=False).seen
            findings += [] if seen and seen[-1][0] == 2 else [f"{case}: ended after {seen[-1:]}"]
            numbers = [number for entry in seen if entry[0] == 2 for number in entry[3]]
            whole = -(-43 // devices) if case["whole_last_epoch"] else len(numbers)
            if len(numbers) != whole or len(set(numbers)) < len(numbers) - 1:
                findings.append(f"{case}: the last epoch saw {sorted(numbers)}")
        else:
            findings += check(root / str(number), devices, case)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    root.mkdir(parents=True, exist_ok=True)
    (root / f"findings{rank}.json").write_text(json.dumps(findings))
    if torch.distributed.is_initialized():  # or a thread of gloo's may still run when the interpreter ends
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
