"""Script: one rank of a run over several hosts, or the whole of it on one: ``python host_case.py FOLDER [STEPS]``."""

import os
import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import seed_everything
from little import Data, Little, trainer

from lightning_mask import PruneMask
from lightning_mask.app.checkpoints import LastCheckpoint, WholeFiles
from lightning_mask.app.newest import newest_checkpoint
from lightning_mask.app.strategies import DataParallel
from lightning_mask.callbacks import Preemption

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else -1
    several = {"strategy": DataParallel(timeout=0.2), "num_nodes": 2} if "WORLD_SIZE" in os.environ else {}
    seed_everything(1)
    keeps = [LastCheckpoint(str(folder), 1), Preemption(str(folder))]
    pruning = PruneMask(0.5, scope="stem.weight", end="8 steps", every="2 steps")
    run = trainer(pruning, *keeps, max_steps=steps, limit_val_batches=0, **several)
    run.strategy.checkpoint_io = WholeFiles()
    start = newest_checkpoint(folder)
    run.fit(Little(), datamodule=Data(), ckpt_path=None if start is None else str(start))
