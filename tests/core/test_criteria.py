"""The formulas of criteria, by hand."""

import pytest
import torch
from linear_unit import BATCHES, GRADIENTS, REFERENCE, context, run, unit
from torch import nn

from lightning_mask.core import Context
from lightning_mask.core.criteria import CRITERIA, compute, is_own, named_seed, random_scores

ROOT = 2**0.5 / 5**0.5  # of the norms of the two batches' gradients, 5**0.5 and 2**0.5, over that of the weight, 5**0.5


@pytest.mark.parametrize(
    ("score", "weight", "bias"),
    [
        ("magnitude", [[2.0, 1.0]], [0.5]),
        ("magnitude_lowest", [[-2.0, -1.0]], [-0.5]),
        ("gradient", [[3.0, 2.0]], [2.0]),  # |2| + |-1|, |-1| + |-1|; |1| + |-1|: signs must not cancel
        ("fisher", [[2.5, 1.0]], [1.0]),  # (4 + 1) / 2, (1 + 1) / 2; (1 + 1) / 2
        ("child_tuning_d", [[2.5, 1.0]], [1.0]),
        # Example by example dw, db: (4, 0), 4; (0, -2), -2; (-2, -2), -2; (0, 0), 0.
        ("fisher_per_example", [[5.0, 2.0]], [6.0]),
        ("snip", [[1.0, 1.0]], [0.0]),  # the mean gradient is 0.5, -1; 0, and meets 2, -1; 0.5
        ("taylor", [[10.0, 1.0]], [0.25]),  # 2.5 * 4, 1 * 1; 1 * 0.25
        ("movement", [[-1.0, -1.0]], [0.0]),  # -0.5 * 2, 1 * -1
        ("relative_gradient", [[(1 + ROOT) / 2] * 2], [2.0]),  # the bias: (1 / 0.5 + 1 / 0.5) / 2
        ("grad_variance", [[2.25, 0.0]], [1.0]),  # 2.5 - 0.25, 1 - 1; 1 - 0
        # The Hessian is twice the mean of (x, 1)(x, 1)^T over the four examples: [[1.5, -0.5, 0.5], [-0.5, 3, 2], [0.5, 2, 2]],
        # so that Hg = 1.25, -3.25; -1.75.
        ("grasp", [[2.5, 3.25]], [-0.875]),
        ("change", [[1.0, 2.0]], [0.5]),
        ("magnitude_increase", [[1.0, 0.0]], [0.5]),
    ],
)
def test_by_hand(score: str, weight: list[list[float]], bias: list[float]):
    scores = run(score, unit(), reference=REFERENCE)
    torch.testing.assert_close(scores["weight"], torch.tensor(weight))
    torch.testing.assert_close(scores["bias"], torch.tensor(bias))
    assert not any(s.requires_grad for s in scores.values())


def test_gradients_batch_by_batch_by_hand():
    model = unit()
    found = [
        (g["weight"].tolist(), g["bias"].tolist()) for g in context(model).gradients(dict(model.named_parameters()))
    ]
    assert found == GRADIENTS


def test_random_scores_depend_on_name_and_seed_alone():
    shapes = {"a": (3, 4), "b": (3, 4)}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = random_scores(shapes, 5)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is not drawn from"
    torch.manual_seed(2)
    assert torch.equal(one["a"], random_scores({"z": (9,), "a": (3, 4)}, 5)["a"])
    assert not torch.equal(one["a"], one["b"])
    assert not torch.equal(one["a"], random_scores(shapes, 6)["a"])
    assert named_seed(0, "encoder.weight") == 5078853762997613186, "written down: masks of old recipes stay the same"


def test_low_precision_is_summed_in_float32():
    model = nn.Linear(4, 2).to(torch.bfloat16)
    batches = [
        (torch.full((1, 4), i, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.bfloat16)) for i in (1, 2, 3)
    ]
    ours = {score for score in CRITERIA if not is_own(score)}
    others = {"fisher_sampled", "activation", "head_activation", "last_layers", "first_layers", "magnitude_lowest"}
    for score in sorted(ours - others):
        scope = {"weight": model.weight}
        start = {"weight": 2 * model.weight.detach()}
        dtype = compute(score, scope, context(model, batches, reference=start))["weight"].dtype
        assert dtype == (torch.bfloat16 if score == "magnitude" else torch.float32), score
    ones = [torch.ones(1, 4, dtype=torch.bfloat16)] * 300  # in bfloat16 a sum of ones stands still at 256
    each = Context(model, loss=lambda x: model(x).sum(), batches=lambda: ones)
    assert torch.equal(compute("gradient", {"weight": model.weight}, each)["weight"], torch.full((2, 4), 300.0))


def test_random_scores_are_the_same_whatever_the_default_dtype():
    expected = random_scores({"a": (50,)}, 3)["a"]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(random_scores({"a": (50,)}, 3)["a"], expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_of_a_sparse_embedding_are_seen_dense():
    table = nn.Embedding(5, 3)
    batches = [torch.tensor([1, 2, 2]), torch.tensor([4])]
    found = []
    for table.sparse in (False, True):
        context = Context(table, lambda x: table(x).square().sum(), lambda: batches)
        found.append([compute(s, {"weight": table.weight}, context) for s in ("grad_variance", "relative_gradient")])
    for dense, sparse in zip(*found, strict=True):
        assert torch.equal(dense["weight"], sparse["weight"])


def test_relative_gradients_of_double_precision():
    model = unit().double()
    batches = [(x.double(), t.double()) for x, t in BATCHES]
    weight = run("relative_gradient", model, batches=batches)["weight"]
    torch.testing.assert_close(weight, torch.full((1, 2), (1 + ROOT) / 2))
