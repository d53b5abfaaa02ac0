"""Pruning a layer without training: the optimal updates, exact counts, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_mask.core.one_shot import OneShot, Pruned, prune

METHODS = ["magnitude", "wanda", "obs"]


def correlated(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs that say much about each other, of unequal sizes, float64 [rows, width]."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mixed = mixed @ torch.randn(width, width, generator=generator, dtype=torch.float64)
    return mixed * torch.linspace(0.2, 3.0, width, dtype=torch.float64)


def one_layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def pruned(model: nn.Module, *batches: Any, **recipe: Any) -> Pruned:
    return prune(OneShot(**{"scope": "*weight", **recipe}), model, model, batches)


def damped(x: Tensor, damping: float) -> Tensor:
    hessian = 2 * x.T @ x
    return hessian + damping * hessian.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype)


@pytest.mark.parametrize("q", [0, 2, 4])
def test_one_pruned_weight_moves_the_later_ones_as_hassibi_and_stork_say(q: int) -> None:
    x, weight = correlated(40, 5), torch.tensor([[1.0, -2.0, 1.5, 0.7, -1.1]], dtype=torch.float64)
    weight[0, q] = 1e-3
    inverse = damped(x, 0.01)[q:, q:].inverse()  # of what can still move
    expected = weight.clone()
    expected[0, q:] -= weight[0, q] / inverse[0, 0] * inverse[:, 0]
    layer = one_layer(weight)
    result = pruned(layer, x, method="obs", sparsity=0.2)
    assert result.masks["weight"].tolist() == [[i != q for i in range(5)]]
    assert layer.weight[0, q] == 0
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-9, atol=1e-12)
    assert (expected[0, q + 1 :] != weight[0, q + 1 :]).all()


def test_the_weight_that_costs_least_is_pruned() -> None:
    generator = torch.Generator().manual_seed(3)
    others = 0
    for seed in range(20):
        x, weight = correlated(30, 6, seed), torch.randn(1, 6, generator=generator, dtype=torch.float64)
        hessian = damped(x, 0.01)
        cost = [float(weight[0, j] ** 2 / hessian[j:, j:].inverse()[0, 0]) for j in range(6)]
        least = min(range(6), key=cost.__getitem__)
        others += least != int(weight.abs().argmin())
        result = pruned(one_layer(weight), x, method="obs", sparsity=1 / 6)
        assert (~result.masks["weight"]).nonzero().tolist() == [[0, least]]
    assert others > 3, "the cases do not tell the cost from the size"


def test_what_stays_is_the_least_squares_optimum_when_the_first_columns_go() -> None:
    x, weight = correlated(50, 8), torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight[:, :3] *= 1e-4
    hessian = damped(x, 0.02)
    expected = weight[:, 3:] + torch.linalg.solve(hessian[3:, 3:], hessian[3:, :3] @ weight[:, :3].T).T
    layer = one_layer(weight)
    result = pruned(layer, x, method="obs", sparsity=3 / 8, damping=0.02)
    assert result.masks["weight"].tolist() == [[False] * 3 + [True] * 5] * 4
    torch.testing.assert_close(layer.weight.detach()[:, 3:], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("recipe", [{"sparsity": 0.5}, {"sparsity": 0.7, "allocation": "row"}, {"sparsity": "2:4"}])
@pytest.mark.parametrize("block_size", [1, 8, 13, 128])
def test_columns_go_one_after_another_whatever_the_size_of_a_block(recipe: dict[str, Any], block_size: int) -> None:
    x, weight = correlated(90, 24), torch.randn(5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    layer, expected, hessian = one_layer(weight), weight.clone(), damped(x, 0.01)
    alive = pruned(layer, x, method="obs", block_size=block_size, **recipe).masks["weight"]
    for j in range(24):
        inverse = hessian[j:, j:].inverse()
        for row in (~alive[:, j]).nonzero().flatten():
            expected[row, j:] -= expected[row, j] / inverse[0, 0] * inverse[:, 0]
    torch.testing.assert_close(layer.weight.detach(), expected * alive, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.5, 0.7, "2:4"])
def test_obs_is_nearer_to_the_dense_outputs_than_wanda_and_magnitude(sparsity: float | str) -> None:
    x, weight = (
        correlated(400, 32),
        torch.randn(24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    )
    errors, zeros = {}, {}
    for method in METHODS:
        layer = one_layer(weight)
        (report,) = pruned(layer, x, method=method, sparsity=sparsity, allocation="row").layers
        y, changed = x @ weight.T, x @ layer.weight.detach().T
        errors[method], zeros[method] = report.error, report.zeros
        assert report.error == pytest.approx(float((changed - y).norm() / y.norm()), rel=1e-9)
    assert len(set(zeros.values())) == 1
    assert errors["obs"] < errors["wanda"]
    assert errors["obs"] < errors["magnitude"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("allocation", ["uniform", "row"])
def test_the_counts_are_exact_and_what_is_pruned_is_positive_zero(method: str, allocation: str) -> None:
    x = correlated(64, 300).float()
    for rows, sparsity in ((7, 0.5), (5, 0.333), (3, 0.95), (1, 0.0)):
        layer = one_layer(-torch.rand(rows, 300, generator=torch.Generator().manual_seed(rows)))
        mask = pruned(layer, x, method=method, sparsity=sparsity, allocation=allocation).masks["weight"]
        if allocation == "row":
            assert (~mask).sum(1).tolist() == [math.floor(sparsity * 300 + 0.5)] * rows
        else:
            assert int((~mask).sum()) == math.floor(sparsity * rows * 300 + 0.5)
        gone = layer.weight.detach()[~mask]
        assert torch.equal(gone.view(torch.int32), torch.zeros_like(gone, dtype=torch.int32))
        assert layer.weight.detach()[mask].all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_n_of_every_m_neighbours_stay(method: str, n: int, m: int) -> None:
    layer = one_layer(torch.randn(6, 144, generator=torch.Generator().manual_seed(5)))
    result = pruned(layer, correlated(200, 144).float(), method=method, sparsity=f"{n}:{m}", block_size=50)
    assert (result.masks["weight"].view(-1, m).sum(1) == n).all()
    assert ((layer.weight.detach() != 0) == result.masks["weight"]).all()


def test_magnitude_and_wanda_rank_as_their_papers_say_and_leave_the_rest_as_it_was() -> None:
    weight = torch.tensor([[1.0, -2.0, 3.0, 0.5], [8.0, -7.0, 6.0, 5.0]])
    x = torch.tensor([[4.0, 0.0, 0.0, 1.0], [3.0, 1.0, 0.1, 0.0]])  # norms 5, 1, 0.1, 1
    for recipe, alive in (
        ({"method": "magnitude"}, [[0, 0, 0, 0], [1, 1, 1, 1]]),
        ({"method": "magnitude", "allocation": "row"}, [[0, 1, 1, 0], [1, 1, 0, 0]]),
        ({"method": "wanda"}, [[1, 1, 0, 0], [1, 1, 0, 0]]),
        ({"method": "wanda", "allocation": "uniform"}, [[1, 0, 0, 0], [1, 1, 0, 1]]),
    ):
        layer = one_layer(weight)
        mask = pruned(layer, x[:1], x[1:], sparsity=0.5, **recipe).masks["weight"]
        assert mask.int().tolist() == alive, recipe
        assert torch.equal(layer.weight.detach(), weight * mask)


def test_inputs_that_are_always_zero_go_first_and_what_stays_of_them_is_as_it_was() -> None:
    x, weight = correlated(60, 6), torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    x[:, [1, 4]] = 0
    weight[:, [1, 4]] += 100
    layer = one_layer(weight)
    mask = pruned(layer, x, method="obs", sparsity=0.5, allocation="row").masks["weight"]
    assert not mask[:, [1, 4]].any()
    layer = one_layer(weight)
    mask = pruned(layer, x, method="obs", sparsity=1 / 6, allocation="row").masks["weight"]
    assert not mask[:, 4].any()
    assert torch.equal(layer.weight.detach()[:, [0, 1, 2, 3, 5]], weight[:, [0, 1, 2, 3, 5]])
    layer = one_layer(weight)
    (report,) = pruned(layer, torch.zeros_like(x), method="obs", sparsity=0.5).layers
    assert (report.zeros, report.error) == (15, 0.0)
    assert layer.weight.isfinite().all()


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "stride and padding": (lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1), (5, 3, 9, 8)),
    "dilation": (lambda: nn.Conv2d(2, 4, (3, 2), dilation=2), (3, 2, 11, 10)),
    "groups": (lambda: nn.Conv2d(6, 12, 3, groups=3), (4, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, padding="same"), (4, 6, 7, 7)),
    "reflected": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (3, 2, 6, 6)),
    "one dimension": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2), (3, 4, 15)),
    "three dimensions": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 5, 3)),
    "one image": (lambda: nn.Conv2d(3, 4, 2), (3, 6, 5)),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_are_seen_as_the_rows_that_they_multiply(kind: str, method: str) -> None:
    torch.manual_seed(0)
    make, shape = CONVOLUTIONS[kind]
    layer = make().double()
    batches = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr, operator]
        before = torch.cat([layer(x).flatten() for x in batches])
        (report,) = pruned(layer, *batches, method=method, sparsity=0.4, allocation="row").layers
        after = torch.cat([layer(x).flatten() for x in batches])
    assert report.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-9)
    assert 0 < report.error < 0.8
    each = layer.weight[0].numel()  # type: ignore[union-attr, index]
    assert report.zeros == len(layer.weight) * math.floor(0.4 * each + 0.5)  # type: ignore[arg-type]


def test_a_grouped_convolution_is_its_groups_side_by_side() -> None:
    torch.manual_seed(0)
    whole = nn.Conv2d(4, 6, 3, groups=2).double()
    parts = [nn.Conv2d(2, 3, 3).double() for _ in range(2)]
    for i, part in enumerate(parts):
        part.weight.data.copy_(whole.weight.data[3 * i : 3 * i + 3])
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    pruned(whole, x, method="obs", sparsity=0.5, allocation="row")
    for i, part in enumerate(parts):
        pruned(part, x[:, 2 * i : 2 * i + 2], method="obs", sparsity=0.5, allocation="row")
    torch.testing.assert_close(whole.weight, torch.cat([part.weight for part in parts]))


class Conv1D(nn.Module):  # the name and the layout of transformers' one
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("recipe", [{"sparsity": 0.5}, {"sparsity": "2:4"}, {"sparsity": 0.3, "allocation": "row"}])
@pytest.mark.parametrize("method", METHODS)
def test_a_transposed_layer_is_pruned_as_the_other_way_round(method: str, recipe: dict[str, Any]) -> None:
    x, weight = correlated(50, 8), torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    layer, turned = one_layer(weight), Conv1D(weight.T.clone())
    mask = pruned(layer, x, method=method, **recipe).masks["weight"]
    assert torch.equal(pruned(turned, x, method=method, **recipe).masks["weight"], mask.T)
    assert torch.equal(turned.weight.T, layer.weight)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.embed, self.unused = nn.Embedding(5, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return y + self.embed.weight[0]


NARROW = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
REFUSED: list[tuple[str, Callable[[], nn.Module], dict[str, Any], list[Tensor], list[str]]] = [
    ("no batch", lambda: NARROW, {"scope": "0.weight"}, [], ["no batch"]),
    (
        "whole layer",
        lambda: NARROW,
        {"sparsity": 0.95, "scope": "*.weight"},
        [torch.randn(2, 4)],
        ["2.weight", "0.9166", "allow_whole_layers"],
    ),
    (
        "width",
        lambda: NARROW,
        {"sparsity": "2:4", "scope": "*.weight"},
        [torch.randn(2, 4)],
        ["2.weight", "width of 3", "by 4"],
    ),
    (
        "no layer",
        Attends,
        {"scope": "embed"},
        [torch.randn(2, 4)],
        ["embed.weight is no weight of a linear", "!embed.weight"],
    ),
    (
        "fused",
        Attends,
        {"scope": "attention.out_proj.weight"},
        [torch.randn(2, 4)],
        ["attention.out_proj.weight was not run"],
    ),
    (
        "not run",
        Attends,
        {"scope": "unused.weight"},
        [torch.randn(2, 4)],
        ["unused.weight was not run", "!unused.weight"],
    ),
    ("a bias", lambda: NARROW, {"scope": "0"}, [torch.randn(2, 4)], ["0.bias is no weight"]),
    ("no such name", lambda: NARROW, {"scope": "nothing.here"}, [torch.randn(2, 4)], ["'nothing.here' matches no"]),
    (
        "not finite",
        lambda: NARROW,
        {"scope": "0.weight"},
        [torch.full((2, 4), torch.inf)],
        ["0.weight meets", "not finite"],
    ),
]


@pytest.mark.parametrize(("make", "recipe", "batches", "words"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_pruned_is_refused_before_anything_changes(
    make: Callable[[], nn.Module], recipe: dict[str, Any], batches: list[Tensor], words: list[str]
) -> None:
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the words are looked at below
        prune(OneShot(**recipe), model, model, batches)
    for word in words:
        assert word in str(refused.value)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_sparsity_that_is_named_leaves_something_of_every_weight() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), torch.randn(5, 4)
    for allocation, most in (("uniform", 0.9166), ("row", 0.8333), ("erk", None)):
        recipe = {"method": "magnitude", "scope": "weights:", "allocation": allocation}
        with pytest.raises(ValueError, match="the largest that leaves something of every weight is") as refused:
            prune(OneShot(sparsity=0.99, **recipe), model, model, [x])
        named = float(str(refused.value).partition("weight is ")[2].split()[0].rstrip("."))
        assert most is None or named == most
        OneShot(sparsity=named, **recipe).quotas(model)
        with pytest.raises(ValueError, match="would prune all"):
            OneShot(sparsity=named + 0.0001, **recipe).quotas(model)
    result = prune(OneShot("magnitude", 0.99, scope="weights:", allow_whole_layers=True), model, model, [x])
    assert result.masks.count() == 0


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"method": "sparsegpt"}, "method='sparsegpt' must be one of magnitude, wanda, obs"),
        ({"sparsity": 1.0}, "sparsity=1.0 must be a share"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"sparsity": "4:2"}, "sparsity='4:2'"),
        ({"allocation": "global"}, "allocation='global' must be one of uniform, erk, row"),
        ({"damping": 0}, "damping=0 must be a number above 0"),
        ({"block_size": 0}, "block_size=0"),
        ({"scope": 3}, "scope=3"),
    ],
)
def test_values_out_of_range_are_refused(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OneShot(**recipe)
