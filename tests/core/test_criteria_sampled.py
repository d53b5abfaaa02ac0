"""Labels drawn from the model's own predictions."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from lightning_mask.core import Context
from lightning_mask.core.criteria import compute


def unit() -> nn.Linear:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -1.0]]))
    return model


class Draws:
    def __init__(self, model: nn.Module) -> None:
        self.model, self.labels = model, list[Tensor]()

    def __call__(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        self.labels.append(torch.bernoulli(logits.detach().sigmoid()))
        return binary_cross_entropy_with_logits(logits, self.labels[-1])


def fisher(seed: int, batches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    model = unit()
    draws = Draws(model)
    context = Context(model, batches=lambda: batches, sampled_loss=draws, seed=seed)
    state = torch.get_rng_state()
    score = compute("fisher_sampled", {"weight": model.weight}, context)["weight"]
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not drawn from"
    return score, draws.labels


def test_it_is_the_mean_squared_gradient_against_the_labels_that_were_drawn():
    x = torch.tensor([[1.0, 0.5], [-2.0, 1.0], [0.0, 3.0]])
    score, labels = fisher(3, [x, x, x, x])
    # dL/dw of a logistic unit is the mean of (p - label) x.
    p = torch.sigmoid(x @ torch.tensor([[1.0], [-1.0]]))
    expected = torch.stack([((p - label) * x).mean(0) for label in labels]).square().mean(0)
    torch.testing.assert_close(score[0], expected)
    assert len({tuple(label.flatten().tolist()) for label in labels}) > 1, "each batch has a draw of its own"
    torch.manual_seed(99)
    assert torch.equal(fisher(3, [x, x, x, x])[0], score), "the seed of the selection alone decides"
    assert not all(torch.equal(a, b) for a, b in zip(labels, fisher(4, [x, x, x, x])[1], strict=True))


def test_a_squared_batch_gradient_estimates_the_mean_square_of_single_ones():
    x = torch.tensor([[1.0, 0.5]])
    p = torch.sigmoid(torch.tensor(1.0 - 0.5)).item()
    true = torch.tensor([[p * (1 - p) * 1.0, p * (1 - p) * 0.25]])  # the Fisher information p (1 - p) x^2
    batches = [x.expand(8, 2)] * 1500
    torch.testing.assert_close(8 * fisher(0, batches)[0], true, rtol=0.1, atol=0)


def test_without_such_a_loss_it_says_what_to_define():
    model = unit()
    context = Context(model, loss=lambda x: model(x).mean(), batches=lambda: [torch.ones(1, 2)])
    with pytest.raises(ValueError, match=r"define mask_sampled_loss\(self, batch\) in the module .* score=fisher"):
        compute("fisher_sampled", {"weight": model.weight}, context)


def test_draws_of_ranks_differ(monkeypatch: pytest.MonkeyPatch):
    x = torch.ones(30, 2)
    here = fisher(0, [x])[1][0]
    monkeypatch.setattr("lightning_mask.core.criteria.context.rank", lambda: 1)
    assert not torch.equal(fisher(0, [x])[1][0], here)
