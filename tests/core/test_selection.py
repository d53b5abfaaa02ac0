import warnings
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from lightning_mask.core import Context, MaskSet, Selection
from lightning_mask.core.allocation import Budget
from lightning_mask.core.choosing import choose, n_of_m
from lightning_mask.core.selection import select

# Choosing.


def test_rows_of_different_widths_come_nearest_to_the_budget():
    scores = {"wide": torch.tensor([[9.0] * 10, [1.0] * 10]), "thin": torch.tensor([[8.0] * 2, [7.0] * 2, [0.0] * 2])}
    cases = ((14, [1, 0], [1, 1, 0]), (12, [1, 0], [1, 0, 0]), (1, [1, 0], [0, 0, 0]), (26, [1, 1], [1, 1, 1]))
    for keep, wide, thin in cases:
        masks = choose(scores, [(list(scores), Budget(keep))], "row", "global")
        assert masks["wide"].all(1).tolist() == [bool(x) for x in wide], keep
        assert masks["thin"].all(1).tolist() == [bool(x) for x in thin], keep


def test_whole_rows_of_one_width():
    score = torch.tensor([[0.0, 9.0], [5.0, 5.0], [4.0, 4.0], [0.0, 0.0]])  # means 4.5, 5, 4, 0
    masks = choose({"w": score}, [(["w"], Budget(0.5))], "row", "global")
    assert masks["w"].tolist() == [[True, True], [True, True], [False, False], [False, False]]
    masks = choose({"w": score}, [(["w"], Budget(1))], "row", "global")
    assert masks["w"].tolist() == [[False, False], [True, True], [False, False], [False, False]], "at least one unit"


def test_n_of_m_along_the_input_dimension():
    score = torch.tensor([[1.0, 4.0, 3.0, 2.0, 5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 0.0, 1.0, 8.0, 7.0, 6.0, 9.0]])
    mask = n_of_m({"w": score}, 2, 4)["w"]
    assert mask.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 1, 0, 0, 1]]
    conv = torch.randn(3, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    mask = n_of_m({"w": conv}, 1, 4)["w"]
    assert mask.reshape(3, 2, 4).sum(2).tolist() == [[1, 1]] * 3
    with pytest.raises(ValueError, match=r"w of shape \(2, 6\) has an input width of 6, which is not divisible by 4"):
        n_of_m({"w": torch.zeros(2, 6)}, 2, 4)
    with pytest.raises(ValueError, match="b of shape"):
        n_of_m({"b": torch.zeros(8)}, 2, 4)


# Selection.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.scale = nn.Parameter(torch.tensor(0.25))
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.integers = nn.Parameter(torch.arange(3), requires_grad=False)
        self.head = nn.Linear(8, 2)
        self.tied = nn.Linear(6, 8, bias=False)
        self.tied.weight = self.body.weight


NET = Net()


def chosen(selection: Selection, model: nn.Module = NET) -> MaskSet:
    return select(selection, model, Context(model))


def test_every_parameter_gets_a_mask_of_its_shape():
    for selection in (Selection("head"), Selection("head", "magnitude", 0.5), Selection(mask=MaskSet({}))):
        masks = chosen(selection)
        assert {n: m.shape for n, m in masks.items()} == {n: p.shape for n, p in NET.named_parameters()}


def test_train_and_score_add_up():
    masks = chosen(Selection(["head", "scale"], "magnitude", 0.25, scope=["tied", "head.bias"]))
    assert masks["head.weight"].all()
    assert masks["head.bias"].all(), "what train names is not ranked"
    assert masks["scale"].all()
    assert int(masks["body.weight"].sum()) == 12
    assert not masks["body.bias"].any()
    magnitude = NET.body.weight.detach().abs()
    assert magnitude[masks["body.weight"]].min() >= magnitude[~masks["body.weight"]].max()


def test_the_default_scope_is_what_trains_and_train_does_not_name():
    assert Selection("head", "magnitude", 0.5).scope_names(NET) == ["scale", "body.weight", "body.bias"]
    assert chosen(Selection("head", "magnitude", 1.0)).count() == 1 + 48 + 8 + 18
    assert Selection(None, "magnitude", 0.5).scope_names(NET, trainable={"frozen", "head.bias"}) == [
        "frozen",
        "head.bias",
    ]


@pytest.mark.parametrize(
    ("structure", "allocated"),
    [
        *((s, a) for s in ("entry", "row", "column", "block:1x1") for a in ("global", "uniform", "erk")),
        *(("entry", "row"), ("tensor", "global"), ("layer", "global")),
    ],
)
def test_a_scope_with_awkward_shapes(structure: str, allocated: str):
    scope = ["*", "!integers"]
    masks = chosen(Selection(None, "magnitude", 0.5, scope=scope, structure=structure, allocation=allocated))
    assert masks["empty"].shape == (0, 4)
    assert 0 < masks.count() < masks.numel()


def test_the_count_is_exact():
    for density, count in ((1, 1), (7, 7), (75, 75), (0.001, 0), (0.013, 1), (0.5, 38), (1.0, 75)):
        assert chosen(Selection(None, "magnitude", density)).count() == count
    with pytest.raises(ValueError, match="81 entries were asked for and the scope has 75"):
        chosen(Selection(None, "magnitude", 81))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Selection(score="magnitude", density=0.0), "density=0.0"),
        (lambda: Selection(score="magnitude", density=1.5), "density=1.5"),
        (lambda: Selection(score="magnitude", density=0), "density=0"),
        (lambda: Selection(score="magnitude", density=-3), "density=-3"),
        (lambda: Selection(score="magnitude", density=True), "density=True"),
        (lambda: Selection(score="magnitude", density="10%"), "density='10%'"),
        (lambda: Selection(score="magnitude", density=float("nan")), "density=nan"),
        (lambda: Selection(score="magnitude"), "density=None"),
        (lambda: Selection(density=0.5), "give score="),
        (lambda: Selection("head", scope="body"), "give score="),
        (lambda: Selection(score="magnitude", density=0.5, mask="x"), "exclude each other"),
        (lambda: Selection(score="nothing", density=0.5), "'nothing' is unknown"),
        (lambda: Selection("head", structure="entries"), "structure='entries'"),
        (lambda: Selection("head", allocation="all"), "allocation='all'"),
        (lambda: Selection("head", batches=0), "batches=0"),
        (lambda: Selection(""), "non-empty string"),
        (lambda: chosen(Selection("hed")), "train: the pattern 'hed' matches no parameter"),
        (lambda: chosen(Selection("head", "magnitude", 0.5, scope="boddy")), "scope: the pattern 'boddy'"),
        (lambda: chosen(Selection("*", "magnitude", 0.5)), "nothing is left to rank"),
        (lambda: chosen(Selection(None, "magnitude", 0.5, scope="empty")), "nothing is left to rank"),
        (lambda: chosen(Selection(None, "magnitude", 0.5, scope="*")), "integers is of dtype torch.int64"),
        (lambda: chosen(Selection(mask="missing.safetensors")), "missing.safetensors"),
        (lambda: chosen(Selection(mask=MaskSet({"other": torch.ones(2)}))), "no parameter 'other'"),
        (
            lambda: chosen(Selection(mask=MaskSet({"head.bias": torch.ones(3)}))),
            r"head.bias has shape \(3,\) there and \(2,\)",
        ),
    ],
)
def test_bad_recipes_are_refused(make: Callable[[], object], says: str):
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        make()


def test_check_finds_without_data_what_select_would():
    for selection in (Selection("hed"), Selection(None, "fisher", 500), Selection("*", "fisher", 0.5)):
        with pytest.raises(ValueError):  # noqa: PT011
            selection.check(NET)
    Selection("head", "fisher", 0.5).check(NET)


def test_the_recipe_is_plain_and_says_how_the_mask_came_about():
    import json

    def mine(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in params.items()}

    recipe = chosen(Selection("head", mine, 0.5, scope=["body", "scale"])).recipe
    assert json.loads(json.dumps(recipe)) == recipe
    assert recipe["train"] == ["head"]
    assert recipe["score"].endswith("mine")
    assert recipe["density"] == 0.5
    assert recipe["scope"] == ["body", "scale"]


def test_a_given_mask_is_added_to_train():
    given = MaskSet({"body.bias": torch.tensor([True, False] * 4), "head.bias": torch.zeros(2)})
    masks = chosen(Selection("head", mask=given))
    assert torch.equal(masks["body.bias"], given["body.bias"])
    assert masks["head.bias"].all()
    assert not masks["body.weight"].any()


def test_n_of_m_lies_along_the_input_dimension_of_a_transposed_weight():
    """transformers' Conv1D and transposed convolutions keep (in, out, ...)."""
    score = torch.rand(8, 6, 1, 1, generator=torch.Generator().manual_seed(0))
    across = n_of_m({"w": score}, 2, 4, transposed={"w": 1})["w"]
    along = n_of_m({"w": score.transpose(0, 1).contiguous()}, 2, 4)["w"]
    assert torch.equal(across, along.transpose(0, 1))
    assert across.shape == score.shape
    assert across.view(2, 4, 6).sum(1).tolist() == [[2] * 6] * 2
    with pytest.raises(ValueError, match=r"w of shape \(6, 8\) has an input width of 6, which is not divisible by 4"):
        n_of_m({"w": torch.rand(6, 8)}, 2, 4, transposed={"w": 1})


def test_rows_that_are_too_narrow_for_their_share_are_told_before_training():
    net = nn.Sequential(nn.Linear(400, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    with pytest.warns(UserWarning, match=r"keeps no entry of 1\.weight, 2\.weight, so 2 of the 3 tensors"):
        Selection(score="magnitude", density=0.01, allocation="row").check(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Selection(score="magnitude", density=0.5, allocation="row").check(net)
        Selection(score="magnitude", density=7, allocation="row").check(net)
        Selection(score="magnitude", density=0.01, allocation="uniform").check(net)
