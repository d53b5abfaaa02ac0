import pytest
from torch import nn

from lightning_mask.core.patterns import resolve


class Own(nn.Linear):
    pass


class Net(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.conv = nn.Conv1d(1, 2, 3, bias=bias)
        self.up = nn.ConvTranspose1d(2, 2, 3, bias=bias)
        self.body = nn.Sequential(nn.Linear(4, 4, bias=bias), nn.LayerNorm(4, bias=bias), Own(4, 3, bias=bias))
        self.out = nn.Linear(4, 3, bias=bias)
        self.out.weight = self.table.weight


@pytest.mark.parametrize("bias", [True, False])
def test_weights_of_layers_without_their_biases(bias: bool):
    model = Net(bias)
    tied = "table.weight"  # the output layer's too
    assert resolve("weights:", model) == [tied, "conv.weight", "body.0.weight", "body.2.weight"]
    assert resolve("weights:Linear", model) == [tied, "body.0.weight", "body.2.weight"]
    assert resolve("weights:Own", model) == ["body.2.weight"]
    assert resolve("weights:LayerNorm", model) == ["body.1.weight"]
    assert resolve(["weights:", "!out", "!conv"], model) == ["body.0.weight", "body.2.weight"]
    assert resolve("weights:", nn.Linear(2, 2)) == ["weight"]


def test_a_class_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(ValueError, match=r"'weights:Linaer' matches no parameter. Module classes .* Linear"):
        resolve("weights:Linaer", Net(True))
    with pytest.raises(ValueError, match=r"'weights:' matches no parameter"):
        resolve("weights:", nn.LayerNorm(2))
