"""Small networks, and a way to zero units of them."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_mask.core import structures
from lightning_mask.core.channels import channel_groups
from lightning_mask.tasks import ResNet

SMALL = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}


def scrambled(model: nn.Module) -> nn.Module:
    """Biases and normalisations that do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("bias") or name.endswith("running_mean"):
                tensor.normal_(0.1, 0.3, generator=generator)
            if name.endswith("running_var") or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return scrambled(ResNet(3, width=8, depth=1))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return scrambled(transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)))


def llama(shared: int = 2) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_key_value_heads=shared, tie_word_embeddings=True, **SMALL)
    return scrambled(transformers.LlamaForCausalLM(config))


def images() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def zero(model: nn.Module, groups: list[structures.Group], keep: Callable[[int], list[int]]) -> None:
    """Set the units of each group that ``keep`` of their number does not name to zero."""
    parameters = dict(model.named_parameters())
    for group in groups:
        (units,) = structures.unit_shape(group)
        alive = torch.zeros(units, dtype=torch.bool)
        alive[keep(units)] = True
        with torch.no_grad():
            for name, mask in structures.spread(alive, group, parameters).items():
                parameters[name].masked_fill_(~mask, 0.0)


def zero_channels(model: nn.Module, forward: Callable[[nn.Module], Any]) -> None:
    """Set every other channel to zero: what makes it, not what reads it."""
    zero(model, channel_groups(model, forward)[0], lambda units: list(range(0, units, 2)))


def logits(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits
