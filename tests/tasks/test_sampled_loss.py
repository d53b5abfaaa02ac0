"""The loss against labels drawn from the network's own predictions."""

import torch
from torch import Tensor, nn

from lightning_mask.tasks.classifier import Classifier


class Fixed(Classifier):
    """Gives every example the same logits."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__(len(logits))
        self.net = nn.Module()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.logits.expand(len(batch["labels"]), -1)


def test_labels_are_drawn_as_the_network_predicts_them_whatever_the_data_says() -> None:
    chances = torch.tensor([0.5, 0.2, 0.3])
    model = Fixed(chances.log().tolist())
    n = 20_000
    torch.manual_seed(0)
    loss = model.mask_sampled_loss({"labels": torch.zeros(n, dtype=torch.int64)})
    loss.backward()
    # The gradient of the mean loss by the logits is the chances less the share of each label.
    assert model.logits.grad is not None
    shares = chances - model.logits.grad
    torch.testing.assert_close(shares, chances, atol=0.02, rtol=0)
    torch.testing.assert_close(loss.detach(), -(shares * chances.log()).sum())
    assert not torch.equal(shares, chances), "they are drawn, not counted"
