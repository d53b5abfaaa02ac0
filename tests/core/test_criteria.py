import dataclasses
import functools
import importlib
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_mask import criterion
from lightning_mask.core import Context, criteria
from lightning_mask.core.criteria import CRITERIA, compute, get, is_own, named_seed, random_scores

# One linear unit y = w.x + b without activation; loss = mean over the batch of (y - t)^2, so
# dL/dw_j = mean of 2 (y - t) x_j and dL/db = mean of 2 (y - t), which is done by hand below.
WEIGHT, BIAS = [[2.0, -1.0]], [0.5]
BATCHES = [
    (torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.5], [0.5]])),  # y = 2.5, -0.5; y - t = 2, -1
    (torch.tensor([[1.0, 1.0], [-1.0, 2.0]]), torch.tensor([[2.5], [-3.5]])),  # y = 1.5, -3.5; y - t = -1, 0
]
# batch 1: dw = (2*2*1 + 0)/2, (0 - 2*1*1)/2 = 2, -1; db = (4 - 2)/2 = 1
# batch 2: dw = (2*-1*1 + 0)/2, (2*-1*1 + 0)/2 = -1, -1; db = -1
GRADIENTS = [([[2.0, -1.0]], [1.0]), ([[-1.0, -1.0]], [-1.0])]


def unit() -> nn.Linear:
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(WEIGHT))
        model.bias.copy_(torch.tensor(BIAS))
    return model


REFERENCE = {"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.tensor([0.0])}


def context(model: nn.Module, batches: Iterable[object] = BATCHES, **more: object) -> Context:
    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    return Context(model, loss=loss, batches=lambda: batches, **more)  # type: ignore[arg-type]


def run(score: str, model: nn.Module, **more: object) -> dict[str, Tensor]:
    return compute(score, dict(model.named_parameters()), context(model, **more))  # type: ignore[arg-type]


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


class Awkward(nn.Module):
    """Dropout, batch statistics, a frozen tensor, one that the loss does not reach, mixed modes, gradients at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last, self.unused = nn.Linear(4, 1), nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
        self.first.weight.requires_grad_(False)
        self.train()
        self.drop.eval()
        self.unused.eval()
        self.last.weight.grad = torch.full_like(self.last.weight, 7.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.first(x)))
        return self.last(self.blocks[1](self.blocks[0](x)))


def everything(model: nn.Module) -> list[object]:
    return [
        {n: t.clone() for n, t in model.state_dict().items()},
        {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
        {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()},
        torch.get_rng_state(),
    ]


def assert_same(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("score", sorted({*CRITERIA} - {"head_activation"}))  # there are no heads
@pytest.mark.parametrize("grad_enabled", [True, False])
def test_the_model_is_left_as_it_was(score: str, grad_enabled: bool):
    torch.manual_seed(0)
    model, batches = Awkward(), [(torch.randn(5, 3), torch.randn(5, 1)) for _ in range(2)]
    before = everything(model)
    of_layers = score in ("wanda", "activation")
    scope = {n: p for n, p in model.named_parameters() if not of_layers or n in ("first.weight", "last.weight")}
    more = {"sampled_loss": lambda batch: (model(batch[0]) - torch.rand(5, 1)).square().mean()}
    with torch.set_grad_enabled(grad_enabled):
        start = {name: 2 * p.detach() + 1 for name, p in model.named_parameters()}
        scores = compute(score, scope, context(model, batches, reference=start, **more))
    for now, then in zip(everything(model), before, strict=True):
        if isinstance(then, dict) and isinstance(next(iter(then.values())), tuple):
            assert now.keys() == then.keys()  # type: ignore[attr-defined]
            for name in then:
                for x, y in zip(now[name], then[name], strict=True):  # type: ignore[index]
                    assert torch.equal(x, y) if isinstance(x, Tensor) else x == y, name
        elif isinstance(then, Tensor):
            assert torch.equal(now, then)  # type: ignore[arg-type]
        else:
            assert_same(now, then)
    assert [*scores] == [*scope]
    of_gradients = (
        "gradient",
        "fisher",
        "fisher_per_example",
        "fisher_sampled",
        "snip",
        "taylor",
        "relative_gradient",
        "grad_variance",
    )
    if score in of_gradients:
        assert scores["first.weight"].abs().sum() > 0, "a frozen tensor can be scored"
        assert scores["unused.weight"].abs().sum() == 0, "what the loss does not reach scores zero"


def test_gradients_are_taken_in_eval_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.9)).train()
    seen = []
    model[1].register_forward_hook(lambda m, *_: seen.append(m.training))
    run("fisher", model)
    assert seen == [False, False]


def test_the_model_is_put_back_when_the_loss_fails():
    model = Awkward()
    modes = {n: m.training for n, m in model.named_modules()}

    def fail(_: object) -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        compute("fisher", dict(model.named_parameters()), Context(model, loss=fail, batches=lambda: [1]))
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not model.first.weight.requires_grad


def test_the_model_is_put_back_when_a_criterion_stops_early_or_fails():
    model = Awkward()
    modes = {n: m.training for n, m in model.named_modules()}
    params = dict(model.named_parameters())
    batches = [(torch.randn(5, 3), torch.randn(5, 1)) for _ in range(3)]

    def first_batch(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        for gradients in context.gradients(params):
            return gradients
        raise AssertionError

    def stumbles(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        for _ in context.gradients(params):
            raise KeyError("mine")
        raise AssertionError

    compute(first_batch, params, context(model, batches))
    assert {n: m.training for n, m in model.named_modules()} == modes
    with pytest.raises(KeyError, match="mine") as error:
        compute(stumbles, params, context(model, batches))
    assert error.value is not None  # its traceback is alive
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not model.first.weight.requires_grad


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


def test_nan_is_refused_by_name():
    model = unit()
    bad = [(torch.tensor([[1.0, float("nan")]]), torch.tensor([[0.0]]))]
    with pytest.raises(ValueError, match="'fisher' gave nan for weight"):
        run("fisher", model, batches=bad)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"weight": torch.zeros(1, 2)}, "no score for bias"),
        ({"weight": torch.zeros(2), "bias": torch.zeros(1)}, r"shape \(2,\) for weight of \(1, 2\)"),
        ({"weight": torch.full((1, 2), torch.nan), "bias": torch.zeros(1)}, "gave nan for weight"),
        (None, "returned NoneType; it must return a dict of names to tensors"),
        ({"weight": [[1.0, 2.0]], "bias": torch.zeros(1)}, "returned list for weight; it must be a tensor of real"),
        ({"weight": torch.ones(1, 2) * 1j, "bias": torch.zeros(1)}, "returned torch.complex64 for weight"),
    ],
)
def test_what_a_criterion_may_not_return(returned: dict[str, Tensor], says: str):
    model = unit()

    def mine(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return returned

    with pytest.raises(ValueError, match="'mine'") as error:
        compute(mine, dict(model.named_parameters()), context(model))
    error.match(says)


def test_scores_that_tell_nothing_apart_are_warned_of():
    model = unit()
    weight = {"weight": model.weight}
    with pytest.warns(UserWarning, match="'change' scored every entry 0, so the first entries are taken.* refresh="):
        compute("change", weight, context(model, reference=weight))
    with pytest.warns(UserWarning, match="'grad_variance' scored every entry 0"):
        compute("grad_variance", weight, context(model, BATCHES[:1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute("change", weight, context(model, reference={"weight": torch.tensor([[2.0, 1.0]])}))
        compute("magnitude", {"weight": torch.zeros(1, 2)}, Context(model))  # as with depths, which may all be 0


class Moves(nn.Linear):
    """As one with a second network that follows, a queue, and a buffer that is made anew."""

    def __init__(self, parameter: bool) -> None:
        super().__init__(2, 1)
        self.follower = nn.Parameter(torch.zeros(2), requires_grad=False)
        self.register_buffer("queue", torch.zeros(3))
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("one", torch.ones(1).expand(4))
        self.moves_parameter = parameter

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.queue[1] += 1  # type: ignore[index, operator]
        self.average = batch[0].mean()
        self.cache = torch.ones(7)
        self.seen.resize_(2).fill_(1)  # type: ignore[operator]
        if self.moves_parameter:
            self.follower.data = self.follower.data + 1
        return (self(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("score", ["fisher", "wanda", "grasp"])
def test_a_loss_that_moves_buffers_leaves_them_and_one_that_moves_parameters_is_named(score: str):
    model = Moves(parameter=False)
    where = {"weight": model.weight}
    compute(score, where, Context(model, model.loss, lambda: BATCHES))
    assert not model.queue.any()  # type: ignore[operator]
    assert model.average == 0
    assert (len(model.cache), len(model.seen)) == (7, 2), "what grew is left as it is"  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        compute(score, where, Context(model, lambda batch: model.loss(batch) * (1 // 0), lambda: BATCHES))
    assert not model.queue.any(), "also after an error"  # type: ignore[operator]
    model = Moves(parameter=True)
    where = {"weight": model.weight}
    with pytest.warns(UserWarning, match=r"moved follower, .*Define mask_loss\(self, batch\)"):
        compute(score, where, Context(model, model.loss, lambda: BATCHES))


def test_a_buffer_that_was_made_for_inference_is_left_alone():
    model = Moves(parameter=False)
    with torch.inference_mode():
        model.average = torch.minimum(model.average, torch.ones(()))  # type: ignore[assignment, arg-type]
    frozen = model.follower
    with torch.inference_mode():
        frozen.data = torch.zeros(2)
    compute("fisher", {"weight": model.weight}, Context(model, model.loss, lambda: BATCHES))


def test_cudnn_is_off_for_recurrent_layers_in_eval_mode_and_as_it_was_afterwards():
    for net, on in ((nn.GRU(2, 3), False), (nn.Linear(2, 3), True)):
        seen = []

        def loss(batch: tuple[Tensor, Tensor], net: nn.Module = net, seen: list[bool] = seen) -> Tensor:
            seen.append(torch.backends.cudnn.enabled)
            out = net(batch[0])
            return (out if isinstance(out, Tensor) else out[0]).square().mean()

        compute("fisher", dict(net.named_parameters()), Context(net, loss, lambda: BATCHES))
        assert seen == [on, on]
        assert torch.backends.cudnn.enabled


@pytest.mark.usefixtures("registry")
def test_functions_and_objects_of_all_kinds_are_criteria():
    def doubled(function: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
        @functools.wraps(function)
        def called(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
            return function(params, context, 2)

        return called

    @doubled
    def wrapped(params: Mapping[str, Tensor], context: Context, power: int) -> dict[str, Tensor]:
        return far(params, context, power)

    @dataclasses.dataclass
    class Unhashable:
        power: int

        def __call__(self, params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
            return far(params, context, self.power)

    @criterion("to_the_power")
    def to_the_power(params: Mapping[str, Tensor], context: Context, power: int) -> dict[str, Tensor]:
        return far(params, context, power)

    model = unit()
    for score in (wrapped, Unhashable(2), functools.partial(to_the_power, power=2), functools.partial(Unhashable(2))):
        criteria.require(score, ["weight"], model)
        assert compute(score, {"weight": model.weight}, Context(model))["weight"].tolist() == [[4.0, 1.0]]
    with pytest.raises(ValueError, match="to_the_power cannot be called with params and context alone"):
        get("to_the_power")


@pytest.mark.usefixtures("registry")
def test_a_criterion_says_before_training_what_it_cannot_score():
    def check(names: Sequence[str], model: nn.Module) -> None:
        raise ValueError(f"not {names} of {type(model).__name__}")

    @criterion("never", check=check)
    def never(params: Mapping[str, Tensor], context: Context, power: int = 1) -> dict[str, Tensor]:
        return far(params, context, power)

    for score in ("never", never, functools.partial(never, power=2)):
        with pytest.raises(ValueError, match=r"not \['weight'\] of Linear"):
            criteria.require(score, ["weight"], unit())
    for score in ("last_layers", "first_layers"):
        with pytest.raises(ValueError, match="Linear has no repeated blocks"):
            criteria.require(score, ["weight"], unit())
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(ValueError, match=r"The layer of out_proj\.weight was not run"):
        criteria.require("wanda", ["out_proj.weight"], attention)


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


def test_without_data_loss_or_reference_it_says_so():
    model = unit()
    params = dict(model.named_parameters())
    with pytest.raises(ValueError, match="needs training batches"):
        compute("fisher", params, Context(model))
    with pytest.raises(ValueError, match="needs a loss"):
        compute("fisher", params, Context(model, batches=lambda: [1]))
    with pytest.raises(ValueError, match="gave none"):
        compute("fisher", params, context(model, []))
    with pytest.raises(ValueError, match="from the start of training"):
        _ = Context(model).reference


@pytest.fixture
def registry() -> Iterator[None]:
    before = dict(CRITERIA)
    yield
    CRITERIA.clear()
    CRITERIA.update(before)


@pytest.mark.usefixtures("registry")
def test_a_criterion_of_ones_own():
    @criterion("last_minus_first")
    def last_minus_first(params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return {name: (p - context.reference[name]).abs() for name, p in params.items()}

    model = unit()
    reference = {"weight": torch.tensor([[1.0, 1.0]]), "bias": torch.tensor([0.0])}
    scores = run("last_minus_first", model, reference=reference)
    assert scores["weight"].tolist() == [[1.0, 2.0]]
    assert scores["bias"].tolist() == [0.5]
    assert not scores["weight"].requires_grad
    with pytest.raises(ValueError, match="named 'magnitude' exists already"):
        criterion("magnitude")(last_minus_first)
    assert criterion("last_minus_first")(last_minus_first) is last_minus_first, "a module loaded again"


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"'fischer' is unknown; did you mean 'fisher'\?.*@criterion"):
        run("fischer", unit())
    with pytest.raises(ValueError, match="name of a criterion or a function"):
        compute(3, {}, Context(unit()))  # type: ignore[arg-type]


def test_a_criterion_in_a_file_of_the_user_is_found_by_its_path(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_criteria.py").write_text(
        "def smallest(params, context):\n    return {n: -p.abs() for n, p in params.items()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    function = get("my_criteria.smallest")
    w = torch.tensor([1.0, -2.0])
    assert torch.equal(function({"w": w}, Context(nn.Linear(1, 1)))["w"], torch.tensor([-1.0, -2.0]))
    with pytest.raises(ValueError, match=r"score='my_criteria.largest' cannot be imported"):
        get("my_criteria.largest")
    with pytest.raises(ValueError, match=r"score='nowhere.smallest' cannot be imported"):
        get("nowhere.smallest")
    (tmp_path / "my_criteria.py").write_text("def alone(params):\n    return params\n")
    importlib.reload(sys.modules["my_criteria"])
    with pytest.raises(ValueError, match=r"alone cannot be called with params and context alone .* takes \(params\)"):
        get("my_criteria.alone")


def far(params: Mapping[str, Tensor], context: Context, power: int = 1) -> dict[str, Tensor]:
    return {name: p.detach().abs() ** power for name, p in params.items()}


class Far:
    def __call__(self, params: Mapping[str, Tensor], context: Context) -> dict[str, Tensor]:
        return far(params, context, 2)


@pytest.mark.parametrize(
    ("score", "name"), [(functools.partial(far, power=2), "far(power=2)"), (Far(), "Far"), (far, "far")]
)
def test_a_partial_and_an_object_that_can_be_called_are_criteria_with_a_name(score: criteria.Criterion, name: str):
    assert criteria.name_of(score) == name
    with pytest.raises(ValueError, match=re.escape(f"The criterion '{name}' gave nan for w")):
        compute(score, {"w": nn.Parameter(torch.tensor([float("nan")]))}, context(unit()))
    register = criterion(f"a test's own {name} {type(score).__name__}")
    assert register(score) is register(score) is score
    with pytest.raises(ValueError, match="exists already"):
        register(lambda params, context: {})
    assert criteria.name_of(score) == f"a test's own {name} {type(score).__name__}"
