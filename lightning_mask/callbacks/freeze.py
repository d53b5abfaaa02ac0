"""FreezeMask: a selection held for the whole run."""

import json
import os
from collections.abc import Callable
from typing import Any

from lightning_mask.callbacks.base import MaskCallback, plain
from lightning_mask.callbacks.session import Session
from lightning_mask.core import criteria
from lightning_mask.core.engine import check_engine
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.schedules import Moment, Run
from lightning_mask.core.selection import Selection

# LightningCLI takes the first member of a union that a value fits: lists stand before strings, int before float.
Strings = list[str] | str | None


class FreezeMask(MaskCallback):
    """Hold every entry of the model that the selection does not name, bit for bit, for the whole run.

    Args:
        train: Patterns of tensors that may change whole: globs over parameter names (``"classifier.*"``, ``"*.bias"``),
            a module's name (everything below it), ``"re:<regex>"``, ``"type:LayerNorm"`` (module class), ``"weights:Linear"``
            (the weights of such modules; ``"weights:"``: of all linear and convolution layers), ``"layers:-2:"``
            (a slice of the model's repeated blocks); ``"!<pattern>"`` takes away. A tied parameter answers to each of its
            names. What neither ``train`` nor ``scope`` names is held whole. A normalisation module all of whose
            parameters are held uses its stored statistics, which do not move.
        score: Criterion that ranks the entries in ``scope``: a registered name, or a function; adds to ``train``.
        density: Float in (0, 1], the share of the entries in scope that may change, or int, their number. Or a dict of
            patterns to such values, e.g. ``{"*.attention.*": 0.02, "*.intermediate.*": 0.005}``: each is a budget of its own
            for the tensors in scope that its pattern names and no earlier one does; what none names is held.
        scope: Patterns; default: every trainable tensor that ``train`` does not name (with ``structure="head"``: of these,
            the tensors that have heads).
        structure: What is chosen as one unit, by the mean score of its entries: ``"entry"``; ``"row"`` (output unit, each
            entry of a vector); ``"column"`` (input unit); ``"head"`` (the query, key and value rows that make an attention
            head, with their biases, and the output columns that read it; where several queries share a key and value
            head, that is a unit of its own); ``"block:RxC"`` (R rows by C inputs; R entries of a vector), e.g.
            ``"block:4x4"``; ``"tensor"``; ``"layer"`` (all tensors of a repeated block of the model; outside of blocks, of a
            module).
        allocation: How a budget is shared among tensors: ``"global"`` (all are ranked against each other), ``"uniform"``
            (the same share of each), ``"erk"`` (more of small ones), ``"row"`` (the same number of entries of each output
            unit; of a vector as of one row).
        batches: Number of training batches (per rank) shown to a criterion that needs data.
        seed: Seed of random criteria.
        mask: Path of a mask file or a ``MaskSet``, instead of a criterion.
        refresh: Moment between re-selections, e.g. ``"100 steps"``; None: once.
        engine: How tensors are held of which some entries are active. ``"compact"``: the optimizer gets the active entries
            alone, so its state has their size, and ``.grad`` of such a tensor is None after backward. ``"dense"``: the
            gradient stays, with zeros at held entries. ``"auto"``: compact, unless the module or a callback of yours
            has a hook that may read gradients, or optimizes by hand. See "What it costs" in the README.

    Raises:
        ValueError: If an argument is out of range, or nothing would train.

    Example:
        >>> FreezeMask(train="classifier", score="fisher", density=0.005).engine
        'auto'
    """

    def __init__(
        self,
        train: Strings = None,
        *,
        score: str | Callable[..., Any] | None = None,
        density: int | float | dict[str, int | float] | None = None,
        scope: Strings = None,
        structure: str = "entry",
        allocation: str = "global",
        batches: int = 32,
        seed: int = 0,
        mask: str | os.PathLike[str] | MaskSet | None = None,
        refresh: str | None = None,
        engine: str = "auto",
    ) -> None:
        check_engine(engine)
        self.engine = engine
        self.selection = make_selection(
            "FreezeMask",
            train=train,
            score=score,
            density=density,
            scope=scope,
            structure=structure,
            allocation=allocation,
            batches=batches,
            seed=seed,
            mask=mask,
        )
        if self.selection.empty:
            raise ValueError("FreezeMask trains nothing: give it train=, score= and density=, or mask=.")
        self.refresh = parse_refresh(refresh, self.selection, "FreezeMask")
        self.needs_reference, self.own_criterion = may_need_reference(self.selection), has_own(self.selection)
        recipe = {k: v for k, v in self.selection.recipe().items() if k != "batches"}
        self._key = self._generate_state_key(recipe=json.dumps(recipe, sort_keys=True))  # Lightning asks at every hook
        self._draws = self._drawn = self._every = 0

    @property
    def state_key(self) -> str:
        """A key that tells several FreezeMasks apart and does not depend on how entries are held."""
        return self._key

    def check(self, session: Session) -> None:
        """Refuse bad input before training."""
        session.check_selection(self.selection, "FreezeMask")

    def measure(self, run: Run) -> None:
        """Turn ``refresh`` into steps."""
        self._every = refresh_steps(self.refresh, run, "FreezeMask")

    def begin(self, session: Session) -> None:
        """Choose the mask, unless a checkpoint brought it."""
        if not self._restored:
            self._draws, self._drawn = 0, session.step
            self._masks = session.select(self.selection)

    def advance(self, session: Session) -> str | None:
        """Choose anew when ``refresh`` says so."""
        if not draw_due(session.step, self._drawn, self._every):
            return None
        self._draws, self._drawn = self._draws + 1, session.step
        self._masks = session.select(self.selection, self._draws)
        return f"FreezeMask: mask drawn anew at step {session.step}"

    def moved(self, session: Session) -> list[str]:
        """Names of what is ranked anew by the steps of training."""
        return [] if self.refresh is None else moved_by(self.selection, session)

    def done_with_reference(self) -> bool:
        """Whether the mask is chosen, and will not be chosen anew."""
        return not self.needs_reference or self.refresh is None

    def own_state(self) -> dict[str, Any]:
        """Return how often the mask was drawn anew, and at which step last."""
        return {"draws": self._draws, "drawn": self._drawn}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take over the number of draws and the step of the last."""
        self._draws, self._drawn = state["draws"], state["drawn"]


def make_selection(where: str, **arguments: Any) -> Selection:
    """Build a selection from a callback's arguments.

    Raises:
        ValueError: As ``Selection`` does, with ``where`` in front.
    """
    arguments = {key: plain(value) for key, value in arguments.items()}
    try:
        return Selection(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def may_need_reference(selection: Selection) -> bool:
    """Whether the criterion may ask for the weights from the start of training."""
    return selection.score is not None and criteria.may_need_reference(selection.score)


def moved_by(selection: Selection, session: Session) -> list[str]:
    """Names of the tensors that a selection ranks by a sum over the steps of training."""
    if selection.score is None or not criteria.accumulates(selection.score):
        return []
    return selection.scope_names(session.module, session.trainable)


def has_own(selection: Selection) -> bool:
    """Whether the criterion is the user's own."""
    return selection.score is not None and criteria.is_own(selection.score)


def parse_refresh(refresh: str | None, selection: Selection, where: str) -> Moment | None:
    """Read the moment between re-selections.

    Raises:
        ValueError: If it is no moment, or there is no criterion to select by.
    """
    if refresh is None:
        return None
    if selection.score is None:
        raise ValueError(f"{where}: refresh needs a criterion to select anew; give score=, or leave refresh out.")
    return Moment.parse(refresh, f"{where}: refresh")


def refresh_steps(refresh: Moment | None, run: Run, where: str) -> int:
    """Return the optimizer steps between re-selections, 0 for never.

    Raises:
        ValueError: If they are less than one step in this run.
    """
    steps = 0 if refresh is None else max(refresh.steps(run, f"{where}: refresh"), int(run.debug))
    if refresh is not None and steps < 1:
        raise ValueError(f"{where}: refresh={str(refresh)!r} is less than a step in this run.")
    return steps


def draw_due(step: int, drawn: int, every: int) -> bool:
    """Whether a multiple of ``every`` steps lies after the last draw, at ``drawn``, and not after ``step``; 0: never."""
    return every > 0 and step // every > drawn // every
