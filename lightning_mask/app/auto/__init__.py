"""`mask=auto`: short runs on the user's own data choose the strategy, its density and the learning rate.

Each trial trains on the training set less a part that is held out of it, and is judged by the loss on that part, so that the
validation and test figures of the run stay those of data that no choice has seen. All trials begin with the same seed: the
same weights, held-out part and order of batches. The schedule of the learning rate spans a trial's own steps.

In the order of the work: ``settings`` (what is tried), within a ``budget``; ``trial`` (one short run), ``halving`` (by which
rule the trials decide) and ``account`` (what is written and shown of them).
"""

import copy
import gc
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, open_dict

from lightning_mask.app.auto.account import make_record, show
from lightning_mask.app.auto.halving import Outcome, Setting, halve, widen
from lightning_mask.app.auto.settings import Auto, all_settings, uses_lr
from lightning_mask.app.auto.trial import HeldOut, alone, hold_out, outcome_of, run_length, trial_config
from lightning_mask.app.launch import RUN
from lightning_mask.app.newest import NEWEST
from lightning_mask.app.parts import make_model
from lightning_mask.app.ranks import is_first
from lightning_mask.app.summary import write_json
from lightning_mask.app.trials import digest, run_quietly
from lightning_mask.callbacks.signals import told

__all__ = ["CHOICE", "Auto", "HeldOut", "choose", "wait_for"]

CHOICE = "auto.json"
"""In a run's folder: the choice, and the trials that it follows from."""
_UNFINISHED = "auto_trials.json"
"""Results of the trials of a choice that is not made yet, by the digest of a trial's config."""


def choose(cfg: DictConfig) -> DictConfig:
    """Return the config of the run with the strategy, its density and the rate that trials found best; say why.

    The first rank finds out and writes ``auto.json`` into the run's folder; the others read it, and so does a run that goes
    on from a checkpoint (which looks into the folder that the checkpoint is in). As each trial ends, ``auto_trials.json`` there
    gets its result, until the choice is made: a run that is killed before takes up, in the same folder, what was tried.

    Args:
        cfg: The composed root config; its ``mask`` is an :class:`Auto`.

    Returns:
        A copy with another ``mask`` and ``lr``, and with ``auto``: a summary of the choice.

    Raises:
        ValueError: If no candidate fits the budget or can be trained, or the time is too short.
        FileNotFoundError: If a run goes on, and the choice that it began with is missing.
    """
    auto = instantiate(cfg.mask)
    file = Path(cfg.paths.output_dir) / CHOICE
    token = os.environ.get(RUN, "")
    if not is_first():
        return _with_choice(cfg, wait_for(file, token, 180 * auto.minutes + 600))
    record = _before(cfg)
    if record is None:
        record = _find(cfg, auto)
    else:
        rank_zero_info(f"mask=auto was decided before: {record['choice']['reason']}")
    write_json(file, {**record, "run": token})
    file.with_name(_UNFINISHED).unlink(missing_ok=True)
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
        if told():  # the first rank stops, too, and asks for the requeue
            sys.exit(75)
        if time.monotonic() > until:
            raise TimeoutError(
                f"mask=auto: the first rank wrote no {file} within {seconds:.0f} s: all ranks need one folder that they share."
            )
        time.sleep(0.2)


def _before(cfg: DictConfig) -> dict[str, Any] | None:
    """The choice that the checkpoint to go on from was trained with; None: there is none to go on from."""
    path = cfg.ckpt_path
    if path is None:
        return None
    folder = Path(cfg.paths.output_dir) if path in NEWEST else Path(path).parent.parent
    if (folder / CHOICE).exists():
        record: dict[str, Any] = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        return record
    if path in NEWEST and not list((folder / "checkpoints").glob("*.ckpt")):
        return None
    raise FileNotFoundError(
        f"ckpt_path={path} has no {folder / CHOICE} that says what mask=auto chose: name the strategy with mask=..."
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
    started, earlier = time.time(), 0.0
    if auto.rates is not None and not uses_lr(cfg):
        raise ValueError(
            "mask=auto finds the learning rate by way of lr=..., which no part of this config asks for: give lr=... in place "
            "of optimizer.lr=..., or mask.rates=null to leave it alone."
        )
    if cfg.data.get("hold_out") is not None:
        raise ValueError(
            f"data.hold_out={cfg.data.hold_out} and mask=auto exclude each other: mask.held_out says what trials are judged by."
        )
    unfinished, trials = Path(cfg.paths.output_dir) / _UNFINISHED, Path(cfg.paths.output_dir) / "auto"
    done = _interrupted(unfinished)
    if not done:
        shutil.rmtree(trials, ignore_errors=True)  # of another choice
    with alone():
        data: LightningDataModule = instantiate(cfg.data)
        # of a copy: instantiating resolves what the block refers to, in place, and so would fix the optimizer's rate
        settings, left_out = all_settings(cfg, auto, make_model(copy.deepcopy(cfg), data))
        held_out = hold_out(cfg, auto, data)
        longest = run_length(cfg, data)
        del data

        def run(setting: Setting, steps: int) -> Outcome:
            nonlocal earlier
            if setting not in settings:
                settings.append(setting)
            folder = trials / f"{steps:06d}-{settings.index(setting):03d}"
            config = trial_config(cfg, auto, setting, steps, held_out, folder)
            key = digest(config)
            if key in done and folder.is_dir():
                earlier += done[key]["wall_seconds"]
                return outcome_of(auto, setting, steps, done[key], folder)
            done.pop(key, None)
            shutil.rmtree(folder, ignore_errors=True)  # of a trial that was killed
            result = run_quietly(config, folder)
            if result["error"] is None:  # one that failed is tried again
                done[key] = result
                write_json(unfinished, done)
            gc.collect()
            return outcome_of(auto, setting, steps, result, folder)

        def passed() -> float:
            return earlier + time.time() - started

        where = "of the training set" if held_out is not None else "of the validation set"
        rank_zero_info(f"mask=auto: {len(settings)} settings to try, in {auto.minutes:g} minutes at most")
        rungs, no_time = halve(
            settings,
            run,
            steps=auto.steps,
            eta=auto.eta,
            mode=auto.mode,
            minutes=auto.minutes,
            longest=longest,
            passed=passed,
        )
        widen(rungs, run, most=auto.widen, mode=auto.mode, minutes=auto.minutes, passed=passed)
    record = make_record(auto, cfg, rungs, no_time, left_out, where, passed())
    show(record, auto)
    return record


def _interrupted(unfinished: Path) -> dict[str, dict[str, Any]]:
    """The results of the trials of a choice that was interrupted in this folder, by the digests of their configs."""
    if not unfinished.exists():
        return {}
    done: dict[str, dict[str, Any]] = json.loads(unfinished.read_text(encoding="utf-8"))
    rank_zero_info(
        f"mask=auto: a choice was interrupted here: its trials in {unfinished} ({len(done)}) are not run again"
    )
    return done
