"""Prune a model without training from the command line, from any folder: `python scripts/prune.py method=obs sparsity=0.5`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mask.app.prune import main

if __name__ == "__main__":
    main()
