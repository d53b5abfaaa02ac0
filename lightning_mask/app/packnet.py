"""Several tasks in one network: `lightning-mask packnet experiment=packnet`, or `packnet(cfg)`.

After PackNet (Mallya and Lazebnik 2018, arXiv:1711.05769) and Piggyback (arXiv:1801.06519): a task trains behind a mask in what
earlier tasks left free, reads what they trained, and holds it from then on. What each task has of the network is a delta; the
network is one task's or another's by writing one delta over it.
"""

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities import rank_zero_info
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lightning_mask.app import launch
from lightning_mask.app.chatter import quieten
from lightning_mask.app.checks import check_complete, check_types
from lightning_mask.app.parts import make_callbacks, make_trainer
from lightning_mask.app.summary import relative, write_json
from lightning_mask.callbacks import FreezeMask
from lightning_mask.core.criteria import Context, registry
from lightning_mask.core.files import whole_file
from lightning_mask.core.maskset import MaskSet
from lightning_mask.core.patterns import resolve
from lightning_mask.delta import Delta, save_delta, switch

State = dict[str, Tensor]


@dataclass
class Task:
    """What became of one task."""

    name: str
    active: int
    """Entries of the shared tensors that it trained, for itself alone."""
    own: int
    """Entries of the tensors that each task has for itself."""
    delta_bytes: int
    accuracy: dict[str, float] = field(default_factory=dict)
    """On its test set, after each task from this one on."""
    equal: bool = True
    """Whether its logits stayed equal, bit for bit, after every later task."""
    switch_ms: float = 0.0
    """Median time to write its delta over the network."""


def packnet(cfg: DictConfig) -> list[Task]:
    """Train the tasks one after another, and look at all earlier ones after each.

    The folder gets, of each task, its delta (``<task>/delta.safetensors``, onto the network before all tasks, with its test
    accuracy), its masks and the figures of its training; and ``accuracies.csv`` and ``packnet.json``.

    Args:
        cfg: The composed root config (``conf/packnet.yaml``).

    Returns:
        The tasks, in their order.

    Raises:
        ValueError: If a value of the config is out of range, the tasks together want more than there is, or the trainer has
            more than one process.
        RuntimeError: If the predictions of a task changed; the files are there nevertheless.
    """
    started = time.time()
    quieten()
    _check(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    folder = Path(cfg.paths.output_dir)
    data: dict[str, Any] = {name: instantiate(task.data) for name, task in cfg.tasks.items()}
    classes = max(each.num_classes for each in data.values())
    model: LightningModule = instantiate(cfg.model, _partial_=True)(num_classes=classes, class_names=None)
    base = _copied(model)
    used = MaskSet({name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()})
    tasks: list[Task] = []
    deltas: dict[str, Delta] = {}
    reads: dict[str, MaskSet] = {}  # the shared entries that a task's predictions rest on: its own and earlier ones
    logits: dict[str, Tensor] = {}
    for name in cfg.tasks:
        masks, own = _learn(cfg, name, model, data[name], used)
        logits[name], labels = predict(cfg, model, data[name])
        accuracy = _accuracy(logits[name], labels)
        reads[name] = used = used | MaskSet({n: mask & (n not in own) for n, mask in masks.items()})
        path = folder / name / "delta.safetensors"
        save_delta(path, base, model, used | masks, metrics={"test/accuracy": accuracy})
        deltas[name] = Delta.load(path)
        sizes = {n: int(mask.count_nonzero()) for n, mask in masks.items()}
        mine = sum(size for n, size in sizes.items() if n in own)
        tasks.append(Task(name, sum(sizes.values()) - mine, mine, path.stat().st_size, {name: accuracy}))
        rank_zero_info(f"{name}: test accuracy {accuracy:.4f}, {tasks[-1].active:,} shared entries taken")
        now = _copied(model)
        for task in tasks[:-1]:
            _become(model, base, deltas[task.name], now, reads[task.name])
            today, labels = predict(cfg, model, data[task.name])
            task.accuracy[name] = _accuracy(today, labels)
            task.equal = task.equal and torch.equal(today, logits[task.name])
        # The next task finds what was trained, and starts its own tensors anew.
        model.load_state_dict(base | {n: now[n] for n in used if n not in own})
    _time(model, base, tasks, deltas)
    _write(tasks, folder, cfg, time.time() - started)
    _print(tasks, folder)
    changed = [task.name for task in tasks if not task.equal]
    if changed:
        raise RuntimeError(f"The predictions of {', '.join(changed)} changed when later tasks were trained.")
    return tasks


def free(
    params: Mapping[str, Tensor], context: Context, *, score: str | registry.Criterion, used: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Score parameters by another criterion, and put what is taken behind all else.

    Args:
        params: Name to parameter.
        context: What the criterion may look at.
        score: The criterion.
        used: Name to boolean mask of the entries that are taken.
    """
    scores = registry.get(score)(params, context)
    return {name: scores[name].masked_fill(used[name].to(scores[name].device), -torch.inf) for name in params}


def predict(cfg: DictConfig, model: LightningModule, data: LightningDataModule) -> tuple[Tensor, Tensor]:
    """Return the logits, [examples, classes], and the labels, [examples], of the test set, or of its first batches.

    How many batches, ``trainer.limit_test_batches`` says.
    """
    data.prepare_data()
    data.setup("test")
    loader = data.test_dataloader()
    limit = cfg.trainer.limit_test_batches
    limit = int(limit * len(loader)) if isinstance(limit, float) else limit
    mode = model.training
    model.eval()
    with torch.inference_mode():
        pairs = [(model(batch).float().cpu(), batch["labels"]) for batch in islice(loader, limit)]
    model.train(mode)
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def _learn(
    cfg: DictConfig, name: str, model: LightningModule, data: LightningDataModule, used: MaskSet
) -> tuple[MaskSet, set[str]]:
    """Train one task in what is free; return its masks, and the names of the tensors that it has for itself."""
    mask = FreezeMask(
        train=list(cfg.own),
        score=partial(free, score=cfg.score, used=used),
        density=cfg.density,
        scope=list(cfg.scope),
        structure=cfg.structure,
        allocation=cfg.allocation,
        batches=cfg.batches,
        seed=cfg.seed,
    )
    here = OmegaConf.merge(cfg, {"paths": {"output_dir": str(Path(cfg.paths.output_dir) / name)}})
    assert isinstance(here, DictConfig)
    trainer = make_trainer(here, [mask, *make_callbacks(here)])
    if trainer.world_size > 1:
        raise ValueError(f"Tasks are packed in one process: trainer.devices={cfg.trainer.devices} is too many.")
    trainer.fit(model, datamodule=data)
    masks = MaskSet({n: each.cpu() for n, each in mask.masks.items()})
    own = {n for n, each in masks.items() if n in resolve(list(cfg.own), model, "own")}
    twice = next((n for n in masks if n not in own and bool((masks[n] & used[n]).any())), None)
    if twice is not None:
        raise RuntimeError(f"{twice}: {name} was given entries that earlier tasks have.")
    model.cpu()
    return masks, own


def _become(model: LightningModule, base: State, delta: Delta, now: State, reads: MaskSet) -> None:
    """Make the network an earlier task's: its own tensors from its delta, the shared entries as they are now.

    Those that later tasks took are the base's. If an entry that the task rests on was not held, it shows.
    """
    model.load_state_dict(base)
    switch(model, delta)
    own = {n: tensor for n, tensor in model.state_dict().items() if n not in reads or not reads[n].any()}
    model.load_state_dict(own | {n: torch.where(m, now[n], base[n]) for n, m in reads.items() if n not in own})


def _time(model: LightningModule, base: State, tasks: Sequence[Task], deltas: Mapping[str, Delta]) -> None:
    """Write each delta over the network several times, and see that undoing it gives the base."""
    model.load_state_dict(base)
    for task in tasks:
        taken = []
        for _ in range(7):
            since = time.perf_counter()
            undo = switch(model, deltas[task.name])
            taken.append(1000 * (time.perf_counter() - since))
            switch(model, undo)
        task.switch_ms = statistics.median(taken)
    if any(not torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items()):
        raise RuntimeError("Undoing the deltas did not give the network back that was there before them.")


def _copied(model: LightningModule) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _check(cfg: DictConfig) -> None:
    check_complete(cfg)
    check_types(cfg)
    if len(cfg.tasks) < 2:
        raise ValueError(
            "There are fewer than two tasks to pack: choose experiment=packnet, or give tasks.<name>.data."
        )
    if not isinstance(cfg.seed, int) or isinstance(cfg.seed, bool):
        raise ValueError(f"seed={cfg.seed!r} must be a whole number: the data's order and the new head come from it.")
    if isinstance(cfg.density, float) and len(cfg.tasks) * cfg.density > 1:
        raise ValueError(
            f"density={cfg.density} for each of {len(cfg.tasks)} tasks is more than there is: at most {1 / len(cfg.tasks):.3f}."
        )


def _write(tasks: Sequence[Task], folder: Path, cfg: DictConfig, seconds: float) -> None:
    with whole_file(folder / "accuracies.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", *(f"after {task.name}" for task in tasks), "predictions equal"])
        for task in tasks:
            writer.writerow([task.name, *(task.accuracy.get(each.name, "") for each in tasks), task.equal])
    config = OmegaConf.to_container(OmegaConf.masked_copy(cfg, ["own", "scope", "score", "density", "seed"]))
    write_json(
        folder / "packnet.json", {"tasks": [asdict(task) for task in tasks], "config": config, "seconds": seconds}
    )


def _print(tasks: Sequence[Task], folder: Path) -> None:
    table = Table(title="Tasks in one network: test accuracy after each task was trained")
    figures: list[tuple[str, Callable[[Task], str]]] = [
        ("shared entries", lambda task: f"{task.active:,}"),
        ("own entries", lambda task: f"{task.own:,}"),
        *((f"after {each.name}", partial(_figure, name=each.name)) for each in tasks),
        ("predictions", lambda task: "equal" if task.equal else "changed"),
        ("delta, MB", lambda task: f"{task.delta_bytes / 1e6:.2f}"),
        ("switch, ms", lambda task: f"{task.switch_ms:.1f}"),
    ]
    table.add_column("task")
    for title, _ in figures:
        table.add_column(title, justify="right")
    for task in tasks:
        table.add_row(task.name, *(figure(task) for _, figure in figures))
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    console.print(table)
    console.print(f"folder: {relative(folder)}", highlight=False, soft_wrap=True)


def _figure(task: Task, name: str) -> str:
    return f"{task.accuracy[name]:.4f}" if name in task.accuracy else ""


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: Hydra's words, by default all that this process was started with."""
    launch.run(packnet, "packnet", words)


if __name__ == "__main__":
    main()
