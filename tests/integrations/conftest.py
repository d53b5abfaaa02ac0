from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()


@pytest.fixture
def tiny() -> Callable[[], nn.Module]:
    """Makes the same small BERT each time."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=3,
        )
        return transformers.BertForSequenceClassification(config)

    return make
