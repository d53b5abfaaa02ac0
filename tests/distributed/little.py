"""A little network, data and callbacks that keep records, for the scripts of this folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from lightning_mask.data.loading import train_loader


def examples(n: int = 64) -> TensorDataset:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.sum(1) > 0).long())


def collate(items: list[Any]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in items]), "y": torch.stack([y for _, y in items])}


class Data(pl.LightningDataModule):
    """64 shuffled examples, 16 a batch over all ranks; the project's own loader, or a plain one."""

    def __init__(self, plain: bool = False, total: int = 16, n: int = 64) -> None:
        super().__init__()
        self.plain, self.total, self.n = plain, total, n

    def train_dataloader(self) -> Any:
        world = self.trainer.world_size
        if not self.plain:
            return train_loader(
                examples(self.n), collate=collate, batch_size=self.total // world, seed=7, trainer=self.trainer
            )
        data: Dataset[Any] = examples(self.n)
        sampler = DistributedSampler(data, world, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.total // world, sampler=sampler, collate_fn=collate)

    def val_dataloader(self) -> Any:
        return DataLoader(examples(8), batch_size=8, collate_fn=collate)


class Block(nn.Module):
    def __init__(self, norm: str, dropout: float) -> None:
        super().__init__()
        self.lin = nn.Linear(12, 12)
        self.norm: nn.Module = nn.BatchNorm1d(12) if norm == "batch" else nn.LayerNorm(12)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.lin(x))))


class Little(pl.LightningModule):
    """stem -> two blocks -> head.

    Args:
        norm: ``"layer"`` or ``"batch"``.
        dropout: Its probability.
        score: ``val/score`` as a function of epoch and rank.
        scheduled: Whether a OneCycleLR runs.
        make: The optimizer.
    """

    def __init__(
        self,
        norm: str = "layer",
        dropout: float = 0.0,
        score: Callable[[int, int], float] | None = None,
        scheduled: bool = False,
        make: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Linear(8, 12)
            self.blocks = nn.ModuleList([Block(norm, dropout) for _ in range(2)])
            self.head = nn.Linear(12, 2)
        self.score, self.scheduled = score, scheduled
        self.make = make or (lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch["x"]), batch["y"])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.score is not None:
            self.log("val/score", self.score(self.current_epoch, self.global_rank))

    def configure_optimizers(self) -> Any:
        optimizer = self.make([p for p in self.parameters() if p.requires_grad])
        if not self.scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(*callbacks: Any, ranks: int = 1, **arguments: Any) -> pl.Trainer:
    if "max_steps" in arguments:
        arguments.setdefault("max_epochs", -1)
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": ranks,
        "strategy": "ddp" if ranks > 1 else "auto",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**{**quiet, **arguments}, callbacks=list(callbacks))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def everything(run: pl.Trainer, module: pl.LightningModule, callbacks: list[Any]) -> dict[str, Any]:
    """All that a run leaves: weights, buffers, optimizer and scheduler state, masks, history."""
    return {
        "model": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizer": run.optimizers[0].state_dict(),
        "schedulers": [c.scheduler.state_dict() for c in run.lr_scheduler_configs],
        "masks": [c.masks.to_state() for c in callbacks],
        "history": [getattr(c, "history", None) for c in callbacks],
        "steps": run.global_step,
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Paths at which two nested structures are not equal, bit for bit."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: keys {sorted(map(str, set(a) ^ set(b)))}"]
        return [d for k in a for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} and {len(b)} items"]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    if callable(a) and callable(b):
        return []
    return [] if a == b else [f"{where}: {a!r} and {b!r}"]


def save(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(value, temporary)
    temporary.replace(path)
