"""Many runs of the training application, one after another in this process or through a launcher, each done once."""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from lightning_mask.app import errors
from lightning_mask.app import train as application
from lightning_mask.app.launch import config_path, one_job, subcommand
from lightning_mask.app.summary import write_json

RESULT = "trial.json"
OUTPUT = "output.txt"
# What a person looks at while one run goes on, and what a run can be resumed from, are of no use to many short ones.
QUIET = ("callbacks=report", "logger=none", "delta=false", "report=false")


@dataclass(frozen=True)
class Trial:
    """One run of the training application.

    Args:
        overrides: Words of its command line, after ``QUIET``.
        folder: Its own; it is emptied before the run.
    """

    overrides: tuple[str, ...]
    folder: Path

    @property
    def words(self) -> list[str]:
        """All words of its command line."""
        return [*QUIET, *self.overrides]


def run_trials(
    trials: Sequence[Trial],
    *,
    launcher: DictConfig | None = None,
    retry_failed: bool = False,
    told: Callable[[Trial, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Run trials that have no result yet, and return the results of all.

    A result is the trial's ``summary.json`` (:func:`lightning_mask.app.summary.summarise`), with ``folder``, ``wall_seconds``
    and ``error``: None, or in one line why there is nothing else in it. It counts as long as the trial's overrides compose
    to the same config, apart from paths. A trial that fails leaves its error as a result; one that is interrupted, none.
    What a trial prints goes to ``output.txt`` in its folder. The basic launcher runs trials in this process, where the
    libraries are imported already.

    Args:
        trials: Each with a folder of its own.
        launcher: The ``hydra.launcher`` block of a composed config; None: the basic one.
        retry_failed: Run those again whose result is an error.
        told: Called with each trial that was run, and its result: after each with the basic launcher, after all with
            another.

    Raises:
        ValueError: If two trials share a folder, or words cannot be composed.
    """
    if len({trial.folder.resolve() for trial in trials}) < len(trials):
        raise ValueError("Two trials share a folder: give each its own.")
    if not trials:
        return []
    with configs() as loader:
        master = _master(loader, trials, launcher)
        results = [_stored(trial, loader, master, retry_failed) for trial in trials]
        open_ones = [index for index, result in enumerate(results) if result is None]
        for group in [[i] for i in open_ones] if is_basic(launcher) else [open_ones] if open_ones else []:
            for index in group:
                shutil.rmtree(trials[index].folder, ignore_errors=True)
            _launch(loader, master, [trials[index] for index in group])
            for index in group:
                results[index] = result = _read(trials[index].folder) or _lost(trials[index])
                if told is not None:
                    told(trials[index], result)
    return [_public(result) for result in results if result is not None]


def stored(trials: Sequence[Trial], *, retry_failed: bool = False) -> list[dict[str, Any] | None]:
    """Return the results of trials that have one, as :func:`run_trials` does, and None for the others."""
    if not trials:
        return []
    with configs() as loader:
        master = _master(loader, trials, None)
        found = [_stored(trial, loader, master, retry_failed) for trial in trials]
    return [None if result is None else _public(result) for result in found]


def is_basic(launcher: DictConfig | None) -> bool:
    """Whether a launcher runs one job after another in this process."""
    return launcher is None or str(launcher.get("_target_")).endswith(".BasicLauncher")


def do_trial(cfg: DictConfig) -> None:
    """Run the application inside a job of a launcher; leave ``trial.json``, whatever comes of it."""
    argv = sys.argv
    # Further processes of the run, which Lightning starts with this command line, are of the application.
    sys.argv = [str(application.__file__), *argv[1 + len(subcommand(argv)) :]]
    try:
        run_quietly(cfg, Path(HydraConfig.get().runtime.output_dir))
    finally:
        sys.argv = argv


def run_quietly(cfg: DictConfig, folder: Path) -> dict[str, Any]:
    """Run the application on a composed config; leave ``trial.json``, and what it prints, in a folder.

    Args:
        cfg: The config; its own folder is ``folder``.
        folder: Where to; it is made where it is missing.

    Returns:
        The result, as :func:`run_trials` describes it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    started, config = time.time(), digest(cfg)
    error = None
    with (folder / OUTPUT).open("w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            with _logs_to(file), one_job():
                application.train(cfg)
        except Exception as failure:
            traceback.print_exc()
            error = f"{type(failure).__name__}: {errors.explain(failure)}"
    summary = folder / "summary.json"
    result = json.loads(summary.read_text()) if error is None else {"metrics": {}, "mask": {}, "seconds": {}}
    result |= {"error": error, "digest": config, "wall_seconds": time.time() - started}
    write_json(folder / RESULT, result)
    return {**_public(result), "folder": str(folder)}


def digest(cfg: DictConfig) -> str:
    """Return a hash of what a composed config makes of a run.

    Without paths, names, tags and the page; and without what is null, so that a new key of the configs, which as a rule changes
    nothing while it is null, does not make old results worthless.
    """
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    made = {name: value for name, value in content.items() if name not in ("paths", "task_name", "tags", "report")}
    return hashlib.sha256(json.dumps(_said(made), sort_keys=True, default=str).encode()).hexdigest()


def _said(node: Any) -> Any:
    if isinstance(node, dict):
        return {str(name): _said(value) for name, value in node.items() if value is not None}
    return [_said(value) for value in node] if isinstance(node, list) else node


@contextmanager
def _logs_to(file: TextIO) -> Iterator[None]:
    """Send what loggers would print to a file instead."""
    loggers = [logging.getLogger(name) for name in ("", "lightning", "lightning.pytorch", "lightning.fabric")]
    screens = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    before = [handler.setStream(file) for handler in screens]
    try:
        yield
    finally:
        for handler, stream in zip(screens, before, strict=True):
            if stream is not None:
                handler.setStream(stream)


@contextmanager
def configs() -> Iterator[ConfigLoader]:
    """Yield what composes configs: that of the command line, where there is one, with the folders that were added to it."""
    if GlobalHydra.instance().is_initialized():
        yield GlobalHydra.instance().config_loader()
        return
    place = config_path()
    module = place.removeprefix("pkg://")
    how = (
        initialize_config_dir(place, version_base="1.3")
        if module == place
        else initialize_config_module(module, version_base="1.3")
    )
    with how:
        yield GlobalHydra.instance().config_loader()


def _master(loader: ConfigLoader, trials: Sequence[Trial], launcher: DictConfig | None) -> DictConfig:
    """Compose what a sweeper would give to a launcher: the application's config, before the words of any job."""
    base = os.path.commonpath([trial.folder.resolve().parent for trial in trials])
    words = ["hydra.mode=MULTIRUN", "hydra/hydra_logging=none", f"hydra.sweep.dir={_quoted(base)}"]
    if HydraConfig.initialized():
        words += [w for w in HydraConfig.get().overrides.hydra if w.lstrip("+").startswith("hydra.searchpath=")]
    master = loader.load_configuration("train", overrides=words, run_mode=RunMode.MULTIRUN)
    if launcher is not None:
        with open_dict(master):
            master.hydra.launcher = launcher
    return master


def _words(trial: Trial, master: DictConfig) -> list[str]:
    subdir = os.path.relpath(trial.folder.resolve(), master.hydra.sweep.dir)
    return [*trial.words, f"hydra.sweep.subdir={_quoted(subdir)}"]


def _stored(trial: Trial, loader: ConfigLoader, master: DictConfig, retry_failed: bool) -> dict[str, Any] | None:
    result = _read(trial.folder)
    if result is None or (retry_failed and result["error"] is not None):
        return None
    cfg = loader.load_sweep_config(master, _words(trial, master))
    with open_dict(cfg):
        del cfg["hydra"]
    return result if result["digest"] == digest(cfg) else None


def _launch(loader: ConfigLoader, master: DictConfig, trials: Sequence[Trial]) -> None:
    context = HydraContext(config_loader=loader, callbacks=Callbacks(master))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=do_trial, config=master)
    jobs = [_words(trial, master) for trial in trials]
    OverridesParser.create().parse_overrides([word for job in jobs for word in job])  # a wrong word: before any job
    for ended in launcher.launch(jobs, initial_job_idx=0):
        _ = ended.return_value  # raises what broke a job outside of its trial


def _read(folder: Path) -> dict[str, Any] | None:
    """Return what a trial left; what cannot be read is as good as nothing."""
    try:
        result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        {**result, "folder": str(folder)} if isinstance(result, dict) and {"error", "digest"} <= set(result) else None
    )


def _lost(trial: Trial) -> dict[str, Any]:
    """What is said of a job that a launcher ended without a result; it is not kept, so that it runs again next time."""
    error = f"The launcher brought no result; see {trial.folder}."
    return {"metrics": {}, "mask": {}, "seconds": {}, "error": error, "folder": str(trial.folder)}


def _public(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "digest"}


def _quoted(value: str) -> str:
    """Return text as a value of Hydra's grammar."""
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'" if value else "''"
