"""Step time and memory of masked training, as ratios of interleaved runs in one process.

    python scripts/benchmark.py              # a training step, by hand and by ours
    python scripts/benchmark.py holders      # the ways of holding one tensor, by density

Each run is a short ``Trainer.fit`` on the MiniLM checkpoint (22.6 M parameters, batches of 8 x 32 tokens, AdamW fused with
weight decay). The runs live side by side and take turns of a few steps in random order. A time is the median over all
turns, a ratio the median over all rounds of the ratio within the round.
One table is printed, and the same figures are written as JSON beside the script's working folder.
"""

import argparse
import copy
import ctypes
import functools
import json
import os
import platform
import random
import statistics
import threading
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
from lightning_mask.core.holders import Holder, _Bits, _FewActive, _FewHeld, _Where
from lightning_mask.data.pretrained import checkpoint

BATCH, TOKENS, DENSITY, THREADS = 8, 32, 0.01, 2


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


class Turns:
    """Hands the processor round: of all the threads that called ``take``, one runs at a time, in a random order per round."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.random = list(names), random.Random(0)
        self.changed = threading.Condition()
        self.queue: list[str] = []
        self.ready: set[str] = set()

    def take(self, name: str) -> None:
        """Give the turn away and wait for the next one."""
        with self.changed:
            if self.queue and self.queue[0] == name:
                self.queue.pop(0)
            self.ready.add(name)
            self._deal()
            self.changed.wait_for(lambda: bool(self.queue) and self.queue[0] == name)

    def leave(self, name: str) -> None:
        """Give the turn away for good."""
        with self.changed:
            self.names.remove(name)
            self.queue = [n for n in self.queue if n != name]
            self.ready.discard(name)
            self._deal()

    def _deal(self) -> None:
        if not self.queue and self.ready >= set(self.names):
            self.queue = sorted(self.names)
            self.random.shuffle(self.queue)
        self.changed.notify_all()


class Clock(Callback):
    """Times a run that takes turns with others, step by step, and counts the bytes that are alive when a step has run.

    A turn is a few steps; the first one of a turn warms the caches and is not counted.
    """

    def __init__(self, name: str, turns: Turns, length: int) -> None:
        self.name, self.turns, self.length = name, turns, length
        self.seconds: list[float] = []
        self.began: float | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = None
        if batch_idx % self.length == 0:
            self.turns.take(self.name)
        else:
            self.began = time.perf_counter()

    def turns_ms(self) -> list[float]:
        """The median step of each turn after the first two, in milliseconds."""
        n = self.length - 1
        return [statistics.median(self.seconds[i : i + n]) * 1e3 for i in range(2 * n, len(self.seconds) - n + 1, n)]

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer) -> None:
        held = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.gradient_bytes = sum(g.numel() * g.element_size() for g in held)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        values = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v)]
        self.state_bytes = sum(v.numel() * v.element_size() for v in values)


def interleave(
    ways: dict[str, Callable[[], list[Callback]]], base: nn.Module, rounds: int, steps: int
) -> dict[str, Clock]:
    """Train a copy of ``base`` in every way at once, ``steps`` at a time in turn, each in its own thread.

    The runs live as long as the comparison does, so no way pays for a model's copy or for an optimizer's first step,
    and a machine that is slower for a minute is slower for all of them. The first two rounds are not counted.
    """
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: threads share one heap, as one run alone would have it
    turns = Turns(list(ways))
    clocks = {name: Clock(name, turns, steps) for name in ways}
    failed: list[BaseException] = []

    def run(name: str) -> None:
        torch.set_num_threads(THREADS)
        try:
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=1,
                max_steps=(rounds + 2) * steps,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[*ways[name](), clocks[name]],
            )
            trainer.fit(copy.deepcopy(base), DataLoader(Tokens(), batch_size=BATCH))
        except BaseException as error:
            failed.append(error)
        finally:
            turns.leave(name)

    threads = [threading.Thread(target=run, args=(name,)) for name in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return clocks


def random_masks(module: nn.Module, density: float) -> MaskSet:
    """Masks of scattered entries over everything but the head."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, p in module.named_parameters():
        draw = torch.rand(p.shape, generator=generator) < density
        masks[name] = torch.ones_like(draw) if name.startswith("head") else draw
    return MaskSet(masks)


def step(rounds: int, steps: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time a training step in every way."""
    from transformers import BertModel

    torch.manual_seed(0)
    encoder = BertModel.from_pretrained(checkpoint("minilm"), add_pooling_layer=False)
    base = Classifier(encoder).train()
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
    clocks = interleave(ways, base, rounds, steps)
    return [
        {
            "way": name,
            "ms": statistics.median(clock.turns_ms()),
            "over unmasked": ratio(clock, clocks["unmasked"]),
            "optimizer MB": clock.state_bytes / 1e6,
            "gradient MB": clock.gradient_bytes / 1e6,
        }
        for name, clock in clocks.items()
    ], goals(clocks)


def ratio(one: Clock, other: Clock) -> float:
    """The median over all rounds of one way's step time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(one.turns_ms(), other.turns_ms(), strict=True))


def goals(clocks: dict[str, Clock]) -> list[dict[str, Any]]:
    """The ratios that the project promises, with what was measured."""
    hands = ["by hand: float multiply + restore", "by hand: fill + restore"]
    faster = min(hands, key=lambda name: statistics.median(clocks[name].turns_ms()))
    pairs = [
        ("ours, dense", faster, 1.00),
        ("ours, dense", "by hand: boolean multiply + restore", None),
        ("last layer + head, ours", "last layer + head by hand", 1.03),
        ("ours, everything active", "unmasked", 1.01),
    ]
    return [
        {"ratio": f"{one} / {other}", "goal": goal, "measured": ratio(clocks[one], clocks[other])}
        for one, other, goal in pairs
    ]


def holders(rounds: int) -> list[dict[str, Any]]:
    """Time one masking of all gradients and one restore of all weights of a MiniLM, by density and way."""
    shapes = [(30522, 384)] + [(384, 384)] * 24 + [(1536, 384)] * 12
    tensors, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    rows = []
    for density in (0.001, 0.005, 0.01, 0.03, 0.1, 0.2, 0.5, 0.8, 0.9, 0.95, 0.97, 0.99):
        masks = [torch.rand(shape) < density for shape in shapes]
        kinds: dict[str, Callable[[Tensor, Tensor], Holder]] = {
            "fill, where": _Where,
            "few active": _FewActive,
            "few held": _FewHeld,
            "bits, where": functools.partial(_Bits, mixed=False),
            "bits": functools.partial(_Bits, mixed=True),
        }
        ways = {name: [kind(t, m) for t, m in zip(tensors, masks, strict=True)] for name, kind in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name in random.sample(list(ways), len(ways)):
                begin = time.perf_counter()
                for held, gradient in zip(ways[name], gradients, strict=True):
                    held.mask_gradient(gradient)
                for held, tensor in zip(ways[name], tensors, strict=True):
                    held.restore(tensor)
                times[name].append(time.perf_counter() - begin)
        rows.append({"density": density, **{f"{n} (ms)": statistics.median(t) * 1e3 for n, t in times.items()}})
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
    parser.add_argument("--rounds", type=int, default=30, help="how often each run takes its turn")
    parser.add_argument("--steps", type=int, default=4, help="training steps of one turn; the first is not counted")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in ("lightning.pytorch", "lightning.fabric"):
        import logging

        logging.getLogger(name).setLevel(logging.ERROR)
    results: dict[str, Any] = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    if arguments.what == "holders":
        results["holders"] = holders(arguments.rounds)
        show("Mask the gradients and restore the weights of MiniLM", results["holders"])
    else:
        rows, promises = step(arguments.rounds, arguments.steps)
        results |= {"step": rows, "goals": promises}
        show(f"A training step at density {DENSITY:.0%} ({BATCH} x {TOKENS} tokens, {THREADS} threads)", rows)
        show("Goals", results["goals"])
    temporary = arguments.output.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1))
    os.replace(temporary, arguments.output)


if __name__ == "__main__":
    main()
