"""What is logged of the masks in force."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_mask.callbacks.session import Session


class Facts:
    """Counts of the masks in force, taken once for each change, since they are logged at each step.

    ``values`` has ``mask/active`` and ``mask/density``; with a PruneMask ``mask/sparsity``, with phases ``mask/phase``.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self._logged: tuple[int, dict[str, float]] | None = None

    @property
    def active(self) -> int:
        """Number of entries that train."""
        return int(self.values["mask/active"])

    def take(self, session: "Session") -> None:
        """Count anew."""
        assert session.engine is not None
        masks = session.engine.masks
        self.values = {"mask/active": float(masks.count()), "mask/density": masks.density()}
        if session.pruners:
            entries = sum(p.masks.numel() for p in session.pruners)
            self.values["mask/sparsity"] = 1 - sum(p.masks.count() for p in session.pruners) / max(entries, 1)
        if session.phases is not None:
            self.values["mask/phase"] = float(session.phases.phase)

    def log(self, session: "Session") -> None:
        """Log when something changed and when an epoch begins; in between Lightning repeats what was logged last."""
        now = (session.trainer.current_epoch, self.values)
        if now == self._logged:
            return
        self._logged = now
        shown = {key: value for key, value in self.values.items() if key != "mask/active"}
        session.module.log_dict(shown, on_step=True, on_epoch=False, prog_bar=True)
        session.module.log("mask/active", self.values["mask/active"], on_step=True, on_epoch=False)
