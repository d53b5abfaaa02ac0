import collections
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from plain_and_ours import Net, Setting, Task, fit, make_batches, make_masks, make_net, moved, prefixed, same
from torch import Tensor, nn

from lightning_mask import FreezeMask, MaskSet, Phase, PhaseUnfreeze, PruneMask

HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
OPTIMIZER_HOOKS = [name for name in vars(torch.optim.SGD([nn.Parameter(torch.zeros(1))])) if name.endswith("_hooks")]


class BatchNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16)  # type: ignore[assignment]


class Kept(Task):
    """Keeps its optimizer, and some tensors frozen by the user."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(BatchNormed())
        self.net.most.bias.requires_grad_(False)
        self.frozen_by_user = {"net.most.bias"}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.__dict__["optimizer"] = torch.optim.AdamW(self.parameters(), lr=0.01)
        return self.__dict__["optimizer"]


def shape_of(module: nn.Module) -> list[Any]:
    """What of a module is not its weights."""
    found: list[Any] = [list(module.state_dict())]
    for name, child in module.named_modules():
        if isinstance(child, L.LightningModule):
            continue
        own = {k: v for k, v in vars(child).items() if not isinstance(v, dict | collections.OrderedDict)}
        assert all(isinstance(v, bool | int | float | str | tuple | set | list | type(None)) for v in own.values()), own
        found.append((name, type(child), sorted(vars(child)), own, [len(getattr(child, h)) for h in HOOKS]))
        found.append(child.forward.__func__)  # type: ignore[attr-defined]
    for name, p in module.named_parameters():
        found.append((name, type(p), p.requires_grad, len(p._backward_hooks or {}), sorted(vars(p))))
        found.append(len(p._post_accumulate_grad_hooks or {}) if p._post_accumulate_grad_hooks is not None else 0)
    return found


def hooks_of(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    return {name: len(getattr(optimizer, name)) for name in OPTIMIZER_HOOKS}


MASKS = MaskSet(prefixed(make_masks()))
CALLBACKS: dict[str, Callable[[], list[L.Callback]]] = {
    "freeze": lambda: [FreezeMask(mask=MASKS)],
    "freeze by score": lambda: [FreezeMask(train="net.head", score="fisher", density=0.1, batches=2)],
    "prune": lambda: [PruneMask(0.5, start="0 steps", end="3 steps", every="1 steps")],
    "phases": lambda: [
        PhaseUnfreeze(
            [Phase("2 steps", train="net.head", lr_scale=0.5), Phase(train="*", lr_scale={"net.conv": 0.1, "*": 0.3})]
        )
    ],
    "all": lambda: [
        PruneMask(0.3, start="0 steps", end="2 steps", every="1 steps"),
        FreezeMask(mask=MASKS),
        PhaseUnfreeze([Phase("3 steps"), Phase(train="*", warmup="3 steps")]),
    ],
}


@pytest.mark.parametrize("which", CALLBACKS)
@pytest.mark.parametrize("fails_at", [None, 0, 3])
def test_nothing_is_left_behind(which: str, fails_at: int | None):
    module = Kept()
    before = shape_of(module)
    own_hooks = hooks_of(torch.optim.AdamW(module.parameters()))
    if fails_at is not None:
        step = module.training_step

        def stumble(batch: Any) -> Tensor:
            if len(module.losses) == fails_at:
                raise ArithmeticError("user's own")
            return step(batch)

        module.training_step = stumble  # type: ignore[method-assign]
        callbacks = CALLBACKS[which]() if "score" not in which else CALLBACKS["freeze"]()
        with pytest.raises(ArithmeticError, match="user's own"):
            fit(module, callbacks, make_batches(5))
        del module.training_step
    else:
        fit(module, CALLBACKS[which](), make_batches(5))
    assert shape_of(module) == before
    optimizer = module.__dict__["optimizer"]
    assert hooks_of(optimizer) == own_hooks
    assert len(optimizer.param_groups) == 1
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in module.parameters()]
    assert set(optimizer.param_groups[0]) == set(torch.optim.AdamW(module.parameters()).param_groups[0])
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == module.frozen_by_user


def test_a_refused_fit_leaves_nothing_behind():
    module = Kept()
    before = shape_of(module)
    with pytest.raises(ValueError, match="nothing_like_it"):
        fit(module, [FreezeMask(train="nothing_like_it")], make_batches(2))
    assert shape_of(module) == before


def test_after_a_fit_everything_trains_again():
    module = Kept()
    fit(module, [FreezeMask(mask=MASKS)], make_batches(2))
    start = copy.deepcopy(module)
    fit(module, [], make_batches(2))
    assert set(same(module, start)) >= {n for n, p in module.named_parameters() if p.requires_grad}


def test_the_same_callbacks_serve_a_second_fit():
    module, callbacks = Kept(), CALLBACKS["freeze"]()
    start = copy.deepcopy(module)
    fit(module, callbacks, make_batches(2))
    fit(module, callbacks, make_batches(2))
    assert moved(module, start, dict(MASKS)) == []
    other = Task(make_net(seed=5))
    start_of_other = copy.deepcopy(other)
    fit(other, callbacks, make_batches(2))
    assert moved(other, start_of_other, dict(MASKS)) == []


@pytest.mark.parametrize("which", CALLBACKS)
def test_a_checkpoint_loads_in_plain_torch(which: str, tmp_path: Path):
    module = Kept()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=1)
    fit(module, [*CALLBACKS[which](), saver], make_batches(5), Setting(), enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 5
    for file in files:
        checkpoint = torch.load(file, weights_only=True)
        plain = BatchNormed()
        plain.load_state_dict({k.removeprefix("net."): v for k, v in checkpoint["state_dict"].items()})
        optimizer = torch.optim.AdamW(plain.parameters())
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
        assert set(checkpoint["optimizer_states"][0]["param_groups"][0]) == set(optimizer.param_groups[0])
        assert checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01
