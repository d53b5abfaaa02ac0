from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_mask.core import Context, Selection
from lightning_mask.core.criteria import compute, get, may_need_reference, name_of
from lightning_mask.core.criteria.weights import spectral
from lightning_mask.core.selection import select


def score(name: str, model: nn.Module | None = None, **params: Tensor) -> dict[str, Tensor]:
    return compute(name, params, Context(model or nn.Linear(1, 1)))


# [[2, 1], [1, 2]] has the eigenvalues 3 along (1, 1) and 1 along (1, -1): of rank 1 it is 1.5 everywhere.
SQUARE = [[2.0, 1.0], [1.0, 2.0]]


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor(SQUARE),
        torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0]]),
        torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0]]),
        torch.tensor([[2.0, -1.0], [-1.0, 2.0]]),
        torch.tensor(SQUARE).view(2, 1, 2, 1),
    ],
    ids=["square", "wide", "tall", "signs", "convolution"],
)
def test_spectral_is_the_magnitude_of_the_nearest_matrix_of_that_rank(matrix: Tensor):
    of_rank_one = compute(partial(spectral, rank=1), {"w": matrix}, Context(nn.Linear(1, 1)))["w"]
    expected = torch.where(matrix == 0, 0.0, 1.5)
    torch.testing.assert_close(of_rank_one, expected)
    whole = compute(partial(spectral, rank=2), {"w": matrix}, Context(nn.Linear(1, 1)))["w"]
    torch.testing.assert_close(whole, matrix.abs())


def test_spectral_keeps_what_a_sum_of_outer_products_was_made_of():
    torch.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(50, 40))[0], torch.linalg.qr(torch.randn(60, 40))[0]
    sizes = torch.arange(40, 0, -1).float()
    parts = [size * torch.outer(left[:, i], right[:, i]) for i, size in enumerate(sizes)]
    matrix, leading = sum(parts), sum(parts[:32])
    assert isinstance(matrix, Tensor)
    assert isinstance(leading, Tensor)
    scores = score("spectral", w=matrix, t=matrix.T.contiguous(), v=torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(scores["w"], leading.abs(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores["t"], leading.T.abs(), atol=1e-5, rtol=1e-5)
    assert scores["v"].tolist() == [1.0, 2.0], "a vector is its own approximation"


@pytest.mark.parametrize("rank", [0, -1, 1.5, True])
def test_spectral_refuses_a_rank_that_is_none(rank: object):
    with pytest.raises(ValueError, match="must be a whole number from 1"):
        spectral({}, Context(nn.Linear(1, 1)), rank=rank)  # type: ignore[arg-type]


def test_snr_by_hand():
    # The quartiles of 1, 2, 5, 10 are 1.75 and 6.25, so sigma = 4.5 / 1.349 = 3.3358. The edge of a square matrix is
    # 2 sigma = 6.67: signal 10, noise 8. That of 4 x 64 is 1.25 sigma = 4.17: signal 15, noise 3. Then over the largest, 10.
    values = torch.tensor([2.0, 10.0, 1.0, 5.0])
    wide = torch.zeros(4, 64)
    wide[:, :4] = torch.diag(values)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    scores = score(
        "snr",
        square=turn @ torch.diag(values) @ turn.T,
        wide=wide,
        tall=wide.T,
        convolution=wide.view(4, 16, 2, 2),
        even=torch.eye(3) * 2,
        zeros=torch.zeros(3, 3),
        vector=torch.tensor([3.0, 4.0]),
    )
    expected = {"square": 10 / 8 / 10, "wide": 0.5, "tall": 0.5, "convolution": 0.5, "zeros": 0.0, "vector": 0.0}
    # Equal singular values have no spread: everything is signal, 6, noise counts as 1, over the largest, 2.
    for name, value in {**expected, "even": 3.0}.items():
        torch.testing.assert_close(scores[name], torch.full_like(scores[name], value), msg=name)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.early = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        self.between = nn.LayerNorm(2)
        self.late = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
        self.head = nn.Linear(2, 3)


def test_depth_by_hand():
    model = Blocks()
    tops = {"embed": 0.0, "early.0": 1.0, "early.1": 2.0, "between": 2.0, "late.0": 3.0, "late.1": 4.0, "head": 5.0}
    params = dict(model.named_parameters())
    last, first = score("last_layers", model, **params), score("first_layers", model, **params)
    for name in params:
        depth = next(d for top, d in tops.items() if name.startswith(f"{top}."))
        assert last[name].unique().tolist() == [depth], name
        assert first[name].unique().tolist() == [-depth], name
    with pytest.raises(ValueError, match="Linear has no repeated blocks"):
        score("last_layers", w=torch.zeros(1))


def test_a_budget_of_last_layers_goes_to_the_last_whole_tensors():
    model = Blocks()
    masks = select(Selection(score="last_layers", density=15, structure="tensor"), model, Context(model))
    active = [name for name, mask in masks.items() if mask.all()]
    assert active == ["late.1.0.weight", "late.1.0.bias", "head.weight", "head.bias"]
    assert masks.count() == 15


def test_a_partial_is_told_apart_in_the_recipe_and_needs_no_reference():
    score = partial(spectral, rank=16)
    assert name_of(score) == "spectral(rank=16)"
    assert name_of(partial(spectral, rank=8)) != name_of(score)
    assert name_of(spectral) == name_of("spectral") == "spectral"
    assert Selection(score=score, density=0.1).recipe()["score"] == "spectral(rank=16)"
    assert get("fisher") is get("child_tuning_d")
    assert not any(may_need_reference(s) for s in ("random", "fisher", "wanda", score, partial(get("fisher"))))
    assert may_need_reference("change")
    assert may_need_reference(partial(get("change")))
    assert may_need_reference(lambda params, context: params)


@pytest.mark.parametrize("wrong", [partial(spectral, ranks=16), partial(spectral, {}, None, 16, 17)])
def test_a_partial_with_arguments_that_the_function_does_not_take_is_refused_at_once(wrong: partial[object]):
    with pytest.raises(
        ValueError, match=r"score=spectral\(.*\) cannot be called with params and context alone .* rank"
    ):
        Selection(score=wrong, density=0.1)  # type: ignore[arg-type]
