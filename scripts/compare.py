"""Compare ways of choosing a mask from the command line, from any folder: `python scripts/compare.py experiment=compare_text`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mask.app.compare import main

if __name__ == "__main__":
    main()
