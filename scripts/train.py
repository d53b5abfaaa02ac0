"""Train by mask from the command line, from any folder: `python scripts/train.py mask=fisher mask.density=0.01`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mask.app.train import main

if __name__ == "__main__":
    main()
