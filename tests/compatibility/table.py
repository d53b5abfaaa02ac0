"""Write ``docs/compatibility.md`` from the tests in this folder: ``python tests/compatibility/table.py``."""

import sys
from importlib import import_module
from itertools import groupby
from pathlib import Path

HERE = Path(__file__).parent
REPO = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent / "callbacks")]

from ours import CLASSES, ROWS, Row  # noqa: E402

DOCUMENT = REPO / "docs" / "compatibility.md"
BESIDE = "tests/callbacks/test_with_other_callbacks.py::"
ELSEWHERE = [
    Row(
        "Lightning's callbacks",
        "`WeightAveraging`, `EMAWeightAveraging`, `StochasticWeightAveraging`",
        "model, averages and checkpoints are exact after each epoch and at the end",
        f"{BESIDE}test_held_and_pruned_are_exact_with_weight_averaging, "
        f"{BESIDE}test_what_a_later_phase_holds_whole_is_not_averaged_with_what_it_was_before",
    ),
    Row(
        "Lightning's callbacks",
        "`EarlyStopping`, `ModelCheckpoint`, `LearningRateMonitor`",
        "they stop and save as without us; the last checkpoint equals the model",
        f"{BESIDE}test_beside_early_stopping_checkpoints_and_rate_monitor",
    ),
]
"""Asserted by tests that lie beside those of the callbacks; all three take part, in one run or in turns."""

GROUPS = ["The Trainer", "The Tuner", "Lightning's callbacks", "Beside the Trainer", "Processes started by `fit`"]

INTRODUCTION = """# Compatibility

Every cell stands for a test that runs the feature with that callback on a small network and compares bits: what is held has
every bit that it had before, what is pruned is `+0.0`, and "equal" means `torch.equal` on all weights. `python
tests/compatibility/table.py` writes this page from the tests, and a test refuses an outdated one.
"""

NOTES = """
## What to know

- **`Tuner.lr_find`, `LearningRateFinder`**: Lightning takes all callbacks out of the list while it searches, so the rate that it
  finds is one for training everything. A mask with few entries wants a larger one: try 3, 10 and 30 times as much.
- **`ddp_spawn`, `ddp_notebook`**: training happens in other processes, and only weights and logged metrics come back to the one
  that called `fit`; there `mask.masks` stays empty. `RunReport("run")` in the list of callbacks writes `run/masks.safetensors`,
  which `MaskSet.load` reads.
- **`pytorch_lightning`**: import it before `lightning_mask`, and the callbacks are callbacks of both packages. Imported later,
  it trains with them all the same, but its LightningCLI does not take them for callbacks.
- **Fabric** has no callbacks: choose masks yourself, with `MaskEngine(module, optimizer, masks)` on the module that you gave to
  `fabric.setup`, and the optimizer that it returned.
- **FSDP1, DeepSpeed and tensor parallelism** are refused by name when training starts.
"""


def rows() -> list[Row]:
    """All rows, group by group."""
    for file in sorted(HERE.glob("test_*.py")):
        import_module(file.stem)
    return sorted([*ROWS, *ELSEWHERE], key=lambda row: GROUPS.index(row.group))


def document() -> str:
    """The page."""
    lines = [INTRODUCTION]
    for group, members in groupby(rows(), key=lambda row: row.group):
        lines += [f"## {group}", "", f"| | {' | '.join(f'`{name}`' for name in CLASSES)} | what is asserted |"]
        lines += [f"|---|{':-:|' * len(CLASSES)}---|"]
        lines += [f"| {row.feature} | {' | '.join('✓' for _ in CLASSES)} | {row.what} |" for row in members]
        lines += [""]
    return "\n".join(lines).rstrip() + "\n" + NOTES


if __name__ == "__main__":
    DOCUMENT.write_text(document())
