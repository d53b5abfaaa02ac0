"""The ways to train that are compared: by hand, by other libraries, and by this package."""

import atexit
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, ModelPruning
from torch import nn
from torch.nn.utils import prune

from benchmark.model import DENSITY, LINEARS, Classifier, random_masks
from benchmark.turns import Way
from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask
from lightning_mask.core.patterns import resolve

RANK = 5
"""SHiRA trains ``RANK * (inputs + outputs)`` entries of each linear layer: 0.92 % of MiniLM."""

LAST = ["layers:-1:", "head"]
FUSED = "unmasked, AdamW fused"
BY_HAND = {
    "by hand: boolean multiply + restore": "bool",
    "by hand: float multiply + restore": "float",
    "by hand: fill + restore": "fill",
    "by hand: bit-and + restore": "bits",
}


class ByHand(Callback):
    """Hand-written masking: change the gradient after backward, put held values back after the step."""

    def __init__(self, masks: MaskSet, way: str) -> None:
        self.way, self.given = way, masks

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        named = dict(pl_module.named_parameters())
        self.parameters = [named[n] for n, m in self.given.items() if not bool(m.all())]
        self.masks = [m.contiguous() for m in self.given.values() if not bool(m.all())]
        self.start = [p.detach().clone() for p in self.parameters]
        if self.way == "float":
            self.factors = [m.float() for m in self.masks]
        elif self.way == "fill":
            self.held = [~m for m in self.masks]
        elif self.way == "bits":
            self.bits = [m.int().neg_() for m in self.masks]
        trainer.optimizers[0].register_step_post_hook(self.restore)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for i, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            assert gradient is not None
            if self.way == "bool":
                gradient.mul_(self.masks[i])
            elif self.way == "float":
                gradient.mul_(self.factors[i])
            elif self.way == "fill":
                gradient.masked_fill_(self.held[i], 0)
            else:
                gradient.view(torch.int32).bitwise_and_(self.bits[i])

    @torch.no_grad()
    def restore(self, *_: Any) -> None:
        for parameter, mask, start in zip(self.parameters, self.masks, self.start, strict=True):
            torch.where(mask, parameter, start, out=parameter.data)


class PruneFromTheStart(ModelPruning):
    """Lightning's ModelPruning, which else would prune at the end of the first epoch."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.apply_pruning(1 - DENSITY)


def train_only(*patterns: str) -> Callable[[Classifier], None]:
    """Hand-written ``requires_grad = False`` for all but the named tensors."""

    def prepare(module: Classifier) -> None:
        names = set(resolve(list(patterns), module))
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(name in names)

    return prepare


def tensors(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """The layer and the name in it of every tensor but the head's, as the pruning functions want them."""
    named = [name.rpartition(".") for name, _ in module.named_parameters() if not name.startswith("head")]
    return [(module.get_submodule(path), name) for path, _, name in named]


def prune_by_hand(module: Classifier) -> None:
    """torch.nn.utils.prune with masks: each forward pass multiplies the weights by them."""
    masks = random_masks(module, DENSITY)
    names = {id(p): n for n, p in module.named_parameters()}
    for layer, name in tensors(module):
        prune.custom_from_mask(layer, name, masks[names[id(getattr(layer, name))]].contiguous())


def shira(rank: int) -> Callable[[Classifier], None]:
    """PEFT's SHiRA on the encoder's linear layers; the head trains whole."""

    def prepare(module: Classifier) -> None:
        from peft import ShiraConfig, get_peft_model

        config = ShiraConfig(r=rank, target_modules=["query", "key", "value", "dense"], random_seed=1)
        module.encoder = get_peft_model(module.encoder, config).train()

    return prepare


def shira_entries(module: nn.Module, rank: int) -> int:
    """How many entries SHiRA of that rank trains beside the head."""
    return sum(rank * sum(module.get_parameter(name).shape) for name in resolve(LINEARS, module))


def linears(module: nn.Module) -> int:
    """How many entries the encoder's linear layers have."""
    return sum(module.get_parameter(name).numel() for name in resolve(LINEARS, module))


def by_hand(way: str, density: float = DENSITY) -> Way:
    return Way(lambda module: [ByHand(random_masks(module, density), way)])


def ours(density: float = DENSITY, engine: str = "auto") -> Way:
    return Way(lambda module: [FreezeMask(mask=random_masks(module, density), engine=engine)])


def of_linears(density: float | int, structure: str = "entry", allocation: str = "global") -> Way:
    """Ours on the weights of the encoder's linear layers; the head trains whole."""
    arguments = {"score": "random", "scope": LINEARS, "structure": structure, "allocation": allocation}
    return Way(lambda _: [FreezeMask(train="head", density=density, **arguments)])  # type: ignore[arg-type]


def pruned(scope: list[str]) -> Way:
    """Ours with nine tenths of the entries of each tensor in scope at zero from the start."""
    return Way(lambda _: [PruneMask(0.9, scope=scope, allocation="uniform", schedule="constant")])


def step_ways() -> dict[str, Way]:
    """One row of the table of steps each; what needs a package that is not installed is left out."""
    pruning = {"parameter_names": ["weight", "bias"], "use_global_unstructured": False, "amount": 1 - DENSITY}
    ways = {
        "unmasked, AdamW default": Way(optimizer={}),
        "unmasked, AdamW foreach": Way(optimizer={"foreach": True}),
        FUSED: Way(),
        **{name: by_hand(way) for name, way in BY_HAND.items()},
        "ours": ours(),
        "ours, dense": ours(engine="dense"),
        "pruned: Lightning's ModelPruning": Way(
            lambda module: [PruneFromTheStart("random_unstructured", tensors(module), **pruning)]  # type: ignore[arg-type]
        ),
        "pruned: torch.nn.utils.prune by hand": Way(prepare=prune_by_hand),
        "pruned: ours": Way(
            lambda _: [PruneMask(1 - DENSITY, score="random", scope=["*", "!head"], schedule="constant")]
        ),
        "linears pruned to 90 %: ours": pruned(LINEARS),
        "linears pruned to 90 %, AdamW default: ours": replace(pruned(LINEARS), optimizer={}),
        "all matrices pruned to 90 %: ours": pruned([*LINEARS, "type:Embedding"]),
        "as many entries: PEFT's SHiRA": Way(prepare=shira(RANK)),
        "as many entries: ours": Way(
            lambda m: [FreezeMask(train="head", score="random", scope=LINEARS, density=shira_entries(m, RANK))]
        ),
        "linears trained whole, by hand": Way(prepare=train_only(*LINEARS, "head")),
        "linears, 1 % of the rows: ours": of_linears(DENSITY, "row", "uniform"),
        "last layer + head by hand": Way(prepare=train_only(*LAST)),
        "last layer + head: ours": Way(lambda _: [FreezeMask(train=LAST)]),
        "everything active: ours": Way(lambda _: [FreezeMask(train="*")]),
    }
    return {name: way for name, way in ways.items() if "SHiRA" not in name or installed("peft")}


def phase_ways(switch: int) -> dict[str, Way]:
    """The last layer and the head first, then everything: from step ``switch`` on, the beginning of the second epoch."""
    ways = {
        "PhaseUnfreeze (ours)": Way(
            lambda _: [PhaseUnfreeze([Phase(until=f"{switch} steps", train=LAST), Phase(train="*")])]
        ),
        "BackboneFinetuning": Way(
            lambda _: [BackboneFinetuning(unfreeze_backbone_at_epoch=1, lambda_func=lambda _: 1.0)],
            only_trainable=True,
        ),
    }
    if installed("finetuning_scheduler"):
        ways["finetuning-scheduler"] = Way(finetuning_scheduler, only_trainable=True)
    return ways


def finetuning_scheduler(module: nn.Module) -> list[Callback]:
    from finetuning_scheduler import FinetuningScheduler

    last = resolve(LAST, module)
    rest = [name for name, _ in module.named_parameters() if name not in set(last)]
    schedule = {0: {"params": list(last), "max_transition_epoch": 1}, 1: {"params": rest, "max_transition_epoch": 2}}
    folder = tempfile.mkdtemp()  # it writes its schedule down
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return [
        FinetuningScheduler(
            schedule, epoch_transitions_only=True, restore_best=False, logging_level=logging.ERROR, log_dir=folder
        )
    ]


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
