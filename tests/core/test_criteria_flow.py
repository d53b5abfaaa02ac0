import pytest
import torch
from torch import Tensor, nn

from lightning_mask.core import Context
from lightning_mask.core.criteria import compute

# With sizes for weights and x = 1, 1: R = 3 (1 + 2 + 1) + 4 (0 + 5 + 0) + 0.5 = 32.5.
FIRST, BIAS, LAST, END = [[1.0, -2.0], [0.0, 5.0]], [-1.0, 0.0], [[3.0, -4.0]], [-0.5]
EXPECTED = {
    "0.weight": [[3.0, 6.0], [0.0, 20.0]],  # the size of a weight times that of the path behind it
    "0.bias": [3.0, 0.0],
    "2.weight": [[12.0, 20.0]],  # times the signal that arrives: 1 + 2 + 1 and 0 + 5 + 0
    "2.bias": [0.5],
}


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for p, values in zip(model.parameters(), (FIRST, BIAS, LAST, END), strict=True):
            p.copy_(torch.tensor(values))
    return model


class OfDicts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert batch["ids"].tolist() == [7], "whole numbers stay as they are"
        return self.net(batch["x"])


@pytest.mark.parametrize("of_dicts", [False, True])
def test_synflow_by_hand_whatever_the_data(of_dicts: bool):
    model = OfDicts() if of_dicts else network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.tensor([[float("nan"), -9.0], [1.0, 2.0]])
    batch = {"x": x, "ids": torch.tensor([7, 8])} if of_dicts else (x, torch.zeros(2))
    scores = compute("synflow", dict(model.named_parameters()), Context(model, batches=lambda: [batch]))
    for name, value in scores.items():
        assert value.tolist() == EXPECTED[name.removeprefix("net.")], name
        assert torch.equal(model.get_parameter(name), before[name])
        assert model.get_parameter(name).grad is None


def test_all_layers_hold_the_same_flow():
    """The source's conservation law: without biases, each layer's scores add up to R."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(4)))
    scores = compute("synflow", dict(model.named_parameters()), Context(model, batches=lambda: [torch.randn(3, 6)]))
    sums = torch.stack([s.sum() for s in scores.values()])
    torch.testing.assert_close(sums, sums[:1].expand(4))


def test_what_it_cannot_run_is_said():
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> object:
            return (x, x)

    model = Pair(2, 2)
    with pytest.raises(ValueError, match="that of Pair returned tuple"):
        compute("synflow", dict(model.named_parameters()), Context(model, batches=lambda: [torch.ones(1, 2)]))
    with pytest.raises(ValueError, match="gave no batch"):
        compute("synflow", dict(model.named_parameters()), Context(model, batches=lambda: []))


def test_a_flow_that_is_too_large_for_its_numbers_is_refused_by_name():
    torch.manual_seed(0)
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    with torch.no_grad():
        for p in deep.parameters():
            p.fill_(10.0)
    context = Context(deep, batches=lambda: [torch.randn(2, 64)])
    with pytest.raises(ValueError, match=r"synflow: .* is beyond torch.float32 at 0\.weight; take score=snip"):
        compute("synflow", {n: p for n, p in deep.named_parameters() if n.endswith("weight")}, context)
