"""The three callbacks in a small setting, what must be true after any run with them, and the table of what was run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from mask_nets import Watch, changed, moved
from torch import Tensor

from lightning_mask import FreezeMask, PhaseUnfreeze, PruneMask

SCOPE = "blocks.*.lin.weight"
PHASES = [{"until": "4 steps", "train": "head"}, {"train": ["head", "stem"]}]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "FreezeMask": {"train": ["head"], "score": "fisher", "density": 0.3, "scope": ["stem.weight"], "batches": 2},
    "PruneMask": {"sparsity": 0.5, "scope": [SCOPE], "start": "2 steps", "end": "6 steps", "every": "2 steps"},
    "PhaseUnfreeze": {"phases": PHASES},
}
CLASSES = {"FreezeMask": FreezeMask, "PruneMask": PruneMask, "PhaseUnfreeze": PhaseUnfreeze}


class Row(NamedTuple):
    """A line of the table: what of Lightning, what is equal or held, and the test that asserts it for all three callbacks."""

    group: str
    feature: str
    what: str
    test: str


ROWS: list[Row] = []


def cells(group: str, feature: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of ``feature`` with each of the three callbacks as ``ours``, and put it into the table."""

    def register(test: Callable[..., None]) -> Callable[..., None]:
        module = test.__module__.rpartition(".")[2]
        ROWS.append(Row(group, feature, what, f"tests/compatibility/{module}.py::{test.__name__}"))
        return pytest.mark.parametrize("ours", list(CLASSES))(test)

    return register


def make(ours: str) -> Any:
    """A new callback: a fisher mask of 29 entries and the head; 144 zeros by step 6; the head, from step 4 the stem too."""
    return CLASSES[ours](**ARGUMENTS[ours])


def assert_exact(callback: Any, before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Held entries have every bit that they had, pruned ones are +0.0, and the rest has learned."""
    where = moved(before, after)
    if isinstance(callback, PruneMask):
        masks = callback.masks
        assert masks.numel() - masks.count() == 144
        for name, mask in masks.items():
            assert not bool(after[name].view(torch.int32)[~mask].any()), f"{name}: not +0.0"
            assert bool((after[name][mask] != 0).all()), f"{name}: more zeros than pruned entries"
    elif isinstance(callback, FreezeMask):
        assert {name: mask.sum().item() for name, mask in callback.masks.items() if mask.any()} == {
            "stem.weight": 29,
            "head.weight": 24,
            "head.bias": 2,
        }
        for name, mask in callback.masks.items():
            assert not bool((where[name] & ~mask).any()), f"{name}: held entries moved"
        assert bool(where["stem.weight"].any())
    else:
        assert [entry["step"] for entry in callback.history] == [0, 4]
        assert {name for name in where if bool(where[name].any())} == {
            name for name in where if name.startswith(("head", "stem"))
        }
    assert bool(where["head.weight"].any())


def assert_exact_at_every_step(callback: Any, watch: Watch) -> None:
    """The same, and what is held for a while is held for as long, and no zero comes back."""
    assert_exact(callback, watch.weights[0], watch.weights[-1])
    steps = range(len(watch.weights) - 1)
    if isinstance(callback, PhaseUnfreeze):
        head = {name for name in watch.weights[0] if name.startswith("head")}
        assert all(watch.moved_at(step) == head for step in steps if step < 4)
    if isinstance(callback, PruneMask):
        counts = [sum(int((w[name] == 0).sum()) for name in callback.masks) for w in watch.weights]
        assert counts == sorted(counts)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Two runs ended with the same bits."""
    assert not changed(a, b), f"{sorted(changed(a, b))} differ"
