"""`mask=auto`: short runs on the user's own data choose the strategy, its density and the learning rate.

Each trial trains on the training set less a part that is held out of it, and is judged by the loss on that part, so that the
validation and test figures of the run stay those of data that no choice has seen. All trials begin with the same seed: the
same weights, held-out part and order of batches. The schedule of the learning rate spans a trial's own steps. By which rule
the trials decide: :mod:`lightning_mask.app.halving`.
"""

import copy
import gc
import inspect
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, LearningRateMonitor, ProgressBar
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_mask import FreezeMask
from lightning_mask.app import errors
from lightning_mask.app import train as application
from lightning_mask.app.checks import values
from lightning_mask.app.halving import Amount, Outcome, Setting, decisive, difference, halve, listed, number, pick, rank
from lightning_mask.app.launch import RUN
from lightning_mask.app.summary import write_json
from lightning_mask.app.trials import configs, run_quietly
from lightning_mask.callbacks import RunReport
from lightning_mask.core.allocation import share
from lightning_mask.core.patterns import resolve
from lightning_mask.core.selection import share_out

FILE = "auto.json"
LOSSES = "losses.json"

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_OF_A_LAUNCHER = (
    "RANK",
    "LOCAL_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "SLURM_NTASKS",
)
_NOT_FOR_TRIALS = (Checkpoint, EarlyStopping, LearningRateMonitor, ProgressBar, RunReport)


@dataclass(frozen=True)
class Auto:
    """What is tried, and by which means: the values of ``conf/mask/auto.yaml``.

    Args:
        candidates: Name to ``{"mask": strategy}``, with ``with`` (values over the strategy's own), ``densities`` and ``rates``
            (instead of the common ones; [] leaves the strategy's density alone) where wanted. None leaves one out.
        densities: Tried with each candidate that has a density; shares (float) or numbers (int) of the entries in its scope.
        rates: Learning rates, as multiples of the run's ``lr``; None: that alone.
        budget: What may train at most: a number (int) or a share (float) of the model's entries, or the bytes of the optimizer's
            state that they may take, such as "10 MB"; None: no limit.
        minutes: Time for all trials.
        steps: Optimizer steps of a trial of the first rung.
        eta: The best 1 / eta of a rung go on, for eta times as many steps.
        held_out: Number (int, at most a fifth) or share (float) of the training examples that trials are judged by.
        monitor: Logged figure of the held-out examples that they are judged by.
        mode: "min" or "max".
        batches: Training batches shown to each criterion; None: as the candidates say.
        seed: Of the trials and of what is held out.

    Raises:
        ValueError: If a value is out of range, or there is no candidate.
    """

    candidates: dict[str, dict[str, Any] | None]
    densities: list[Amount]
    rates: list[float] | None
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
        for name, least in (("minutes", 0.0), ("steps", 1), ("eta", 2), ("held_out", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")


_KEYS = {"mask", "with", "densities", "rates"}


class HeldOut(Callback):
    """Write what ``validation_step`` returned of each example into a file: ``losses``, [batch], and ``weights``, if any.

    Args:
        path: The file, JSON.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._found: dict[str, list[float]] = {"losses": [], "weights": []}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        self._found = {"losses": [], "weights": []}

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep a batch's losses."""
        if isinstance(outputs, Mapping) and isinstance(outputs.get("losses"), Tensor):
            losses = outputs["losses"].detach().double().flatten()
            weights = outputs.get("weights")
            self._found["losses"] += losses.tolist()
            self._found["weights"] += [1.0] * len(losses) if weights is None else weights.double().flatten().tolist()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        write_json(self.path, dict(self._found))


def choose(cfg: DictConfig) -> DictConfig:
    """Return the config of the run with the strategy, its density and the rate that trials found best; say why.

    The first rank finds out and writes ``auto.json`` into the run's folder; the others read it, and so does a run that goes
    on from a checkpoint (which looks into the folder that the checkpoint is in).

    Args:
        cfg: The composed root config; its ``mask`` is an :class:`Auto`.

    Returns:
        A copy with another ``mask`` and ``lr``, and with ``auto``: a summary of the choice.

    Raises:
        ValueError: If no candidate fits the budget or can be trained, or the time is too short.
        FileNotFoundError: If a run goes on, and the choice that it began with is missing.
    """
    auto = instantiate(cfg.mask)
    file = Path(cfg.paths.output_dir) / FILE
    token = os.environ.get(RUN, "")
    if not _is_first():
        return _with_choice(cfg, wait_for(file, token, 180 * auto.minutes + 600))
    record = _before(cfg)
    if record is None:
        record = _find(cfg, auto)
    else:
        rank_zero_info(f"mask=auto was decided before: {record['choice']['reason']}")
    write_json(file, {**record, "run": token})
    return _with_choice(cfg, json.loads(file.read_text(encoding="utf-8")))


def wait_for(file: Path, token: str, seconds: float) -> dict[str, Any]:
    """Return the choice of the first rank, once it is there.

    Args:
        file: Where the first rank writes it.
        token: What tells this launch from an earlier one in the same folder.
        seconds: How long to wait.

    Raises:
        TimeoutError: If it does not come.
    """
    until = time.monotonic() + seconds
    while True:
        if file.exists():
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            if record.get("run") == token:
                return record
        if time.monotonic() > until:
            raise TimeoutError(
                f"mask=auto: the first rank wrote no {file} within {seconds:.0f} s: all ranks need one folder that they share."
            )
        time.sleep(0.2)


def _is_first() -> bool:
    return all(
        os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
    )


def _before(cfg: DictConfig) -> dict[str, Any] | None:
    """The choice that the checkpoint to go on from was trained with; None: there is none to go on from."""
    path = cfg.ckpt_path
    if path is None:
        return None
    folder = Path(cfg.paths.output_dir) if path == "last" else Path(path).parent.parent
    if (folder / FILE).exists():
        record: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        return record
    if path == "last" and not (folder / "checkpoints" / "last.ckpt").exists():
        return None
    raise FileNotFoundError(
        f"ckpt_path={path} has no {folder / FILE} that says what mask=auto chose: name the strategy with mask=..."
    )


def _with_choice(cfg: DictConfig, record: dict[str, Any]) -> DictConfig:
    made = copy.deepcopy(cfg)
    choice = dict(record["choice"])
    with open_dict(made):
        made.mask = choice.pop("mask")
        if choice["lr"] is not None:
            made.lr = choice["lr"]
        made.auto = choice
    return made


def _find(cfg: DictConfig, auto: Auto) -> dict[str, Any]:
    started = time.time()
    if auto.rates is not None and not _uses_lr(cfg):
        raise ValueError(
            "mask=auto finds the learning rate by way of lr=..., which no part of this config asks for: give lr=... in place "
            "of optimizer.lr=..., or mask.rates=null to leave it alone."
        )
    if cfg.data.get("hold_out") is not None:
        raise ValueError(
            f"data.hold_out={cfg.data.hold_out} and mask=auto exclude each other: mask.held_out says what trials are judged by."
        )
    shutil.rmtree(Path(cfg.paths.output_dir) / "auto", ignore_errors=True)  # of a choice that was not finished
    with _alone():
        data: LightningDataModule = instantiate(cfg.data)
        # of a copy: instantiating resolves what the block refers to, in place, and so would fix the optimizer's rate
        settings, left_out = _settings(cfg, auto, application._model(copy.deepcopy(cfg), data))
        held_out = _hold_out(cfg, auto, data)
        del data
        most = _bytes(auto.budget)

        def run(setting: Setting, steps: int) -> Outcome:
            folder = Path(cfg.paths.output_dir) / "auto" / f"{steps:06d}-{settings.index(setting):03d}"
            made = _trial(cfg, auto, setting, steps, held_out, folder)
            result = run_quietly(made, folder)
            gc.collect()
            return _outcome(auto, setting, steps, result, folder, most)

        where = "of the training set" if held_out is not None else "of the validation set"
        rank_zero_info(f"mask=auto: {len(settings)} settings to try, in {auto.minutes:g} minutes at most")
        rungs, untried = halve(
            settings,
            run,
            steps=auto.steps,
            eta=auto.eta,
            mode=auto.mode,
            minutes=auto.minutes,
            longest=_steps(cfg),
            started=started,
        )
    left_out += [{"name": s.name, "why": "there was no time: raise mask.minutes, or lower mask.steps"} for s in untried]
    record = _record(auto, cfg, rungs, left_out, where, time.time() - started)
    _show(record, auto)
    return record


# What is tried


def _settings(cfg: DictConfig, auto: Auto, model: LightningModule) -> tuple[list[Setting], list[dict[str, str]]]:
    """All settings within the budget, the first of each candidate first, and what is left out, with the reason."""
    limit = _limit(auto.budget, cfg, model)
    lists: list[list[Setting]] = []
    left_out: list[dict[str, str]] = []
    over: dict[str, int] = {}
    for name, candidate in auto.candidates.items():
        if candidate is None:
            continue
        try:
            found, too_large = _settings_of(name, candidate, cfg, auto, model, limit)
        except Exception as error:
            left_out.append({"name": name, "why": errors.explain(error)})
            continue
        lists.append(found)
        for label, entries in too_large.items():
            over[label] = entries
            left_out.append({"name": label, "why": f"{entries:,} entries are more than the budget of {limit:,}"})
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


def _settings_of(
    name: str, candidate: Mapping[str, Any], cfg: DictConfig, auto: Auto, model: LightningModule, limit: int | None
) -> tuple[list[Setting], dict[str, int]]:
    block = _strategy(candidate["mask"])
    for key, value in (candidate.get("with") or {}).items():
        if key not in block:
            raise ValueError(f"mask={candidate['mask']} has no value {key!r}: it has {', '.join(block)}.")
        block[key] = value
    if auto.batches is not None and "batches" in block:
        block["batches"] = auto.batches
    own = block.get("density")
    densities: list[Any] = [None]
    if isinstance(own, int | float):
        densities = _or(candidate.get("densities"), auto.densities) or [own]
    rates = _or(candidate.get("rates"), auto.rates) or [None]
    counted = {d: _entries(_made(block, d, cfg), model) for d in densities}
    fitting = {d: n for d, n in counted.items() if limit is None or n is None or n <= limit}
    if limit is not None and densities != [None] and len(fitting) < len(counted):
        fitting |= _filling(block, cfg, model, limit, counted)
    too_large = {} if fitting else {f"{name} {d:g}" if d is not None else name: n or 0 for d, n in counted.items()}
    grid = [(i + j, d, r) for i, d in enumerate(fitting) for j, r in enumerate(rates)]
    return [
        Setting(name, d, None if r is None else float(f"{cfg.lr * r:.6g}"), fitting[d], _with_density(block, d))
        for _, d, r in sorted(grid, key=lambda row: row[0])
    ], too_large


def _filling(
    block: dict[str, Any], cfg: DictConfig, model: LightningModule, limit: int, counted: Mapping[Any, int | None]
) -> dict[int, int | None]:
    """The density, as a number of entries, that fills the budget, where the listed ones exceed it."""
    whole = _entries(_made({**block, "score": None, "scope": None}, None, cfg), model) if block.get("train") else 0
    rest = limit - (whole or 0)
    if rest < 1:
        return {}
    entries = _entries(_made(block, rest, cfg), model)
    return {rest: entries} if entries is not None and entries <= limit and entries not in counted.values() else {}


def _or(own: Any, common: Any) -> list[Any]:
    return list(own if own is not None else common if common is not None else [])


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


def _with_density(block: dict[str, Any], density: Any) -> dict[str, Any]:
    return block if density is None else {**block, "density": density}


def _made(block: dict[str, Any], density: Any, cfg: DictConfig) -> Any:
    """The callback of a block; None: no callback."""
    root = copy.deepcopy(cfg)
    with open_dict(root):
        root.mask = {**block, "density": density} if "density" in block else block
    return None if root.mask.get("_target_") is None else instantiate(root.mask)


def _entries(callback: Any, model: nn.Module) -> int | None:
    """How many entries a callback lets train, from its patterns and shares alone; None: that takes a run."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if callback is None:
        return sum(p.numel() for p in parameters.values())
    if not isinstance(callback, FreezeMask):
        return None
    selection = callback.selection
    selection.check(model)
    if selection.mask is not None:
        return selection.given(model).count()
    whole = sum(model.get_parameter(name).numel() for name in resolve(selection.train, model, "train"))
    names = selection.scope_names(model)
    if not names:
        return whole
    shapes = {name: tuple(model.get_parameter(name).shape) for name in names}
    groups = share_out(shapes, selection.budgets(model), selection.structure, selection.allocation, model)
    return whole + sum(keep for _, keep in groups)


def _limit(budget: Any, cfg: DictConfig, model: nn.Module) -> int | None:
    """The budget as a number of entries."""
    if budget is None:
        return None
    total = sum(p.numel() for p in model.parameters())
    if isinstance(budget, str):
        each = _bytes_of_an_entry(cfg)
        # What is held densely (a tensor most of whose entries train) takes state for all of its entries: a tenth is for that.
        limit = min(total, int(0.9 * (_bytes(budget) or 0) / each)) if each else total
    else:
        limit = share(budget, total) if isinstance(budget, float) and 0 < budget <= 1 else budget
    if not isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"mask.budget={budget!r} must be a number of entries from 1, a share in (0, 1], or bytes such as '10 MB'."
        )
    return limit


def _bytes(budget: Any) -> int | None:
    """The budget in bytes; None where it is of entries.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(budget, str):
        return None
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMG]?I?B)\s*", budget.upper())
    if not found:
        raise ValueError(f"mask.budget={budget!r} must be bytes such as '10 MB', or a number or share of entries.")
    return int(float(found[1]) * _UNITS[found[2]])


def _bytes_of_an_entry(cfg: DictConfig) -> float:
    """Bytes of state that the optimizer keeps for an entry, from one step of it."""
    if cfg.get("optimizer") is None:
        raise ValueError("A budget in bytes needs to know the optimizer: give optimizer=..., or the budget in entries.")
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros(4096)
    optimizer = instantiate(cfg.optimizer)([parameter])
    optimizer.step()
    tensors = [v for v in optimizer.state[parameter].values() if isinstance(v, Tensor) and v.numel() > 1]
    return sum(t.numel() * t.element_size() for t in tensors) / 4096


def _uses_lr(cfg: DictConfig) -> bool:
    return any(re.search(r"\$\{(oc\.select:)?lr\b", str(node._value())) for _, node in values(cfg))


# One trial


def _hold_out(cfg: DictConfig, auto: Auto, data: LightningDataModule) -> Amount | None:
    """How much to hold out of the training set; None: the data module cannot."""
    target = get_object(cfg.data._target_)
    if "hold_out" not in inspect.signature(target).parameters:
        rank_zero_info(
            f"mask=auto: {cfg.data._target_} takes no hold_out, so that the trials are judged by its validation set, and the "
            "run's validation figures are of data that a choice has seen"
        )
        return None
    size = getattr(data, "sizes", {}).get("train")
    if isinstance(auto.held_out, int) and size is not None:
        return min(auto.held_out, max(1, size // 5))
    return auto.held_out


def _steps(cfg: DictConfig) -> int | None:
    steps = cfg.trainer.get("max_steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def _trial(
    cfg: DictConfig, auto: Auto, setting: Setting, steps: int, held_out: Amount | None, folder: Path
) -> DictConfig:
    """The run's config for a short run of one setting in one process."""
    made = copy.deepcopy(cfg)
    devices, every = cfg.trainer.get("devices"), cfg.trainer.get("accumulate_grad_batches") or 1
    with open_dict(made):
        made.mask = setting.mask
        if setting.lr is not None:
            made.lr = setting.lr
        made.seed, made.train, made.test, made.ckpt_path, made.logger = auto.seed, True, False, None, {}
        made.paths.output_dir = str(folder)
        if held_out is not None:
            made.data.hold_out = held_out
        made.callbacks = {n: b for n, b in (cfg.get("callbacks") or {}).items() if _goes_on(b)} | {
            "report": {"_target_": "lightning_mask.callbacks.RunReport", "dirpath": None, "check_held": False},
            "held_out": {"_target_": "lightning_mask.app.auto.HeldOut", "path": str(folder / LOSSES)},
        }
        made.trainer.update(
            {
                "max_steps": steps,
                "max_epochs": -1,
                "min_steps": None,
                "min_epochs": None,
                "max_time": None,
                "val_check_interval": steps * every,
                "check_val_every_n_epoch": None,
                "limit_val_batches": cfg.trainer.get("limit_val_batches") or None,
                "num_sanity_val_steps": 0,
                "devices": list(devices[:1]) if isinstance(devices, ListConfig) else 1,
                "num_nodes": 1,
                "strategy": "auto",
                "plugins": None,
                "profiler": None,
                "sync_batchnorm": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "model_registry": None,
            }
        )
    return made


def _goes_on(block: Any) -> bool:
    """Whether a callback is part of how the user trains, and not of how a person follows a run."""
    target = block.get("_target_") if isinstance(block, DictConfig) else None
    made = get_object(target) if target is not None else None
    return made is not None and not (isinstance(made, type) and issubclass(made, _NOT_FOR_TRIALS))


def _outcome(
    auto: Auto, setting: Setting, steps: int, result: dict[str, Any], folder: Path, most: int | None
) -> Outcome:
    score, error, facts = result["metrics"].get(auto.monitor), result["error"], result["mask"]
    if error is None and auto.monitor not in result["metrics"]:
        error = f"{auto.monitor} was not logged; there are {', '.join(sorted(result['metrics']))}"
    elif error is None and (score is None or not math.isfinite(score)):
        score, error = None, f"{auto.monitor} is not finite"
    size = facts.get("optimizer_bytes")
    if most is not None and size is not None and size > most:
        score, error = None, f"{size:,} bytes of optimizer state are more than the budget of {most:,}"
    return Outcome(
        setting=setting,
        steps=steps,
        score=score,
        error=error,
        seconds=result["wall_seconds"],
        entries=facts.get("active"),
        optimizer_bytes=size,
        seconds_per_step=facts.get("seconds_per_step", 0.0),
        losses=_losses(folder / LOSSES) if error is None else None,
        folder=f"{folder.parent.name}/{folder.name}",
    )


def _losses(file: Path) -> tuple[Tensor, Tensor] | None:
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if not content.get("losses") or None in content["losses"]:
        return None
    return torch.tensor(content["losses"], dtype=torch.float64), torch.tensor(content["weights"], dtype=torch.float64)


@contextmanager
def _alone() -> Iterator[None]:
    """Hide the launcher of several processes: a trial runs in this one alone."""
    before = {name: os.environ.pop(name) for name in _OF_A_LAUNCHER if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


# What is said of them


def _record(
    auto: Auto,
    cfg: DictConfig,
    rungs: Sequence[Sequence[Outcome]],
    left_out: list[dict[str, str]],
    held_out: str,
    seconds: float,
) -> dict[str, Any]:
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
        "left_out": left_out,
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


def _show(record: dict[str, Any], auto: Auto) -> None:
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
        names = [row["name"] for row in record["left_out"] if row["why"] == why]
        shown = names if len(names) < 5 else [*names[:3], f"{len(names) - 3} more"]
        print(f"left out: {listed(shown)}: {why}")
    print(f"mask=auto chose {record['choice']['reason']} It took {record['seconds']:.0f} s.")
