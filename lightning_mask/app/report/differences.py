"""What differs between two runs."""

from dataclasses import dataclass
from typing import Any

from lightning_mask.app.report.reading import Run

# Not what a run is, but where it lies and what it is called.
_ASIDE = ("paths.", "tags", "task_name", "report")


@dataclass(frozen=True)
class Change:
    """One thing that differs.

    Args:
        name: Of a figure, a fact or a key of the config.
        before: Its value in the previous run; None: there is none.
        after: Its value in this one; None: there is none.
    """

    name: str
    before: Any
    after: Any


def metrics(run: Run, before: Run, stages: tuple[str, ...] = ("test/", "val/")) -> list[Change]:
    """Return the figures of either run that belong to one of the stages, also those that are the same."""
    names = [name for name in {**run.metrics, **before.metrics} if name.startswith(stages)]
    return [Change(name, before.metrics.get(name), run.metrics.get(name)) for name in names]


def facts(run: Run, before: Run) -> list[Change]:
    """Return which facts of the masks and of the machine differ."""

    def of(each: Run) -> dict[str, Any]:
        found = {
            key.replace("_", " "): each.mask.get(key) for key in ("active", "total", "density", "sparsity", "steps")
        }
        found["phases"] = ", ".join(phase.name for phase in each.phases) or None
        found["processes"] = each.summary.get("world_size")
        return found | {f"version of {k}": v for k, v in (each.summary.get("versions") or {}).items()}

    return _changes(of(before), of(run))


def config(run: Run, before: Run) -> list[Change]:
    """Return the keys of the config that differ; none where either run has none."""
    if not run.config or not before.config:
        return []
    kept = [{k: v for k, v in each.config.items() if not k.startswith(_ASIDE)} for each in (before, run)]
    return _changes(*kept)


def better(change: Change) -> bool | None:
    """Whether a figure got better; None: it is the same, or which way is better is not known.

    Example:
        >>> better(Change("test/loss", 1.0, 0.5)), better(Change("test/accuracy", 0.5, 0.5))
        (True, None)
    """
    if not isinstance(change.before, int | float) or not isinstance(change.after, int | float):
        return None
    words = change.name.lower()
    falls = any(word in words for word in ("loss", "error", "perplexity"))
    rises = any(word in words for word in ("accuracy", "f1", "auc", "precision", "recall"))
    if falls == rises or change.before == change.after:
        return None
    return (change.after < change.before) == falls


def _changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    names = {**after, **before}
    return [Change(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]
