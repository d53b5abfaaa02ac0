"""What Lightning says of every run, and nobody can act on, is left out."""

import logging
import warnings

_CHATTER = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "`Trainer.fit` stopped",
    "Restor",  # train() says it, once
    "Loaded model weights",
    "Loading `train_dataloader`",
    "Initializing distributed",  # of each rank; the first says how many there are
)
_SPEAKERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.distributed",
    "lightning.pytorch",
)
_IGNORED = (
    r".*does not have many workers.*",
    r".*is not empty.*",
    r".*number of training batches.*smaller than the logging interval.*",
    r".*exists and is not empty.*",
    r".*`srun` command is available.*",
    r".*isinstance\(treespec, LeafSpec\).*",
)


def quieten() -> None:
    """Leave it out from now on; more than once does no harm."""
    for pattern in _IGNORED:
        warnings.filterwarnings("ignore", pattern)
    for name in _SPEAKERS:
        logger = logging.getLogger(name)
        if _is_news not in logger.filters:
            logger.addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_CHATTER)
