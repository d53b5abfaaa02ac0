"""Run as a script: each of our callbacks in two processes that the Trainer starts itself, by spawning and by forking.

What comes back to the process that called ``fit`` is the weights, and what was written to disk.
"""

import logging
import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "callbacks"))

import lightning.pytorch as pl
import torch
from mask_nets import Net, loader
from ours import CLASSES, make

from lightning_mask.callbacks import RunReport


def main(folder: Path) -> None:
    """Leave, for each way to start and each callback, the weights, the masks, and a checkpoint."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for strategy in ("ddp_notebook", "ddp_spawn"):
        for ours in CLASSES:
            net, callback, here = Net(), make(ours), folder / strategy / ours
            trainer = pl.Trainer(
                accelerator="cpu",
                devices=2,
                strategy=strategy,
                max_epochs=4,  # of 4 steps, as each process has half of the batches
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                callbacks=[callback, RunReport(str(here), check_held=True)],
            )
            trainer.fit(net, loader())
            assert len(callback.masks) == 0  # as the page says: they are in the processes that trained
            torch.save(net.state_dict(), here / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
