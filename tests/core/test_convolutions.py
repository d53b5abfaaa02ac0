"""Convolutions that do something of their own before torch's convolution: what their kernel meets is seen there."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from lightning_mask.core import Context
from lightning_mask.core.criteria import compute
from lightning_mask.core.one_shot.layers import gram
from lightning_mask.tasks.efficientnet import SamePadConv2d


class Standardised(nn.Conv2d):
    """With a kernel of mean 0 in each output unit."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class ByKeyword(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(weight=self.weight, input=2 * x, stride=self.stride, padding=[1], groups=self.groups)


class Unfolded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight.flatten(1) @ nn.functional.unfold(x, self.kernel_size)  # type: ignore[arg-type]


class Wider(nn.Conv2d):
    """By a convolution with another kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, torch.cat([self.weight, -self.weight]), None, self.stride, self.padding)  # type: ignore[arg-type]


def blurred(x: Tensor) -> Tensor:
    return conv2d(x, torch.ones(2, 1, 3, 3), padding=1, groups=2)


class Blurred(nn.Conv2d):
    """Of what another convolution makes of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(blurred(x))


class Partly(nn.Conv2d):
    """Of an image of which not all can be seen."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return super().forward(x * seen)


def norms(layer: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """By the score of a weight of ones."""
    with torch.no_grad():
        layer.weight.fill_(1)
    context = Context(layer, loss=lambda batch: layer(batch).mean(), batches=lambda: [x])
    return compute("wanda", {"weight": layer.weight}, context)["weight"]


@pytest.mark.parametrize("side", [4, 8, 9])
def test_a_layer_that_pads_by_itself_meets_what_it_padded(side: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, side, side)
    missing = (-(-side // 2) - 1) * 2 + 5 - side
    padded = pad(x, [missing // 2, missing - missing // 2] * 2)
    for groups in (1, 3):
        own, plain = SamePadConv2d(6, 6, 5, 2, groups), nn.Conv2d(6, 6, 5, 2, groups=groups, bias=False)
        assert own(x).shape == plain(padded).shape
        assert torch.equal(norms(own, x), norms(plain, padded))
        squares = gram(own, ((x,), {}), torch.float64)
        assert torch.equal(squares, gram(plain, ((padded,), {}), torch.float64))
        assert squares.diagonal(dim1=1, dim2=2).min() > 0


def test_a_layer_that_makes_its_kernel_or_its_input_anew_meets_what_comes_to_the_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, 6, 7)
    plain = nn.Conv2d(4, 6, 3, 2, padding=1, groups=2, bias=False)
    assert torch.equal(norms(Standardised(4, 6, 3, 2, padding=1, groups=2), x), norms(plain, x))
    x2 = torch.randn(2, 2, 6, 7)
    assert torch.equal(norms(Blurred(2, 3, 3), x2), norms(nn.Conv2d(2, 3, 3), blurred(x2)))
    assert torch.equal(norms(ByKeyword(4, 6, 3, 2, padding=0, groups=2), x), norms(plain, 2 * x))


def test_a_layer_that_never_comes_to_a_convolution_of_its_weight_is_taken_for_one_of_torch() -> None:
    x = torch.randn(1, 2, 5, 5)
    for own in (Unfolded(2, 3, 3, padding=1), Wider(2, 3, 3, padding=1)):
        assert torch.equal(norms(own, x), norms(nn.Conv2d(2, 3, 3, padding=1), x))


def test_what_else_a_layer_is_called_with_counts() -> None:
    own, plain, x = Partly(2, 3, 3), nn.Conv2d(2, 3, 3), torch.randn(1, 2, 5, 5)
    seen = torch.rand(1, 1, 5, 5) < 0.5
    assert torch.equal(gram(own, ((x,), {"seen": seen}), torch.float64), gram(plain, ((x * seen,), {}), torch.float64))
    context = Context(own, loss=lambda batch: own(*batch).mean(), batches=lambda: [(x, seen)])
    expected = norms(plain, x * seen)
    with torch.no_grad():
        own.weight.fill_(1)
    assert torch.equal(compute("wanda", {"weight": own.weight}, context)["weight"], expected)


@pytest.mark.parametrize("kernel", [2, 4])
def test_an_odd_zero_of_the_same_size_is_behind(kernel: int) -> None:
    own, x = nn.Conv1d(2, 3, kernel, padding="same"), torch.randn(2, 2, 9)
    plain, padded = nn.Conv1d(2, 3, kernel), pad(x, ((kernel - 1) // 2, kernel // 2))
    torch.testing.assert_close(own(x).shape, plain(padded).shape)
    assert torch.equal(norms(own, x), norms(plain, padded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_of_a_run_in_another_precision_does_not_matter(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3).to(dtype), torch.randn(1, 2, 5, 5).to(dtype)
    expected = norms(layer, x)
    torch.set_default_dtype(dtype)
    try:
        found = norms(layer, x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
