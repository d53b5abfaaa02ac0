"""How torch and Lightning prune by magnitude, as strategies of a comparison: over what PruneMask prunes by default."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from torch import nn
from torch.nn.utils import prune

from lightning_mask.core.prunable import default_scope


def tensors(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the default scope of PruneMask as ``torch.nn.utils.prune`` takes it: pairs of a layer and a name in it."""
    named = [name.rpartition(".") for name in default_scope(module)]
    return [(module.get_submodule(path), name) for path, _, name in named]


class TorchPruning(Callback):
    """``torch.nn.utils.prune.l1_unstructured`` on each tensor before training, removed after it.

    Args:
        sparsity: Share of zeros in each tensor.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity
        self.pruned: list[tuple[nn.Module, str]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune, before the optimizer is made."""
        if stage == "fit":
            self.pruned = tensors(pl_module)
            for layer, name in self.pruned:
                prune.l1_unstructured(layer, name, amount=self.sparsity)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make plain parameters of what was pruned."""
        for layer, name in self.pruned:
            prune.remove(layer, name)


class LightningPruning(ModelPruning):
    """Lightning's ``ModelPruning`` at the ends of the first epochs: the same share of what is left each time.

    Args:
        sparsity: Share of zeros in each tensor after the last of them.
        epochs: How many.
    """

    def __init__(self, sparsity: float, epochs: int = 2) -> None:
        each = 1 - (1 - sparsity) ** (1 / epochs)
        super().__init__(
            "l1_unstructured",
            use_global_unstructured=False,
            amount=lambda epoch: each if epoch < epochs else 0.0,
            use_lottery_ticket_hypothesis=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str, **more: Any) -> None:
        """Name the tensors."""
        self._parameters_to_prune = tensors(pl_module)
        super().setup(trainer, pl_module, stage, **more)
