"""A criterion looks, and what it looked at is as before."""

from collections.abc import Mapping

import pytest
import torch
from linear_unit import BATCHES, context, run
from torch import Tensor, nn

from lightning_mask.core import Context
from lightning_mask.core.criteria import CRITERIA, compute


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
