"""A small network trained twice: through Trainer.fit with our callbacks, and by a reference loop in plain torch."""

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

from lightning_mask.callbacks.base import MaskCallback

ENGINES = ("compact", "dense")
Batch = tuple[Tensor, Tensor]
MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Net(nn.Module):
    """One tensor for each way of holding: conv.weight (odd layout), few, most, some; and some held or active whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.few, self.norm, self.most = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16)
        self.some, self.head = nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).flatten(1)
        x = self.norm(torch.tanh(self.few(x)))
        return self.head(torch.tanh(self.some(torch.tanh(self.most(x)))))


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def make_masks() -> dict[str, Tensor]:
    """True = active. Of few.weight 1 of 256 entries, of most.weight all but 5, about half of conv and some."""
    generator = torch.Generator().manual_seed(1)
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in make_net().named_parameters()}
    for name in ("conv.weight", "some.weight", "some.bias"):
        masks[name] = torch.rand(masks[name].shape, generator=generator) < 0.5
    masks["few.weight"].view(-1)[[200]] = True
    masks["most.weight"].fill_(True).view(-1)[[0, 5, 77, 130, 255]] = False
    masks["head.weight"].fill_(True)
    masks["head.bias"].fill_(True)
    return masks


def make_batches(count: int = 7) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randn(5, 3, 4, 4, generator=generator), torch.randn(5, 2, generator=generator)) for _ in range(count)
    ]


def adamw(parameters: Iterable[Any]) -> Optimizer:
    return AdamW(parameters, lr=0.01, weight_decay=0.1)


def bits(tensor: Tensor) -> Tensor:
    """The tensor as integers, so that -0.0, 0.0 and every nan differ."""
    return tensor.detach().contiguous().view(INTEGER[tensor.element_size()])


def same(a: nn.Module, b: nn.Module) -> list[str]:
    """Names of parameters and buffers of which a single bit differs; both must have the same."""
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    return [n for n, t in first.items() if t.numel() and not torch.equal(bits(t), bits(second[n]))]


def ulps(a: nn.Module, b: nn.Module) -> int:
    """By how many steps of their floating point format the parameters differ at most."""
    worst = 0
    for (_, one), (_, other) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        first, second = (_ordered(bits(t)) for t in (one, other))
        worst = max(worst, int((first - second).abs().max()))
    return worst


def _ordered(bits: Tensor) -> Tensor:
    """Map the bits of floats to integers in the floats' order."""
    wide, lowest = bits.long(), torch.iinfo(bits.dtype).min
    return torch.where(wide < 0, lowest - wide, wide)


def moved(net: nn.Module, start: nn.Module, masks: dict[str, Tensor]) -> list[str]:
    """Names of parameters of which a held entry differs in a single bit from the start."""
    before = dict(start.named_parameters())
    return [
        name
        for name, p in net.named_parameters()
        if name in masks and bool(((bits(p) != bits(before[name])) & ~masks[name]).any())
    ]


def trained(net: nn.Module, start: nn.Module, masks: dict[str, Tensor]) -> int:
    """Number of active entries that differ from the start."""
    before = dict(start.named_parameters())
    return sum(int(((bits(p) != bits(before[n])) & masks[n]).sum()) for n, p in net.named_parameters() if n in masks)


def inject(net: nn.Module, entries: dict[str, Tensor], value: float, at: Callable[[], bool] = lambda: True) -> None:
    """Make the gradient ``value`` at the given entries, whatever the loss says."""
    for name, parameter in net.named_parameters():
        if name in entries and parameter.requires_grad:

            def spoil(gradient: Tensor, where: Tensor = entries[name]) -> Tensor:
                return torch.where(where, torch.full_like(gradient, value), gradient) if at() else gradient

            parameter.register_hook(spoil)


@dataclass(frozen=True)
class Setting:
    """How to train."""

    precision: str = "32-true"
    clip: float | None = None
    clip_by: str = "norm"
    accumulate: int = 1
    engine: str = "auto"

    def plugins(self) -> list[Any]:
        """A real fp16 gradient scaler, which Lightning makes for CUDA only."""
        if self.precision != "16-mixed":
            return []
        scaler = torch.amp.GradScaler("cpu", init_scale=1024, growth_interval=3)
        return [MixedPrecision("16-mixed", device="cpu", scaler=scaler)]


class Task(L.LightningModule):
    """Automatic optimization of a mean squared error."""

    def __init__(self, net: nn.Module, make_optimizer: MakeOptimizer = adamw) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, make_optimizer
        self.losses: list[float] = []

    def training_step(self, batch: Batch) -> Tensor:
        loss = (self.net(batch[0]) - batch[1]).float().square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def fit(
    module: L.LightningModule,
    callbacks: list[L.Callback],
    batches: list[Any],
    setting: Setting = Setting(),
    **more: Any,
) -> L.Trainer:
    """Train over the batches once, in their order."""
    how: dict[str, Any] = (
        {"plugins": setting.plugins()} if setting.precision == "16-mixed" else {"precision": setting.precision}
    )
    for callback in callbacks:
        if isinstance(callback, MaskCallback) and setting.engine != "auto":
            callback.engine = setting.engine
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks,
        gradient_clip_val=setting.clip,
        gradient_clip_algorithm=setting.clip_by if setting.clip is not None else None,
        accumulate_grad_batches=setting.accumulate,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **how, **more},
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return trainer


def prefixed(masks: dict[str, Tensor], prefix: str = "net.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": mask for name, mask in masks.items()}


def reference(
    net: nn.Module,
    make_optimizer: MakeOptimizer,
    batches: list[Batch],
    masks: dict[str, Tensor] | None,
    setting: Setting = Setting(),
    free: int = 0,
) -> tuple[nn.Module, Any]:
    """Snapshot, mask the gradient, step, restore; the first ``free`` steps without a mask. Trains ``net`` in place.

    Returns:
        The network as it was when the mask came into force, and the gradient scaler or None.
    """
    dtype = torch.bfloat16 if setting.precision == "bf16-true" else torch.float32
    net.to(dtype)
    named = list(net.named_parameters())
    optimizer = make_optimizer([p for _, p in named if p.requires_grad])
    scaler = setting.plugins()[0].scaler if setting.precision == "16-mixed" else None
    start, steps = copy.deepcopy(net), len(batches) // setting.accumulate
    for step in range(steps):
        window = batches[step * setting.accumulate : (step + 1) * setting.accumulate]
        holds = masks is not None and step >= free
        if step == free:
            start = copy.deepcopy(net)

        def closure(window: list[Batch] = window, holds: bool = holds) -> Tensor:
            optimizer.zero_grad()
            for x, y in window:
                with _cast(setting):
                    loss = (net(x.to(dtype)) - y.to(dtype)).float().square().mean() / setting.accumulate
                (scaler.scale(loss) if scaler else loss).backward()
            for name, p in named if holds else []:
                mask = masks[name]  # type: ignore[index]
                if p.grad is not None and mask.any():  # in place: fused kernels need the parameter's layout
                    p.grad.copy_(torch.where(mask, p.grad, torch.zeros_like(p.grad)))
                else:
                    p.grad = None
            if scaler:
                scaler.unscale_(optimizer)
            own = [p for group in optimizer.param_groups for p in group["params"]]
            if setting.clip is not None and setting.clip_by == "norm":
                nn.utils.clip_grad_norm_(own, setting.clip)
            elif setting.clip is not None:
                nn.utils.clip_grad_value_(own, setting.clip)
            return loss

        if scaler:
            closure()
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step(closure)  # type: ignore[arg-type]
        with torch.no_grad():
            for name, p in named if holds else []:
                p.copy_(torch.where(masks[name], p, start.get_parameter(name)))  # type: ignore[index]
    return start, scaler


def _cast(setting: Setting) -> AbstractContextManager[Any]:
    if setting.precision == "bf16-mixed":
        return torch.autocast("cpu", torch.bfloat16)
    if setting.precision == "16-mixed":
        return torch.autocast("cpu", torch.float16)
    return nullcontext()
