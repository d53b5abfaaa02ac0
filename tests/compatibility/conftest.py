"""The networks of the callbacks' tests, and their fixture."""

import sys
from pathlib import Path

from tests.quiet import quiet_and_apart

__all__ = ["quiet_and_apart"]

sys.path.append(str(Path(__file__).parents[1] / "callbacks"))
