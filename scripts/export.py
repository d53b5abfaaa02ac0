"""Write the network of a run for use elsewhere, from any folder: `python scripts/export.py run=<run> format=physical`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mask.app.export import main

if __name__ == "__main__":
    main()
