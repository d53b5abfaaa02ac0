"""Lightning comes in two packages, ``lightning.pytorch`` and ``pytorch_lightning``, each with classes of its own."""

import sys
from typing import TYPE_CHECKING, TypeVar

from lightning.pytorch import Callback

Kind = TypeVar("Kind")


def twins(*kinds: type[Kind]) -> tuple[type[Kind], ...]:
    """Return classes of ``lightning.pytorch`` and, where ``pytorch_lightning`` is imported, their namesakes in it."""
    modules = [sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1)) for kind in kinds]
    found = [getattr(module, kind.__name__, kind) for module, kind in zip(modules, kinds, strict=True)]
    return tuple(dict.fromkeys((*kinds, *found)))


if TYPE_CHECKING:
    AnyCallback = Callback
else:

    class AnyCallback(*twins(Callback)):
        """A callback of both packages; of ``pytorch_lightning`` where that is imported before this package."""
