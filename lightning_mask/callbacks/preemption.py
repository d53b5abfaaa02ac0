"""Preemption: a signal asks for the end; all ranks stop after the same step, with a checkpoint, and the job is requeued."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mask.callbacks.saving import is_settled, save_last, validation_follows
from lightning_mask.callbacks.signals import listen_again, listening, numbers, request_requeue, told
from lightning_mask.core.distributed import world_size
from lightning_mask.core.files import whole_file

_STOP, _REQUEUE = 1, 2
_TRIES = 5
"""Tries of a job in a row without an optimizer step, after which it is not requeued any more."""


class Preempted(SystemExit):
    """The end of a run that a signal asked for.

    The process's exit code is 75: try again later (EX_TEMPFAIL). A process that Lightning started for a rank ends with 0, else
    the first one, which watches it, would kill itself.
    """

    def __init__(self, trainer: Trainer) -> None:
        started = isinstance(_environment(trainer), LightningEnvironment) and trainer.local_rank != 0
        super().__init__(0 if started else 75)


class Preemption(Checkpoint):
    """Save and stop after the step in which a signal came, on all ranks alike; requeue the job where there is a queue.

    The signal itself is only noted, so it may fall anywhere: into a step, a criterion's calibration, a checkpoint being
    written. When a step ends, each rank hands in what it has noted, and when the next one ends all know what any rank had: the
    one number that is reduced travels while that step is computed, and nobody waits for it. The checkpoint is taken at the end
    of an accumulation window, behind a validation that was due, and not between two epochs but a step later, so that the run
    goes on from it as if it had never stopped; before the first step there is nothing to save. Then :class:`Preempted` is
    raised. A job that has come to no step in five tries is not requeued again: what comes before takes longer than it is given.

    Replaces Lightning's own handlers, which save inside of the signal handler: ranks that are at different places then wait for
    each other for ever.

    Args:
        dirpath: Folder of ``last.ckpt``; the one before becomes ``previous.ckpt``. None: stop without saving.
        signals: Names of the signals that ask for the end.
        requeue: Those among them upon which the job is to start again (``scontrol requeue``, or submitit's way). Not SIGTERM:
            it is how a person cancels a job, and a job that SLURM itself preempts it puts back by itself.

    Raises:
        ValueError: If a name is of no signal, or one to requeue upon is not among ``signals``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        signals: Sequence[str] = ("SIGUSR1", "SIGUSR2", "SIGTERM"),
        requeue: Sequence[str] = ("SIGUSR1", "SIGUSR2"),
    ) -> None:
        self.signals, self.requeue = list(signals), list(requeue)
        numbers(self.signals)
        odd = [name for name in self.requeue if name not in self.signals]
        if odd:
            raise ValueError(f"Preemption: requeue names {odd[0]}, which is not among signals={self.signals}.")
        self.path = None if dirpath is None else Path(dirpath) / "last.ckpt"
        self._listening = ExitStack()
        self._stepped = False
        self._asked: tuple[Tensor, Any] | None = None

    # Where the note is looked at.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before anything is chosen or trained."""
        self._stop_if(trainer, self._known(trainer), save=False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the first step: what was chosen is chosen again."""
        self._stop_if(trainer, self._known(trainer), save=False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at what the ranks handed in at the step before, and hand in anew."""
        if not self._stepped and self.path is not None and trainer.is_global_zero:
            with suppress(OSError):
                self._tries(self.path).unlink(missing_ok=True)
        self._stepped = True
        if is_settled(trainer) and not _ends(trainer) and not validation_follows(trainer):
            self._stop_if(trainer, self._known_since_last(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop behind a validation: a run that went on from before it would leave it out."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and is_settled(trainer) and not _ends(trainer):
            self._stop_if(trainer, self._known(trainer))

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Stop a test; training is saved already."""
        self._stop_if(trainer, self._known_since_last(trainer), save=False)

    # What the ranks know.

    def _noted(self) -> int:
        names = told()
        if any(name in self.requeue for name in names):
            return _REQUEUE
        return _STOP if any(name in self.signals for name in names) else 0

    def _hand_in(self, trainer: Trainer) -> tuple[Tensor, Any]:
        value = torch.tensor([self._noted()], device=trainer.strategy.root_device)
        return value, dist.all_reduce(value, op=dist.ReduceOp.MAX, async_op=True)

    def _known(self, trainer: Trainer) -> int:
        """What any rank has noted until now."""
        if world_size() == 1:
            return self._noted()
        value, work = self._hand_in(trainer)
        work.wait()
        return int(value.item())

    def _known_since_last(self, trainer: Trainer) -> int:
        """What any rank had noted when this was asked last; the answer has come meanwhile."""
        if world_size() == 1:
            return self._noted()
        asked, self._asked = self._asked, self._hand_in(trainer)
        if asked is None:
            return 0
        asked[1].wait()
        return int(asked[0].item())

    def _stop_if(self, trainer: Trainer, known: int, save: bool = True) -> None:
        if not known:
            return
        names = " and ".join(dict.fromkeys(told())) or "a signal to another rank"
        said = f"stopped by {names} at step {trainer.global_step}"
        if save and self.path is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            save_last(trainer, self.path)
            said += f", saved {self.path}"
        try:
            if known == _REQUEUE and trainer.is_global_zero:
                rank_zero_info(said)
                said = self._why_not() or request_requeue()
        finally:  # submitit ends rank 0 here; the others must not end before, which would end it, too
            trainer.strategy.barrier("requeued")
        rank_zero_info(said)
        raise Preempted(trainer)

    def _why_not(self) -> str:
        """Why the job is not to start once more, in words; empty where it is. Counts the tries that came to no step."""
        if self.path is None or self._stepped:
            return ""
        counted = self._tries(self.path)
        with suppress(OSError, ValueError):  # a full disk, or a count that was cut off, is no reason not to start again
            tries = 1 + (int(counted.read_text(encoding="utf-8")) if counted.exists() else 0)
            counted.unlink(missing_ok=True)
            if tries == _TRIES:
                return (
                    f"not requeued: {tries} tries in a row came to no step of training; give the job more time, or its "
                    "criterion fewer batches"
                )
            with whole_file(counted) as temporary:
                temporary.write_text(str(tries), encoding="utf-8")
        return ""

    @staticmethod
    def _tries(last: Path) -> Path:
        return last.with_name("tries_without_a_step.txt")

    # Listening, in place of Lightning.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen from now on; what Lightning is about to make of signals is put back to listening at once."""
        self._asked = None
        self._listening.close()
        self._listening.enter_context(listening(self.signals))
        connector: Any = trainer._signal_connector
        environment = _environment(trainer)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
        register = type(connector).register_signal_handlers

        def register_and_listen() -> None:
            register(connector)
            for number in numbers(self.signals):
                connector._original_handlers.pop(number, None)  # else Lightning would put them back when all is over
            listen_again()

        connector.register_signal_handlers = register_and_listen

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the signals do again what they did before."""
        self._listening.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let the signals do again what they did before."""
        self._listening.close()


def _environment(trainer: Trainer) -> Any:
    return trainer._accelerator_connector.cluster_environment


def _ends(trainer: Trainer) -> bool:
    """Whether training is over with this step anyway."""
    steps, epochs, loop = trainer.max_steps, trainer.max_epochs or -1, trainer.fit_loop
    last = loop.epoch_loop._num_ready_batches_reached()
    return (
        (steps != -1 and trainer.global_step >= steps)
        or (epochs != -1 and last and loop.epoch_progress.current.ready >= epochs)
        or (trainer.should_stop and loop._can_stop_early)
    )
