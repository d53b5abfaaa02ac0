"""Lightning callbacks: when masks are chosen, applied and changed."""

from lightning_mask.callbacks.freeze import FreezeMask
from lightning_mask.callbacks.gradient import GradientMask
from lightning_mask.callbacks.phase import Phase
from lightning_mask.callbacks.phases import PhaseUnfreeze
from lightning_mask.callbacks.pictures import LogPictures
from lightning_mask.callbacks.preemption import Preempted, Preemption
from lightning_mask.callbacks.prune import PruneMask
from lightning_mask.callbacks.report import RunReport

__all__ = [
    "FreezeMask",
    "GradientMask",
    "LogPictures",
    "Phase",
    "PhaseUnfreeze",
    "Preempted",
    "Preemption",
    "PruneMask",
    "RunReport",
]
