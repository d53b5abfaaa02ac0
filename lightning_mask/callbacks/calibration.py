"""Training batches and a loss for criteria, taken from a Trainer without disturbing its run."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_mask.core import criteria


def training_batches(trainer: Trainer, count: int) -> Iterator[Any]:
    """Yield up to ``count`` training batches of this rank, on its device.

    They come from copies of the run's own loaders, so that an iteration in progress and a loader's saved state stay as
    they are; the random states, global and of the loaders' own generators, are put back afterwards.

    Raises:
        ValueError: If the training data can be iterated over only once.
    """
    loaders = trainer.fit_loop._combined_loader
    assert loaders is not None
    fresh = CombinedLoader(_copy_loaders(loaders.iterables), loaders._mode)
    module = trainer.lightning_module
    count = int(min(count, trainer.num_training_batches))
    with isolate_rng(), keep_generators(loaders.flattened):
        for batch, _, _ in islice(iter(fresh), count):
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def keep_generators(loaders: list[Any]) -> Iterator[None]:
    """Put back the generators that loaders, their samplers and batch samplers draw from."""
    parts = [
        part
        for loader in loaders
        for whole in (loader, getattr(loader, "batch_sampler", None))
        for part in (whole, getattr(whole, "sampler", None))
    ]
    found = {id(g): g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    states = [(generator, generator.get_state()) for generator in found.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def begin_epoch_again(trainer: Trainer) -> None:
    """Make the loaders' iterators anew after a resume between two epochs.

    Lightning makes them before a callback can put the random state back, and a plain loader draws its order from that.
    In mid-epoch, and where a loader keeps its own state, nothing is to be done.
    """
    loop = trainer.fit_loop
    assert loop._combined_loader is not None
    resumes = any(hasattr(loader, "load_state_dict") for loader in loop._combined_loader.flattened)
    mid_epoch = loop.restarted_mid_epoch and not loop.epoch_loop.batch_progress.is_last_batch
    if loop._data_fetcher is not None and not resumes and not mid_epoch:
        iter(loop._data_fetcher)


def take_places(trainer: Trainer) -> None:
    """Give loaders the places that a checkpoint has for them, where Lightning made them before it had read the checkpoint.

    It does so when ``configure_optimizers`` asks for ``trainer.estimated_stepping_batches``, as for a schedule, and then leaves
    them at the beginning of the epoch. To be called when training starts.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)


def _copy_loaders(loaders: Any) -> Any:
    if isinstance(loaders, dict):
        return {key: _copy_loaders(value) for key, value in loaders.items()}
    if isinstance(loaders, list | tuple) and any(isinstance(x, DataLoader) for x in loaders):
        return type(loaders)(_copy_loaders(value) for value in loaders)
    if isinstance(loaders, DataLoader):
        clone = copy.copy(loaders)
        clone._iterator = None
        return clone
    if isinstance(loaders, Iterator):
        raise ValueError(
            "The training data can be iterated over only once, so a criterion cannot look at it; give the Trainer a "
            "DataLoader, or choose a criterion without data."
        )
    return loaders


def check_score(score: str | criteria.Criterion, names: Sequence[str], module: LightningModule) -> None:
    """Refuse, before training, a criterion that cannot score these parameters of this module.

    Args:
        score: The criterion.
        names: Of the parameters in scope.
        module: The module.

    Raises:
        ValueError: Naming what is missing.
    """
    criteria.require(score, names, module)
    if criteria.needs_loss(score) and not module.automatic_optimization and not callable(_own_loss(module)):
        raise ValueError(_no_loss(module))
    if criteria.needs_sampled_loss(score) and not callable(getattr(module, "mask_sampled_loss", None)):
        raise ValueError(criteria.NO_SAMPLED_LOSS)


def _own_loss(module: LightningModule) -> Any:
    return getattr(module, "mask_loss", None)


def _no_loss(module: LightningModule) -> str:
    return (
        f"{type(module).__name__} optimizes manually, so its training_step cannot be used to score entries; define "
        "mask_loss(self, batch) that returns the loss, or choose a criterion without data."
    )


def batch_loss(trainer: Trainer, module: LightningModule, batch: Any) -> Tensor | None:
    """Return the loss of one batch: from ``module.mask_loss(batch)`` where it is defined, else from its training step.

    The training step runs with logging silenced and metrics kept as they are. None where it skips the batch. It is in the
    run's precision, except that ``16-mixed`` computes in float32: no scaler keeps small gradients from vanishing here.

    Raises:
        ValueError: If the module optimizes manually and has no ``mask_loss``, or what comes back is no loss.
    """
    own = _own_loss(module)
    with _precision(trainer), isolate_rng(), _quiet(module):
        if callable(own):
            loss = own(batch)
        elif module.automatic_optimization:
            output = _training_step(module, batch)
            loss = output.get("loss") if isinstance(output, dict) else output
        else:
            raise ValueError(_no_loss(module))
    return _checked(module, loss)


def _training_step(module: LightningModule, batch: Any) -> Any:
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    try:
        return module.training_step(batch, 0) if takes_index else module.training_step(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        failure = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{type(module).__name__}.training_step failed when a criterion called it, in eval mode and outside of the training "
            f"loop ({failure}); define mask_loss(self, batch) that returns the loss alone, or choose a criterion without data."
        ) from error


def sampled_loss(trainer: Trainer, module: LightningModule) -> Callable[[Any], Tensor | None] | None:
    """Return ``module.mask_sampled_loss`` in the precision of :func:`batch_loss`; None where the module defines none.

    It maps a batch to the mean loss against labels that it draws, with torch's global random state, from the module's own
    predictions: what the Fisher information is made of.
    """
    own = getattr(module, "mask_sampled_loss", None)
    if not callable(own):
        return None

    def loss_of(batch: Any) -> Tensor | None:
        with _precision(trainer):
            return _checked(module, own(batch))

    return loss_of


def _precision(trainer: Trainer) -> AbstractContextManager[Any]:
    plugin = trainer.precision_plugin
    return nullcontext() if getattr(plugin, "scaler", None) is not None else plugin.forward_context()


def _checked(module: LightningModule, loss: Any) -> Tensor | None:
    """Refuse what is neither a loss nor None.

    Raises:
        ValueError: Naming what came back.
    """
    if loss is not None and not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(module).__name__} returned {type(loss).__name__} for a batch; a criterion needs its loss."
        )
    return loss


@contextmanager
def _quiet(module: LightningModule) -> Iterator[None]:
    """Silence ``self.log`` and keep metric states while a training step runs outside the loop."""
    metrics = [m for m in module.modules() if isinstance(m, Metric)]
    kept = [(m, copy.deepcopy(m.metric_state), m._update_count, m._computed) for m in metrics]
    object.__setattr__(module, "log", _nothing)
    object.__setattr__(module, "log_dict", _nothing)
    try:
        yield
    finally:
        del module.log, module.log_dict
        for metric, state, count, computed in kept:
            for name, value in state.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed


def _nothing(*_: Any, **__: Any) -> None:
    return None
