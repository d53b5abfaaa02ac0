"""What is tried: candidates, each at densities and learning rates, within the budget."""

import copy
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mask.app import errors
from lightning_mask.app.auto.budget import entries, limit_of
from lightning_mask.app.auto.halving import Amount, Setting
from lightning_mask.app.checks import values
from lightning_mask.app.trials import configs

_KEYS = {"mask", "with", "densities", "rates"}


@dataclass(frozen=True)
class Auto:
    """What is tried, and by which means: the values of ``conf/mask/auto.yaml``.

    Args:
        candidates: Name to ``{"mask": strategy}``, with ``with`` (values over the strategy's own), ``densities`` and ``rates``
            (instead of the common ones; [] leaves the strategy's density alone) where wanted. None leaves one out.
        densities: Tried with each candidate that has a density; shares (float) or numbers (int) of the entries in its scope.
        rates: Learning rates, as multiples of the run's ``lr``; None: that alone.
        widen: Further rates that are tried at most where the best one lies at an end.
        budget: What may train at most: a number (int) or a share (float) of the model's entries, or the bytes of the optimizer's
            state that they may take, such as "10 MB"; None: no limit.
        minutes: Time for all trials.
        steps: Optimizer steps of a trial of the first rung.
        eta: The best 1 / eta of a rung go on, for eta times as many steps.
        held_out: Number (int, at most a fifth) or share (float) of the training examples that trials are judged by.
        monitor: Logged figure of the held-out examples that they are judged by.
        mode: "min" or "max".
        batches: Training batches shown to each criterion, where a candidate does not say so itself; None: as the strategies say.
        seed: Of the trials and of what is held out.

    Raises:
        ValueError: If a value is out of range, or there is no candidate.
    """

    candidates: dict[str, dict[str, Any] | None]
    densities: list[Amount]
    rates: list[float] | None
    widen: int
    budget: int | float | str | None
    minutes: float
    steps: int
    eta: int
    held_out: int | float
    monitor: str
    mode: str
    batches: int | None
    seed: int

    def __post_init__(self) -> None:
        for name, candidate in (self.candidates or {}).items():
            if candidate is not None and (not candidate.get("mask") or set(candidate) - _KEYS):
                raise ValueError(f"candidates.{name}={candidate} must have {', '.join(sorted(_KEYS))}, at least mask.")
        if not any((self.candidates or {}).values()):
            raise ValueError("candidates is empty: name strategies, such as {fisher: {mask: fisher}}.")
        if self.mode not in ("min", "max"):
            raise ValueError(f"mode={self.mode!r} must be min or max.")
        for name, least in (("minutes", 0.0), ("steps", 1), ("eta", 2), ("widen", 0), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


def uses_lr(cfg: DictConfig) -> bool:
    """Return whether any part of a config asks for the root's ``lr``."""
    return any(re.search(r"\$\{(oc\.select:)?lr\b", str(node._value())) for _, node in values(cfg))


def all_settings(cfg: DictConfig, auto: Auto, model: LightningModule) -> tuple[list[Setting], list[dict[str, str]]]:
    """Return all settings within the budget, the first of each candidate first, and what is left out, with the reason.

    Args:
        cfg: The composed root config.
        auto: What to try.
        model: The run's.

    Raises:
        ValueError: If nothing is left to try, or the budget is no budget.
    """
    limit = limit_of(auto.budget, cfg, model)
    lists: list[list[Setting]] = []
    left_out: list[dict[str, str]] = []
    over: dict[str, int] = {}
    for name, candidate in auto.candidates.items():
        if candidate is None:
            continue
        try:
            found, too_large = _of_candidate(name, candidate, cfg, auto, model, limit)
        except Exception as error:
            left_out.append({"name": name, "why": errors.explain(error)})
            continue
        lists.append(found)
        for label, size in too_large.items():
            over[label] = size
            left_out.append({"name": label, "why": f"{size:,} entries are more than the budget of {limit:,}"})
    longest = max(map(len, lists), default=0)
    settings = [mine[place] for place in range(longest) for mine in lists if place < len(mine)]
    if not settings and over:
        least = min(over, key=lambda label: over[label])
        raise ValueError(
            f"mask.budget={auto.budget} ({limit:,} entries) is less than any candidate needs: {least} trains "
            f"{over[least]:,}. What always trains ({cfg.get('head', 'the head')}) is among them. Raise the budget."
        )
    if not settings:
        reasons = "; ".join(f"{row['name']}: {row['why']}" for row in left_out)
        raise ValueError(f"mask=auto: no candidate can be tried ({reasons}).")
    return settings, left_out


def _of_candidate(
    name: str, candidate: Mapping[str, Any], cfg: DictConfig, auto: Auto, model: LightningModule, limit: int | None
) -> tuple[list[Setting], dict[str, int]]:
    block = _strategy(candidate["mask"])
    for key, value in (candidate.get("with") or {}).items():
        if key not in block:
            raise ValueError(f"mask={candidate['mask']} has no value {key!r}: it has {', '.join(block)}.")
        block[key] = value
    if auto.batches is not None and "batches" in block and "batches" not in (candidate.get("with") or {}):
        block["batches"] = auto.batches
    own = block.get("density")
    densities: list[Any] = [None]
    if isinstance(own, int | float):
        densities = _or(candidate.get("densities"), auto.densities) or [own]
    rates = _or(candidate.get("rates"), auto.rates) or [None]
    counted = {d: _count(block, d, cfg, model) for d in densities}
    fitting = {d: n for d, n in counted.items() if limit is None or n is None or n <= limit}
    if limit is not None and densities != [None] and len(fitting) < len(counted):
        fitting |= _filling(block, cfg, model, limit, counted)
    too_large = {} if fitting else {f"{name} {d:g}" if d is not None else name: n or 0 for d, n in counted.items()}
    grid = [(i + j, d, r) for i, d in enumerate(fitting) for j, r in enumerate(rates)]
    return [
        Setting(
            name,
            d,
            None if r is None else float(f"{cfg.lr * r:.6g}"),
            fitting[d],
            block if d is None else {**block, "density": d},
        )
        for _, d, r in sorted(grid, key=lambda row: row[0])
    ], too_large


def _filling(
    block: dict[str, Any], cfg: DictConfig, model: LightningModule, limit: int, counted: Mapping[Any, int | None]
) -> dict[int, int | None]:
    """The density, as a number of entries, that fills the budget, where the listed ones exceed it."""
    whole = _count({**block, "score": None, "scope": None}, None, cfg, model) if block.get("train") else 0
    rest = limit - (whole or 0)

    def count(number: int) -> int:
        return _count(block, number, cfg, model) or 0

    if (
        rest >= 1 and count(rest) > limit
    ):  # units larger than an entry come nearest to more: the largest number that fits
        rest = bisect_right(range(1, rest), limit, key=count)
    filling = count(rest) if rest >= 1 else 0
    return {rest: filling} if filling and filling not in counted.values() else {}


def _or(own: Any, common: Any) -> list[Any]:
    return list(own if own is not None else common if common is not None else [])


def _count(block: dict[str, Any], density: Any, cfg: DictConfig, model: LightningModule) -> int | None:
    """How many entries a block lets train; None: that takes a run."""
    root = copy.deepcopy(cfg)
    with open_dict(root):
        root.mask = {**block, "density": density} if "density" in block else block
    return entries(None if root.mask.get("_target_") is None else instantiate(root.mask), model)


def _strategy(name: str) -> dict[str, Any]:
    """The block of a strategy, not resolved."""
    with configs():
        root = HydraConfig.get().job.config_name if HydraConfig.initialized() else "train"
        words = [f"mask={name}"]
        if HydraConfig.initialized():
            words += [w for w in HydraConfig.get().overrides.hydra if w.lstrip("+").startswith("hydra.searchpath=")]
        block = OmegaConf.to_container(hydra.compose(root, overrides=words).mask, resolve=False)
    assert isinstance(block, dict)
    return {str(key): value for key, value in block.items()}
