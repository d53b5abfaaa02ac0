"""What is trained: MiniLM-L6 with a linear head on random tokens; no dropout, and no label that means anything."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_mask import MaskSet
from lightning_mask.data.pretrained import checkpoint

BATCH, TOKENS, DENSITY, THREADS = 8, 32, 0.01, 2
LINEARS = ["re:.*(query|key|value|dense).weight"]
"""The weights of the encoder's 36 linear layers, as a pattern."""


class Tokens(Dataset[tuple[Tensor, int]]):
    """Sequences of random token numbers; what they say does not matter for the time a step takes."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.randint(1000, 30000, (TOKENS,), generator=generator), index % 2


class Classifier(pl.LightningModule):
    """The MiniLM encoder with a linear head over the mean of its last hidden states.

    Attributes:
        optimizer: Keyword arguments of AdamW beside the learning rate and the weight decay.
        only_trainable: Whether the optimizer gets the tensors alone that require a gradient when it is made.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(384, 2)
        self.optimizer: dict[str, Any] = {"fused": True}
        self.only_trainable = False

    @property
    def backbone(self) -> nn.Module:
        """All but the last layer and the head: what ``BackboneFinetuning`` freezes first."""
        encoder: Any = self.encoder
        return nn.ModuleList([encoder.embeddings, *encoder.encoder.layer[:-1]])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.encoder(input_ids=batch[0], attention_mask=torch.ones_like(batch[0])).last_hidden_state
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad or not self.only_trainable]
        return torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01, **self.optimizer)


def load() -> Classifier:
    """The pretrained model, the same in every process."""
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = Classifier(BertModel.from_pretrained(checkpoint("minilm"), add_pooling_layer=False)).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def random_masks(module: nn.Module, density: float) -> MaskSet:
    """Masks of scattered entries over everything but the head, which trains whole."""
    generator = torch.Generator().manual_seed(0)
    masks = {}
    for name, p in module.named_parameters():
        draw = torch.rand(p.shape, generator=generator) < density
        masks[name] = torch.ones_like(draw) if name.startswith("head") else draw
    return MaskSet(masks)
