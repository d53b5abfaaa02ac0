"""What a mask is, how it is chosen, how it is held: torch only, so it serves a plain training loop as well as Lightning.

The pipeline, each stage in its own file::

    patterns -> scope -> criterion -> structure -> allocation -> MaskSet -> hold
"""

from lightning_mask.core.criteria import Context, criterion
from lightning_mask.core.engine import MaskEngine
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.selection import Selection

__all__ = ["Context", "MaskEngine", "MaskSet", "Selection", "criterion"]
