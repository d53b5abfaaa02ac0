"""Deltas: what training changed in a network, as one safetensors file that is put onto the base and taken off it again.

Needs torch and safetensors alone (the hub: huggingface_hub). Checkpoints are files (``.safetensors``, or ``.ckpt``, ``.pt``,
``.bin`` of tensors and plain values) or folders as ``save_pretrained`` writes them, also in shards; they are gone through
tensor by tensor, and where more than a few are in memory, the function says so. Names may have a common prefix on one side
(``net.`` of a LightningModule). Whatever is refused is refused with a ``ValueError`` of one line, or a ``FileNotFoundError``,
before the target is touched.
"""

from lightning_mask.delta.applying import apply, revert
from lightning_mask.delta.comparing import Difference, diff
from lightning_mask.delta.file import Delta, inspect
from lightning_mask.delta.hub import pull_delta, push_delta
from lightning_mask.delta.live import switch
from lightning_mask.delta.merging import merge
from lightning_mask.delta.saving import save_delta
from lightning_mask.delta.weights import content_hash

__all__ = [
    "Delta",
    "Difference",
    "apply",
    "content_hash",
    "diff",
    "inspect",
    "merge",
    "pull_delta",
    "push_delta",
    "revert",
    "save_delta",
    "switch",
]
