import re

import pytest
import torch
from torch import nn

from lightning_mask.core.patterns import aliases, as_patterns, repeated_blocks, resolve


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(4)


class Encoder(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(layers))


class BertLike(nn.Module):
    """Embeddings, repeated blocks, a classifier; a decoder tied to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(7, 4)
        self.encoder = Encoder()
        self.classifier = nn.Linear(4, 2)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embeddings.weight


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3), nn.BatchNorm2d(width)
        self.down = nn.Sequential(nn.Conv2d(width, width, 1), nn.BatchNorm2d(width))


class ResNetLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.layer1 = nn.Sequential(Residual(4), Residual(4))
        self.layer2 = nn.Sequential(Residual(4), Residual(4))
        self.fc = nn.Linear(4, 2)


class Mixture(nn.Module):
    """Blocks that hold a list of experts of their own."""

    def __init__(self) -> None:
        super().__init__()

        def block() -> nn.Module:
            inner = nn.Module()
            inner.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(5))
            return inner

        self.blocks = nn.ModuleList(block() for _ in range(2))


BERT = BertLike()
NAMES = [name for name, _ in BERT.named_parameters()]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (None, []),
        ([], []),
        ("classifier", ["classifier.weight", "classifier.bias"]),
        ("classifier.bias", ["classifier.bias"]),
        ("classifier.*", ["classifier.weight", "classifier.bias"]),
        ("*", NAMES),
        ("type:BertLike", NAMES),
        ("*.norm.*", [n for n in NAMES if "norm" in n]),
        ("encoder.layer.?.norm", [n for n in NAMES if "norm" in n]),
        ("encoder.layer.[02].norm.bias", ["encoder.layer.0.norm.bias", "encoder.layer.2.norm.bias"]),
        (r"re:layer\.[12]\..*query\.bias$", [f"encoder.layer.{i}.attention.query.bias" for i in (1, 2)]),
        ("re:query", [n for n in NAMES if "query" in n]),
        ("type:LayerNorm", [n for n in NAMES if "norm" in n]),
        ("type:Attention", [n for n in NAMES if "attention" in n]),
        ("type:Module", NAMES),
        ("layers:-1:", [n for n in NAMES if ".layer.2." in n]),
        ("layers:-1", [n for n in NAMES if ".layer.2." in n]),
        ("layers:0", [n for n in NAMES if ".layer.0." in n]),
        ("layers::2", [n for n in NAMES if ".layer.0." in n or ".layer.1." in n]),
        ("layers:::2", [n for n in NAMES if ".layer.0." in n or ".layer.2." in n]),
        ("layers:", None),
        ("layers:3", None),
        ("layers:2:1", None),
        (["*", "!encoder"], [n for n in NAMES if not n.startswith("encoder")]),
        (["!encoder"], [n for n in NAMES if not n.startswith("encoder")]),
        ("!type:LayerNorm", [n for n in NAMES if "norm" not in n]),
        (["encoder", "!encoder", "classifier"], ["classifier.weight", "classifier.bias"]),
        (["classifier", "!classifier", "classifier.bias"], ["classifier.bias"]),
        (["classifier.bias", "embeddings"], ["embeddings.weight", "classifier.bias"]),
        ("decoder", ["embeddings.weight"]),
        ("decoder.weight", ["embeddings.weight"]),
        ("re:^decoder", ["embeddings.weight"]),
        (["embeddings", "!decoder.weight", "classifier.bias"], ["classifier.bias"]),
    ],
)
def test_a_pattern_names_parameters_in_the_models_order(patterns: str | list[str] | None, expected: list[str] | None):
    if expected is None:
        with pytest.raises(ValueError, match="matches no parameter"):
            resolve(patterns, BERT)
    else:
        assert resolve(patterns, BERT) == expected


def test_a_module_name_does_not_match_a_longer_one():
    model = nn.ModuleDict({"layer1": nn.Linear(1, 1), "layer10": nn.Linear(1, 1)})
    assert resolve("layer1", model) == ["layer1.weight", "layer1.bias"]


def test_a_tied_parameter_is_one_and_has_all_its_names():
    assert aliases(BERT)["embeddings.weight"] == ("embeddings.weight", "decoder.weight")
    assert NAMES.count("embeddings.weight") == 1
    assert "decoder.weight" not in NAMES


def test_a_module_used_twice_answers_to_both_paths():
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    assert resolve("b", model) == resolve("b.0", model) == resolve("a", model) == ["a.weight", "a.bias"]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (BERT, ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]),
        (ResNetLike(), ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]),
        (Mixture(), ["blocks.0", "blocks.1"]),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []),
        (nn.Linear(2, 2), []),
    ],
)
def test_repeated_blocks(model: nn.Module, blocks: list[str]):
    assert repeated_blocks(model) == blocks


def test_a_module_may_be_called_as_a_kind_of_pattern():
    model = nn.ModuleDict({kind: nn.Linear(1, 1, bias=False) for kind in ("layers", "re", "other")})
    for kind in ("layers", "re"):
        assert resolve(kind, model) == [f"{kind}.weight"]
        assert resolve(f"{kind}.*", model) == [f"{kind}.weight"]


def test_blocks_of_an_encoder_and_a_decoder():
    model = nn.Transformer(d_model=4, nhead=1, num_encoder_layers=2, num_decoder_layers=3, dim_feedforward=4)
    assert repeated_blocks(model) == [f"decoder.layers.{i}" for i in range(3)]  # the class with the most parameters
    same = nn.ModuleDict({"encoder": Encoder(2), "decoder": Encoder(1), "other": Encoder(2)})
    assert repeated_blocks(same) == ["encoder.layer.0", "encoder.layer.1", "other.layer.0", "other.layer.1"]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("clasifier", "classifier"),
        ("clasifier.*", "classifier"),
        ("encoder.layer.9.norm", "encoder.layer"),
        ("type:LayerNrm", "LayerNorm"),
        ("type:Dropout", "LayerNorm"),
        ("layers:7", "3 repeated blocks (encoder.layer.0 to encoder.layer.2)"),
        ("re:nothing", "nearest names"),
        ("!clasifier", "classifier"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(pattern: str, says: str):
    with pytest.raises(ValueError, match="matches no parameter") as error:
        resolve(["classifier", pattern], BERT, "train")
    message = str(error.value)
    assert message.startswith("train: ")
    assert repr(pattern) in message
    assert says in message.split("matches no parameter")[1]


@pytest.mark.parametrize(
    ("pattern", "says"),
    [("re:(", "not a valid regular expression"), ("layers:a", "slice or a number"), ("layers:1:2:3:4", "slice")],
)
def test_a_malformed_pattern_is_refused(pattern: str, says: str):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))) as error:
        resolve(pattern, BERT)
    assert says in str(error.value)


@pytest.mark.parametrize("patterns", ["", "  ", "!", ["a", ""], [3], [None]])
def test_an_empty_pattern_is_refused(patterns: object):
    with pytest.raises(ValueError, match="non-empty string"):
        as_patterns(patterns)  # type: ignore[arg-type]


def test_layers_of_a_model_without_blocks_says_so():
    with pytest.raises(ValueError, match="0 repeated blocks"):
        resolve("layers:0", nn.Linear(2, 2))


def test_a_parameter_of_the_root_is_found():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(2))
    assert resolve("scale", model) == resolve("*", model) == resolve("re:^scale$", model) == ["scale"]
