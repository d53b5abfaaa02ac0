"""Step time and memory of masked training, as ratios of interleaved runs in one process.

    python scripts/benchmark.py              # a training step, by hand and by ours
    python scripts/benchmark.py holders      # the ways of holding one tensor, by density

Each run is a short ``Trainer.fit`` on the MiniLM checkpoint (22.6 M parameters, batches of 8 x 32 tokens, AdamW fused with
weight decay). Runs take turns in random order; the figure is the median over all steps but the first two of each run.
One table is printed, and the same figures are written as JSON beside the script's working folder.
"""

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_mask import FreezeMask, MaskSet
from lightning_mask.core.holders import _Bits, _FewActive, _FewHeld, _Where
from lightning_mask.data.pretrained import checkpoint

BATCH, TOKENS, DENSITY = 8, 32, 0.01


class Tokens(Dataset[tuple[Tensor, int]]):
    """Sequences of random token numbers; what they say does not matter for the time a step takes."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1000, 30000, (TOKENS,), generator=generator), index % 2


class Classifier(pl.LightningModule):
    """The MiniLM encoder with a linear head over the mean of its last hidden states, without dropout."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(input_ids=batch[0], attention_mask=torch.ones_like(batch[0])).last_hidden_state
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4, weight_decay=0.01, fused=True)


class ByHand(Callback):
    """Hand-written masking: change the gradient after backward, put held values back after the step."""

    def __init__(self, masks: MaskSet, way: str) -> None:
        self.way, self.given = way, masks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        self.parameters = [named[n] for n, m in self.given.items() if not bool(m.all())]
        self.masks = [m.contiguous() for m in self.given.values() if not bool(m.all())]
        self.start = [p.detach().clone() for p in self.parameters]
        if self.way == "float":
            self.factors = [m.float() for m in self.masks]
        elif self.way == "fill":
            self.held = [~m for m in self.masks]
        elif self.way == "bits":
            self.bits = [m.int().neg_() for m in self.masks]
        trainer.optimizers[0].register_step_post_hook(self.restore)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for i, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            assert gradient is not None
            if self.way == "bool":
                gradient.mul_(self.masks[i])
            elif self.way == "float":
                gradient.mul_(self.factors[i])
            elif self.way == "fill":
                gradient.masked_fill_(self.held[i], 0)
            else:
                gradient.view(torch.int32).bitwise_and_(self.bits[i])

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        for parameter, mask, start in zip(self.parameters, self.masks, self.start, strict=True):
            torch.where(mask, parameter, start, out=parameter.data)


class LastLayerByHand(Callback):
    """Hand-written ``requires_grad=False`` for all but the last layer and the head."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            parameter.requires_grad_("layer.5." in name or name.startswith("head"))


class Clock(Callback):
    """Seconds from the start of one batch to the start of the next, and bytes that are alive when a step has run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = time.perf_counter()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        held = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_bytes = sum(g.numel() * g.element_size() for g in held)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v)]
        self.state_bytes = sum(v.numel() * v.element_size() for v in values)


def random_masks(module: nn.Module, density: float) -> MaskSet:
    """Masks of scattered entries over everything but the head."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, p in module.named_parameters():
        draw = torch.rand(p.shape, generator=generator) < density
        masks[name] = torch.ones_like(draw) if name.startswith("head") else draw
    return MaskSet(masks)


def step(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Time a training step in every way."""
    from transformers import BertModel

    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(checkpoint("minilm"), add_pooling_layer=False)
    base = Classifier(encoder)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    masks = random_masks(base, DENSITY)
    ways: dict[str, Callable[[], list[Callback]]] = {
        "unmasked": list,
        "by hand: boolean multiply + restore": lambda: [ByHand(masks, "bool")],
        "by hand: float multiply + restore": lambda: [ByHand(masks, "float")],
        "by hand: fill + restore": lambda: [ByHand(masks, "fill")],
        "by hand: bit-and + restore": lambda: [ByHand(masks, "bits")],
        "ours, dense": lambda: [FreezeMask(mask=masks, engine="dense")],
        "last layer + head by hand": lambda: [LastLayerByHand()],
        "last layer + head, ours": lambda: [FreezeMask(train=["layers:-1:", "head"])],
        "ours, everything active": lambda: [FreezeMask(train="*")],
    }
    loader = DataLoader(Tokens(), batch_size=BATCH)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    clocks: dict[str, Clock] = {}
    order = list(ways)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            clock = Clock()
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*ways[name](), clock],
            )
            trainer.fit(copy.deepcopy(base), loader)
            seconds[name] += clock.seconds[2:]
            clocks[name] = clock
    dense = statistics.median(seconds["unmasked"])
    return [
        {
            "way": name,
            "ms": statistics.median(values) * 1e3,
            "over unmasked": statistics.median(values) / dense,
            "optimizer MB": clocks[name].state_bytes / 1e6,
            "gradient MB": clocks[name].gradient_bytes / 1e6,
            "steps": len(values),
        }
        for name, values in seconds.items()
    ]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ratios that the project promises, with what was measured."""
    ms = {row["way"]: row["ms"] for row in rows}
    hand = min(ms["by hand: float multiply + restore"], ms["by hand: fill + restore"])
    return [
        {
            "ratio": "ours, dense / by hand (float or fill, the faster)",
            "goal": 1.00,
            "measured": ms["ours, dense"] / hand,
        },
        {
            "ratio": "ours, dense / by hand (boolean multiply)",
            "goal": None,
            "measured": ms["ours, dense"] / ms["by hand: boolean multiply + restore"],
        },
        {
            "ratio": "last layer + head, ours / by hand",
            "goal": 1.03,
            "measured": ms["last layer + head, ours"] / ms["last layer + head by hand"],
        },
        {
            "ratio": "everything active, ours / no callback",
            "goal": 1.01,
            "measured": ms["ours, everything active"] / ms["unmasked"],
        },
    ]


def holders(rounds: int) -> list[dict[str, Any]]:
    """Time one gradient masking and one restore of a 1536 x 1536 float32 tensor, by density and way."""
    rows = []
    for density in (0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.99):
        tensor, gradient = torch.randn(1536, 1536), torch.randn(1536, 1536)
        mask = torch.rand(1536, 1536) < density
        ways = {w.__name__.strip("_"): w(tensor, mask) for w in (_Where, _FewActive, _FewHeld, _Bits)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                begin = time.perf_counter()
                way.mask_gradient(gradient)
                way.restore(tensor)
                times[name].append(time.perf_counter() - begin)
        rows.append({"density": density, **{f"{n} ms": statistics.median(t) * 1e3 for n, t in times.items()}})
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=title)
    for key in rows[0]:
        table.add_column(key, justify="left" if isinstance(rows[0][key], str) else "right")
    for row in rows:
        table.add_row(*("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="step", choices=["step", "holders"])
    parser.add_argument("--rounds", type=int, default=12, help="how often each run takes its turn")
    parser.add_argument("--steps", type=int, default=10, help="training steps of one turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("lightning.pytorch", "lightning.fabric"):
        import logging

        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if arguments.what == "holders":
        results["holders"] = holders(arguments.rounds)
        show("Mask a gradient and restore a tensor of 2.4 M entries", results["holders"])
    else:
        rows = step(arguments.rounds, arguments.steps)
        results |= {"step": rows, "goals": goals(rows)}
        show(f"A training step at density {DENSITY:.0%} ({BATCH} x {TOKENS} tokens, {arguments.threads} threads)", rows)
        show("Goals", results["goals"])
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()
