"""Train several tasks in one network from the command line, from any folder: `python scripts/packnet.py experiment=packnet`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_mask.app.packnet import main

if __name__ == "__main__":
    main()
