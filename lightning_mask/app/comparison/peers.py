"""How torch, Lightning and torch-pruning prune by magnitude, as strategies of a comparison."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.nn.utils import prune

from lightning_mask.core.channels import depthwise, evaluating
from lightning_mask.core.prunable import default_scope


def tensors(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the default scope of PruneMask as ``torch.nn.utils.prune`` takes it: pairs of a layer and a name in it."""
    named = [name.rpartition(".") for name in default_scope(module)]
    return [(module.get_submodule(path), name) for path, _, name in named]


def of_entries(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return :func:`tensors` less depthwise convolutions, of which single entries are not pruned.

    They have few entries, and stay whole in Zhu and Gupta, "To prune, or not to prune" (2017), section 4.2.
    """
    return [(layer, name) for layer, name in tensors(module) if not depthwise(layer)]


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
            self.pruned = of_entries(pl_module)
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
        self._parameters_to_prune = of_entries(pl_module)
        super().setup(trainer, pl_module, stage, **more)


class ChannelRemoval(Callback):
    """The package torch-pruning: channels of the smallest norm, over all layers, are removed before training.

    With each goes what is coupled to it (Fang et al. 2023, "DepGraph").

    Args:
        sparsity: Share of the entries in scope that goes, at least.
    """

    def __init__(self, sparsity: float) -> None:
        self.sparsity = sparsity

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove channels, before the optimizer is made.

        Raises:
            ValueError: If torch-pruning comes to an end before.
        """
        if stage != "fit":
            return
        from torch_pruning import importance, pruner

        def entries() -> int:
            return sum(getattr(layer, name).numel() for layer, name in scope)

        scope = tensors(pl_module)
        inside = {layer for layer, _ in scope}
        wanted, most = (1 - self.sparsity) * entries(), 200
        with isolate_rng():
            batch = next(iter(trainer.datamodule.train_dataloader()))  # type: ignore[attr-defined]
        with evaluating(pl_module):
            steps = pruner.MagnitudePruner(
                pl_module,
                batch,
                importance.MagnitudeImportance(p=2),
                global_pruning=True,
                pruning_ratio=1.0,
                max_pruning_ratio=0.95,  # of a layer: none is emptied
                iterative_steps=most,
                ignored_layers=[
                    m for m in pl_module.modules() if isinstance(m, nn.Linear | nn.Conv2d) and m not in inside
                ],
                forward_fn=lambda model, example: model(example),
            )
            for _ in range(most):
                if entries() <= wanted:
                    return
                steps.step()
        raise ValueError(
            f"ChannelRemoval: torch-pruning leaves {entries()} entries, more than sparsity={self.sparsity} asks for."
        )
