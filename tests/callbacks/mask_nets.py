"""Small networks, data, and a Trainer for the tests of the callbacks."""

from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

Make = Callable[[pl.LightningModule], Any]


class Block(nn.Module):
    """Linear, normalisation, dropout, with a residual."""

    def __init__(self, width: int, norm: str, dropout: float) -> None:
        super().__init__()
        self.lin = nn.Linear(width, width)
        self.norm: nn.Module = nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.norm(self.lin(x))))


class Net(pl.LightningModule):
    """stem -> two blocks -> head, on 8 numbers; logs ``train/loss`` and ``val/loss``.

    Args:
        norm: ``"batch"`` or ``"layer"``.
        dropout: Its probability.
        make: What ``configure_optimizers`` returns; default AdamW with weight decay over everything.
        value: What ``val/<name>`` metrics to log: a function of the epoch, logged as ``val/score``.
    """

    def __init__(
        self,
        norm: str = "layer",
        dropout: float = 0.0,
        make: Make | None = None,
        value: Callable[[int], float] | None = None,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = nn.Linear(8, 12)
            self.blocks = nn.ModuleList([Block(12, norm, dropout) for _ in range(2)])
            self.head = nn.Linear(12, 2)
        self.make, self.value = make, value

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch))
        if self.value is not None:
            self.log("val/score", self.value(self.current_epoch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        if self.make is not None:
            return self.make(self)
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def data(n: int = 64) -> TensorDataset:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, (x.sum(1) > 0).long())


def loader(n: int = 64, size: int = 8) -> DataLoader[Any]:
    """8 batches of 8, in order."""
    return DataLoader(data(n), batch_size=size)


class Stream(IterableDataset[Any]):
    """The same examples without a length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(data())


QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def trainer(*callbacks: Any, **arguments: Any) -> pl.Trainer:
    """A quiet Trainer on the CPU, two epochs unless told otherwise."""
    if not {"max_steps", "max_epochs", "fast_dev_run"} & set(arguments):
        arguments["max_epochs"] = 2
    if "max_steps" in arguments:
        arguments.setdefault("max_epochs", -1)
    quiet = {name: QUIET[name] for name in ("accelerator", "devices")} if arguments.get("barebones") else QUIET
    return pl.Trainer(**{**quiet, **arguments}, callbacks=list(callbacks))


def fit(
    module: pl.LightningModule, *callbacks: Any, val: bool = False, ckpt: str | None = None, **arguments: Any
) -> Any:
    """Train ``module``; return the Trainer."""
    run = trainer(*callbacks, **arguments)
    run.fit(module, loader(), loader(16) if val else None, ckpt_path=ckpt)
    return run


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Tensor]:
    """Where the bits differ."""
    return {name: before[name].view(torch.int32) != after[name].view(torch.int32) for name in before}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Names of the tensors of which any bit differs."""
    return {name for name, mask in moved(before, after).items() if bool(mask.any())}


class Watch(pl.Callback):
    """Keep the weights before every optimizer step and after the last, and which tensors require a gradient."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.trainable: list[set[str]] = []
        self.rates: list[list[float]] = []
        self.groups: list[list[int]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.weights.append(weights(pl_module))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.rates.append([g["lr"] for o in trainer.optimizers for g in o.param_groups])
        self.groups.append([id(g) for o in trainer.optimizers for g in o.param_groups])

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= len(self.weights):
            self.weights.append(weights(pl_module))
            self.trainable.append({n for n, p in pl_module.named_parameters() if p.requires_grad})

    def moved_at(self, step: int) -> set[str]:
        """Names of the tensors that optimizer step ``step`` (from 0) moved."""
        return changed(self.weights[step], self.weights[step + 1])


class Stop(Watch):
    """End the run after that many steps."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.step


def names(module: nn.Module, *prefixes: str) -> set[str]:
    return {name for name, _ in module.named_parameters() if name.startswith(prefixes)}
