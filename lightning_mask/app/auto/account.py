"""What is written and shown of the trials: ``auto.json`` and the table."""

import copy
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table

from lightning_mask.app.auto.halving import Outcome, Setting, decisive, difference, listed, number, pick, rank
from lightning_mask.app.auto.settings import Auto

_MORE = "time: raise mask.minutes, or lower mask.steps"


def make_record(
    auto: Auto,
    cfg: DictConfig,
    rungs: Sequence[Sequence[Outcome]],
    no_time: Sequence[tuple[Setting, int]],
    left_out: list[dict[str, str]],
    held_out: str,
    seconds: float,
) -> dict[str, Any]:
    """Return the choice, and the trials that it follows from, as plain values.

    Args:
        auto: What was tried.
        cfg: The composed root config.
        rungs: Outcomes, rung by rung.
        no_time: Settings that there was no time for, with the steps that they would have had next.
        left_out: ``name`` and ``why`` of what else was not tried.
        held_out: Where the examples that trials were judged by are from.
        seconds: Wall-clock seconds of all.

    Raises:
        ValueError: If nothing could be trained.
    """
    chosen, reason = pick(decisive(rungs), auto.monitor, auto.mode)
    root = copy.deepcopy(cfg)
    with open_dict(root):
        root.mask = chosen.setting.mask
    examples = next((len(o.losses[0]) for rung in rungs for o in rung if o.losses is not None), None)
    return {
        "choice": {
            "strategy": chosen.setting.strategy,
            "density": chosen.setting.density,
            "lr": chosen.setting.lr,
            "entries": chosen.entries,
            "reason": reason,
            "mask": OmegaConf.to_container(root.mask, resolve=True),
        },
        "seconds": seconds,
        "judged_by": {"monitor": auto.monitor, "mode": auto.mode, "examples": examples, "from": held_out},
        "budget": auto.budget,
        "eta": auto.eta,
        "rungs": [{"steps": rung[0].steps, "trials": _rows(rung, auto)} for rung in rungs],
        "not_continued": [{"name": s.name, "steps": steps} for s, steps in no_time if steps != rungs[0][0].steps],
        "left_out": left_out
        + [{"name": s.name, "why": f"there was no {_MORE}"} for s, steps in no_time if steps == rungs[0][0].steps],
    }


def _rows(rung: Sequence[Outcome], auto: Auto) -> list[dict[str, Any]]:
    """The trials of a rung, the best first, with their difference from the best; then those that failed."""
    ranked = rank(rung, auto.mode)
    rows = []
    for outcome in [*ranked, *(o for o in rung if o.score is None)]:
        gap, noise = (None, None) if outcome.score is None else difference(outcome, ranked[0])
        rows.append(
            {
                "strategy": outcome.setting.strategy,
                "density": outcome.setting.density,
                "lr": outcome.setting.lr,
                "entries": outcome.entries,
                "optimizer_bytes": outcome.optimizer_bytes,
                "score": outcome.score,
                "difference": gap,
                "standard_error": noise,
                "error": outcome.error,
                "seconds": outcome.seconds,
                "folder": outcome.folder,
            }
        )
    return rows


def _few(names: Sequence[str]) -> str:
    return listed(names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"])


def show(record: dict[str, Any], auto: Auto) -> None:
    """Print the trials and the choice.

    Args:
        record: What :func:`make_record` returned.
        auto: What was tried.
    """
    table = Table(
        title=f"mask=auto: {auto.monitor} of {record['judged_by']['examples'] or 'the'} examples "
        f"{record['judged_by']['from']}"
    )
    for column in ("steps", "strategy", "density", "lr", "entries", auto.monitor, "behind the best", "seconds"):
        table.add_column(column, justify="left" if column == "strategy" else "right")
    for rung in record["rungs"]:
        for row in rung["trials"]:
            noise = "" if row["standard_error"] is None else f" ± {row['standard_error']:.4f}"
            behind = f"{abs(row['difference']):.4f}{noise}" if row["difference"] else ""
            score = row["error"] if row["score"] is None else f"{row['score']:.4f}"
            numbers = map(number, (row["density"], row["lr"], row["entries"]))
            table.add_row(str(rung["steps"]), row["strategy"], *numbers, score, behind, f"{row['seconds']:.0f}")
        table.add_section()
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    for why in dict.fromkeys(row["why"] for row in record["left_out"]):
        print(f"left out: {_few([row['name'] for row in record['left_out'] if row['why'] == why])}: {why}")
    for steps in dict.fromkeys(row["steps"] for row in record["not_continued"]):
        names = _few([row["name"] for row in record["not_continued"] if row["steps"] == steps])
        print(f"not tried for {steps} steps: {names}: there was no {_MORE}")
    print(f"mask=auto chose {record['choice']['reason']} It took {record['seconds']:.0f} s.")
