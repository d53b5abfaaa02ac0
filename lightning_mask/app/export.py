"""Export a run's network: `lightning-mask export run=<folder> format=physical`, or `export(cfg)`."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_mask.app import launch
from lightning_mask.app.chatter import quieten
from lightning_mask.app.checkpoints import load_weights
from lightning_mask.app.checks import check_complete
from lightning_mask.app.parts import make_model
from lightning_mask.app.summary import relative
from lightning_mask.core.channels import evaluating
from lightning_mask.core.files import whole_folder
from lightning_mask.core.maskset import MaskSet
from lightning_mask.export import (
    Inputs,
    layers_2to4,
    load_onnx,
    load_physical,
    load_semi_structured,
    load_sparse,
    save_dense,
    save_onnx,
    save_program,
    save_semi_structured,
    save_sparse,
    shrink,
)
from lightning_mask.export.cuts import evaluate
from lightning_mask.export.files import entries, state_bytes
from lightning_mask.export.physical import apart, check_replaceable, write_physical
from lightning_mask.export.program import require_onnx
from lightning_mask.export.semi_structured import require_cuda


@dataclass
class Run:
    """A run that is to be exported.

    Attributes:
        cfg: Its config.
        model: The Lightning module with the weights of the checkpoint.
        net: The network in it.
        data: Its data.
        inputs: What the network is given for some examples of the test set.
        weights: The checkpoint.
    """

    cfg: DictConfig
    model: LightningModule
    net: nn.Module
    data: LightningDataModule
    inputs: Inputs
    weights: Path


@dataclass
class Written:
    """What was written, loaded back.

    Attributes:
        path: The file or folder.
        size: Bytes of what is needed to run it.
        net: What takes the network's place in the Lightning module; None: it cannot be tested there.
        run: Runs it on inputs, to be timed.
        before: Runs the network as it was, likewise.
        entries: Entries of its parameters.
        zeros: How many of them are zero.
        note: A line for the person; may be empty.
    """

    path: Path
    size: int
    net: nn.Module | None
    run: Callable[[], Any]
    before: Callable[[], Any]
    entries: int
    zeros: int
    note: str = ""


def export(cfg: DictConfig) -> dict[str, dict[str, float]]:
    """Write a run's network as the config says, load it, compare it, and print what it takes and scores.

    Args:
        cfg: The composed root config (``conf/export.yaml``).

    Returns:
        ``{"before": ..., "after": ...}``: entries, zeros, bytes, milliseconds, and the figures of the test if there was one.

    Raises:
        ValueError: If a value of the config is out of range, the folder is of no run, or the network has nothing to do with
            the format (no zeros in that pattern, nothing to remove); nothing is written then.
        FileNotFoundError: If the folder, or a checkpoint, is missing.
        RuntimeError: If what was written is not what the network was.
    """
    quieten()
    check_complete(cfg)
    if cfg.format not in _FORMATS:
        raise ValueError(f"format={cfg.format!r} is unknown; there are {', '.join(_FORMATS)}.")
    for name, least in (("examples", 2), ("repeats", 1)):
        if isinstance(cfg[name], bool) or not isinstance(cfg[name], int) or cfg[name] < least:
            raise ValueError(f"{name}={cfg[name]!r} must be a whole number from {least}.")
    name, write = _FORMATS[cfg.format]
    run = load_run(cfg.run, cfg.weights, cfg.examples)
    path = Path(cfg.out) if cfg.out is not None else Path(cfg.run) / "export" / name
    as_it_was = copy.deepcopy(run.net)
    written = write(cfg, run, path)
    facts = {"before": _facts(as_it_was), "after": _facts(as_it_was)}
    facts["after"] |= {"entries": written.entries, "zeros": written.zeros, "bytes": written.size}
    facts["before"]["milliseconds"], facts["after"]["milliseconds"] = _time(written.before, written.run, cfg.repeats)
    if cfg.score:
        for when, net in (("before", as_it_was), ("after", written.net)):
            if net is not None:
                facts[when] |= _test(run, net)
    _print(facts, run, written, cfg.format)
    return facts


def load_run(folder: str | Path, weights: str | None, examples: int) -> Run:
    """Return the run in ``folder`` with the weights of one of its checkpoints.

    Args:
        folder: Of scripts/train.py or scripts/prune.py.
        weights: "best", "last", or a path; None: the best, but the last of a run that pruned.
        examples: How many examples of the test set the network is to be given.

    Raises:
        FileNotFoundError: If there is no such folder, or no such checkpoint.
        ValueError: If it is of no run, or the checkpoint is not of its model or of its masks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder run={str(folder)!r}: give that of a run, e.g. logs/train/runs/<run>."
        )
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        raise ValueError(f"run={str(folder)!r} is the folder of no run: it has no .hydra/config.yaml.")
    cfg = OmegaConf.load(config)
    if not isinstance(cfg, DictConfig) or "model" not in cfg or "data" not in cfg:
        raise ValueError(f"run={str(folder)!r}: {config} is the config of no run: it has no model and no data.")
    checkpoint = _checkpoint(folder, weights, _prunes(cfg))
    with open_dict(cfg):
        OmegaConf.update(cfg, "paths.output_dir", str(folder.resolve()))
        cfg.initial_checkpoint = None  # all weights come from the run's own
        if "pretrained" in cfg.model:
            cfg.model.pretrained = False
    seed_everything(cfg.get("seed", 0), workers=True, verbose=False)
    data: LightningDataModule = instantiate(cfg.data)
    model = make_model(cfg, data)
    load_weights(checkpoint, model, "weights", strict=True)
    _check_masks(folder, checkpoint, model)
    net = _network(model)
    return Run(cfg, model, net, data, _inputs(model, net, data, examples), checkpoint)


def _checkpoint(folder: Path, weights: str | None, pruned: bool) -> Path:
    there = folder / "checkpoints"
    best = sorted(there.glob("best*.ckpt"))
    last = there / "last.ckpt"
    if weights not in (None, "best", "last"):
        found: Path | None = Path(str(weights))
    elif weights == "last" or (weights is None and (pruned or not best)):
        found = last
    else:
        found = best[-1] if best else None
    if found is None or not found.exists():
        names = ", ".join(f.name for f in sorted(there.glob("*.ckpt"))) or "none"
        what = f"There is no checkpoint weights={weights}" if weights else "There is no checkpoint"
        raise FileNotFoundError(f"{what} of run={str(folder)!r}; in {there} there is {names}.")
    if found.is_dir():
        raise ValueError(f"{found} is a folder of shards; export a checkpoint in one file.")
    return found


def _prunes(cfg: DictConfig) -> bool:
    """Whether the run pruned: then the best of its checkpoints may be of before."""
    blocks = [cfg.get("mask"), *(cfg.get("callbacks") or {}).values()]
    return "method" in cfg or any(
        isinstance(block, DictConfig) and str(block.get("_target_")).endswith("PruneMask") for block in blocks
    )


def _check_masks(folder: Path, checkpoint: Path, model: nn.Module) -> None:
    """Refuse weights that are not zero where a run that did nothing but prune says that they are."""
    file = folder / "masks.safetensors"
    if not file.is_file():
        return
    masks = MaskSet.load(file)
    recipes = masks.recipe.get("recipes") or [{}]
    if not all("sparsity" in recipe for recipe in recipes):
        return
    parameters, wrong = dict(model.named_parameters()), 0
    for name, mask in masks.items():
        if name in parameters and bool(mask.any()):
            wrong += int(((parameters[name].detach() != 0) & ~mask).sum())
    if wrong:
        raise ValueError(
            f"{checkpoint} has {wrong:,} entries that are not zero where {file} prunes: it was written before pruning ended. "
            "Give another one, e.g. weights=last."
        )


def _network(model: LightningModule) -> nn.Module:
    """The one module below the Lightning module that has all parameters; without one, the Lightning module."""
    total = {id(p) for p in model.parameters()}
    return next((m for m in model.children() if {id(p) for p in m.parameters()} == total), model)


def _put(model: LightningModule, old: nn.Module, new: nn.Module) -> LightningModule:
    """Return the Lightning module with ``new`` in the place of its network ``old``."""
    if old is model:
        assert isinstance(new, LightningModule)
        return new
    name = next(name for name, module in model.named_children() if module is old)
    setattr(model, name, new)
    return model


def _inputs(model: LightningModule, net: nn.Module, data: LightningDataModule, examples: int) -> Inputs:
    data.prepare_data()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    size = max((len(t) for t in _tensors(batch) if t.dim()), default=0)
    if size < 2:
        raise ValueError(
            f"The first test batch has {size} examples; at least 2 are needed: data.eval_batch_size=2 or more."
        )
    caught: list[Inputs] = []

    def catch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(Inputs(args, dict(kwargs)))

    handle = net.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with evaluating(model), torch.no_grad():
            model(_first(batch, examples, size))
    finally:
        handle.remove()
    if not caught:
        raise ValueError(f"{type(model).__name__}.forward(batch) does not run its network {type(net).__name__}.")
    return caught[0]


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return [t for part in parts for t in _tensors(part)]


def _first(batch: Any, examples: int, size: int) -> Any:
    """The first examples of a batch of ``size``."""
    if isinstance(batch, Tensor):
        return batch[:examples] if batch.dim() and len(batch) == size else batch
    if isinstance(batch, Mapping):
        return {name: _first(value, examples, size) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(_first(value, examples, size) for value in batch)
    return batch


# Formats.


def _dense(cfg: DictConfig, run: Run, path: Path) -> Written:
    from safetensors.torch import load_model

    save_dense(run.net, path)
    back = copy.deepcopy(run.net)
    load_model(back, path)
    return _written(run, path, back)


def _sparse(cfg: DictConfig, run: Run, path: Path) -> Written:
    compressed = save_sparse(run.net.state_dict(), path)
    back = copy.deepcopy(run.net)
    back.load_state_dict(load_sparse(path))
    return _written(run, path, back, f"{len(compressed)} tensors are compressed, the others whole")


def _physical(cfg: DictConfig, run: Run, path: Path) -> Written:
    check_replaceable(path)
    small = shrink(run.net, run.inputs, heads=cfg.heads)
    with whole_folder(path) as temporary:
        write_physical(small, run.net, temporary)
        if cfg.program:
            save_program(small, run.inputs, temporary / "model.pt2")
    back = load_physical(path, copy.deepcopy(run.net))
    written = _written(run, path, back)
    written.size = (path / "model.safetensors").stat().st_size
    written.note = "load_physical(folder, model) makes a model of full size the smaller one"
    if cfg.program:
        written.note += "; torch.export.load('model.pt2').module() needs no model"
    return written


def _onnx(cfg: DictConfig, run: Run, path: Path) -> Written:
    require_onnx()
    note = ""
    try:
        small = shrink(run.net, run.inputs, heads=cfg.heads)
    except ValueError as error:
        small, note = run.net, f"{error} The file is of the network in full size."
    save_onnx(small, run.inputs, path)
    back = load_onnx(path)
    given = {name: value for name, value in run.inputs.named(run.net).items() if isinstance(value, Tensor)}
    written = _written(run, path, small, note)
    with evaluating(run.net), torch.no_grad():
        by_name = isinstance(run.inputs(run.net), Mapping)
    written.net, written.run = _OfFile(back, run.net, by_name), partial(back, given)
    return written


def _two_to_four(cfg: DictConfig, run: Run, path: Path) -> Written:
    layers = layers_2to4(run.net)
    require_cuda()
    save_semi_structured(run.net, path)
    made = load_semi_structured(path, run.net)
    half = copy.deepcopy(run.net).eval().to(device="cuda", dtype=torch.float16)
    inputs = run.inputs.map(lambda t: t.to("cuda", torch.float16 if t.is_floating_point() else t.dtype))
    difference = apart(evaluate(half, inputs), evaluate(made, inputs))
    if difference is not None:
        raise RuntimeError(f"{path}: the semi-structured network's outputs differ from the dense one's: {difference}.")

    def timed(net: nn.Module) -> None:
        evaluate(net, inputs)
        torch.cuda.synchronize()

    note = f"{len(layers)} Linear layers are 2:4; timed on the GPU in 16 bits, before as dense weights; not tested"
    written = _written(run, path, run.net, note)
    written.net, written.run, written.before = None, partial(timed, made), partial(timed, half)
    return written


def _pretrained(cfg: DictConfig, run: Run, path: Path) -> Written:
    from lightning_mask.data.pretrained import load_tokenizer
    from lightning_mask.integrations.pretrained import check_pretrained, save_pretrained

    check_pretrained(run.net, path)
    name = getattr(run.data, "tokenizer", None)
    back = save_pretrained(run.net, path, load_tokenizer(name) if isinstance(name, str) else None)
    difference = apart(evaluate(run.net, run.inputs), evaluate(back, run.inputs))
    if difference is not None:
        raise RuntimeError(f"{path}: the outputs of the loaded model differ: {difference}.")
    written = _written(run, path, back, f"{type(back).__name__}.from_pretrained(folder) loads it, without this package")
    written.size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    return written


_FORMATS: dict[str, tuple[str, Callable[[DictConfig, Run, Path], Written]]] = {
    "dense": ("dense.safetensors", _dense),
    "sparse": ("sparse.safetensors", _sparse),
    "2to4": ("2to4.safetensors", _two_to_four),
    "physical": ("physical", _physical),
    "hf": ("hf", _pretrained),
    "onnx": ("model.onnx", _onnx),
}


class _OfFile(nn.Module):
    """Stands where a network stood: gives what it is given to what runs a file."""

    def __init__(self, run: Callable[[Mapping[str, Tensor]], Tensor], like: nn.Module, by_name: bool) -> None:
        super().__init__()
        self._run, self._like, self._by_name = run, (like,), by_name  # in a tuple: no module of this one

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        named = Inputs(args, kwargs).named(self._like[0])
        device = next(value.device for value in named.values() if isinstance(value, Tensor))
        logits = self._run({name: value for name, value in named.items() if isinstance(value, Tensor)}).to(device)
        return SimpleNamespace(logits=logits) if self._by_name else logits


def _written(run: Run, path: Path, back: nn.Module, note: str = "") -> Written:
    size = path.stat().st_size if path.is_file() else 0
    after = _facts(back)
    return Written(
        path,
        size,
        back,
        partial(evaluate, back, run.inputs),
        partial(evaluate, copy.deepcopy(run.net), run.inputs),
        int(after["entries"]),
        int(after["zeros"]),
        note,
    )


# Figures.


def _facts(net: nn.Module) -> dict[str, float]:
    zeros = sum(int((p.detach() == 0).sum()) for p in net.parameters())
    return {"entries": entries(net), "zeros": zeros, "bytes": state_bytes(net)}


def _time(before: Callable[[], Any], after: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds of both, run by turns, after one run of each."""
    times: tuple[list[float], list[float]] = ([], [])
    before()
    after()
    for _ in range(repeats):
        for run, taken in ((before, times[0]), (after, times[1])):
            since = time.perf_counter()
            run()
            taken.append(1000 * (time.perf_counter() - since))
    return statistics.median(times[0]), statistics.median(times[1])


def _test(run: Run, net: nn.Module) -> dict[str, float]:
    """The figures of the run's own test, with ``net`` for its network."""
    trainer = Trainer(
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_test_batches=OmegaConf.select(run.cfg, "trainer.limit_test_batches"),
    )
    model = _put(run.model, run.net, net)
    trainer.test(model, datamodule=run.data, verbose=False)
    run.net = net
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _print(facts: dict[str, dict[str, float]], run: Run, written: Written, kind: str) -> None:
    before, after = facts["before"], facts["after"]
    table = Table(title=f"{type(run.model).__name__} as {kind}")
    for column in ("", "before", "after", "after / before"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("entries", "zeros", "bytes"):
        ratio = f"{after[name] / before[name]:.3f}" if before[name] else ""
        table.add_row(name, f"{before[name]:,.0f}", f"{after[name]:,.0f}", ratio)
    name = "milliseconds"
    table.add_row(name, f"{before[name]:.2f}", f"{after[name]:.2f}", f"{after[name] / before[name]:.3f}")
    for name, value in before.items():
        if "/" in name:
            table.add_row(name, f"{value:.4f}", f"{after[name]:.4f}" if name in after else "", "")
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    console.print(table)
    console.print(f"weights: {relative(run.weights)}", highlight=False, soft_wrap=True)
    if written.note:
        console.print(written.note, highlight=False, soft_wrap=True)
    console.print(f"written: {relative(written.path)}", highlight=False, soft_wrap=True)


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: Hydra's words, by default all that this process was started with."""
    launch.run(export, "export", words)


if __name__ == "__main__":
    main()
