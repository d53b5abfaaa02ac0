"""Runs that live side by side in one process and take turns, and the clock of each."""

import copy
import ctypes
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmark.model import BATCH, THREADS, Classifier, Tokens

WARM = 2
"""Turns at the beginning of a phase that are not counted."""


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        callbacks: Makes the callbacks of a run, given the module it will train.
        prepare: Changes the module before the Trainer sees it.
        optimizer: Keyword arguments of AdamW.
        only_trainable: Whether the optimizer gets the tensors alone that require a gradient at that time.
    """

    callbacks: Callable[[nn.Module], list[Callback]] = lambda _: []
    prepare: Callable[[Classifier], None] = lambda _: None
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"fused": True})
    only_trainable: bool = False

    def ready(self, base: Classifier) -> Classifier:
        """Make ``base`` what this way trains."""
        base.optimizer, base.only_trainable = dict(self.optimizer), self.only_trainable
        self.prepare(base)
        return base


class Turns:
    """Hands the processor round: of all the threads that called ``take``, one runs at a time, in a random order per round.

    The order is the same in every process, so that ranks agree on whose turn it is.
    """

    def __init__(self, names: Iterable[str]) -> None:
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


def written_bytes() -> int:
    """Bytes that this process has written so far, sockets and files alike (Linux; 0 elsewhere).

    Gloo's messages are among them, whoever asked for them: DDP's reducer, a communication hook or ``torch.distributed``.
    """
    try:
        with open("/proc/self/io") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("wchar"))
    except OSError:
        return 0


class Clock(Callback):
    """Times a run that takes turns with others, step by step, and counts the bytes that are alive when a step has run.

    A turn is a few steps; the first one of a turn warms the caches and is not counted. Gradients are counted in a hook on
    the optimizer, where they still are what backward and our callbacks left: a hook of the callback's own would be
    a reader of gradients, and FreezeMask would hold dense for its sake.

    Args:
        name: Of the run.
        turns: Whom to ask for the turn.
        length: Steps of one turn.
        sent_bytes: Tells how many bytes were sent so far.
    """

    def __init__(self, name: str, turns: Turns, length: int, sent_bytes: Callable[[], int]) -> None:
        self.name, self.turns, self.length, self.sent_bytes = name, turns, length, sent_bytes
        self.seconds: list[float] = []
        self.sent: list[int] = []
        self.steps = self.state_bytes = self.gradient_bytes = 0
        self.began: float | None = None
        self.written: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.parameters = list(pl_module.parameters())
        trainer.optimizers[0].register_step_post_hook(self.count_gradients)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self.began is not None:
            self.seconds.append(now - self.began)
        self.began = None
        if self.steps % self.length == 0:
            self.hand_over()
        else:
            self.began = time.perf_counter()
        self.steps += 1

    def hand_over(self) -> None:
        """End the turn and wait for the next one."""
        if self.written is not None:
            self.sent.append((self.sent_bytes() - self.written) // self.length)
        self.turns.take(self.name)
        self.written = self.sent_bytes()

    def count_gradients(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Add up the gradients of the module's parameters and of those in the optimizer, each once."""
        if self.steps % self.length:
            return
        grouped = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = {id(p): p.grad for p in [*self.parameters, *grouped] if p.grad is not None}
        self.gradient_bytes = sum(size(g) for g in gradients.values())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.began is not None and self.written is not None:
            self.seconds.append(time.perf_counter() - self.began)
            self.sent.append((self.sent_bytes() - self.written) // self.length)
        state = trainer.optimizers[0].state
        self.state_bytes = sum(size(v) for s in state.values() for v in s.values() if torch.is_tensor(v))

    def turns_ms(self, phase: int = 0, phases: int = 1) -> list[float]:
        """The median step of each turn of one phase (they are of equal length) in milliseconds, warm turns left out."""
        n = self.length - 1
        medians = [statistics.median(self.seconds[i : i + n]) * 1e3 for i in range(0, len(self.seconds) - n + 1, n)]
        return medians[_of_phase(self.steps // self.length, phase, phases)]

    def sent_per_step(self, phase: int = 0, phases: int = 1) -> float:
        """Bytes that one step sends, the median of the turns of a phase."""
        return statistics.median(self.sent[_of_phase(self.steps // self.length, phase, phases)])


def _of_phase(turns: int, phase: int, phases: int) -> slice:
    each = turns // phases
    return slice(phase * each + WARM, (phase + 1) * each)


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def interleave(
    ways: Mapping[str, Way],
    base: Classifier,
    rounds: int,
    steps: int,
    *,
    phases: int = 1,
    threads: int = THREADS,
    strategy: str = "auto",
    devices: int = 1,
    batch: int = BATCH,
    sent_bytes: Callable[[], int] = written_bytes,
) -> dict[str, Clock]:
    """Train a copy of ``base`` in every way at once, ``steps`` at a time in turn, each in its own thread.

    The runs live as long as the comparison does, so no way pays for a model's copy or for an optimizer's first step,
    and a machine that is slower for a minute is slower for all of them. They are set up in turn too. An epoch is a phase;
    its first two rounds are not counted.
    """
    ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX: threads share one heap, as one run alone would have it
    turns = Turns(ways)
    clocks = {name: Clock(name, turns, steps, sent_bytes) for name in ways}
    failed: dict[str, BaseException] = {}

    def run(name: str) -> None:
        turns.take(name)
        torch.set_num_threads(threads)
        try:
            module = ways[name].ready(copy.deepcopy(base))
            trainer = trainer_of(
                [*ways[name].callbacks(module), clocks[name]],
                max_epochs=phases,
                limit_train_batches=(rounds + WARM) * steps,
                strategy=strategy,
                devices=devices,
            )
            trainer.fit(module, DataLoader(Tokens(), batch_size=batch))
        except BaseException as error:
            failed[name] = error
        finally:
            turns.leave(name)

    running = [threading.Thread(target=run, args=(name,), daemon=True) for name in ways]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for name, error in failed.items():
        raise RuntimeError(f"The run {name!r} failed: {error}") from error
    return clocks


def trainer_of(callbacks: list[Callback], **arguments: Any) -> pl.Trainer:
    """A Trainer that does nothing but train."""
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
        **{"devices": 1, **arguments},
    )


def ratio(one: list[float], other: list[float]) -> float:
    """The median over all rounds of one way's step time over another's in the same round."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))
