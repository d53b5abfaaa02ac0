"""Switching between tasks on a module, and deltas in a folder that stands for the hub."""

from pathlib import Path

import pytest
import torch
from odd_states import same
from torch import Tensor, nn

from lightning_mask.delta import Delta, inspect, pull_delta, push_delta, save_delta, switch


class Wrapped(nn.Module):
    """As a LightningModule has a network in it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 4))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def after_training(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Some entries, some rows, a whole tensor, and statistics."""
    torch.manual_seed(seed)
    state = copied(model)
    state["0.weight"][torch.rand(8, 3, 3, 3) < 0.1] += 1
    state["3.weight"][seed % 4] += 1
    state["4.weight"] *= -1
    state["1.running_var"] += seed
    state["1.num_batches_tracked"] += seed
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_one_module_is_one_task_after_another(wrapped: bool, tmp_path: Path):
    model = net()
    model[0].weight = nn.Parameter(model[0].weight.detach().to(memory_format=torch.channels_last))
    start, tasks = copied(model), [after_training(model, seed) for seed in (1, 2)]
    deltas = []
    for number, task in enumerate(tasks):
        save_delta(tmp_path / f"{number}.safetensors", start, task)
        deltas.append(Delta.load(tmp_path / f"{number}.safetensors"))
    whole = Wrapped(model) if wrapped else model
    objects = [tensor.data_ptr() for tensor in model.state_dict().values()]
    for _ in range(2):
        for delta, task in zip(deltas, tasks, strict=True):
            undo = switch(whole, delta)
            assert same(model.state_dict(), task)
            again = switch(whole, undo)
            assert same(model.state_dict(), start)
            switch(whole, again)
            assert same(model.state_dict(), task)
            switch(whole, undo)
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == objects
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_names_of_a_wrapped_module_fit_the_plain_one(tmp_path: Path):
    model = net()
    start, task = copied(Wrapped(model)), after_training(model, 3)
    save_delta(tmp_path / "d.safetensors", start, {f"net.{name}": tensor for name, tensor in task.items()})
    switch(model, Delta.load(tmp_path / "d.safetensors"))
    assert same(model.state_dict(), task)


def test_a_module_that_does_not_fit_is_left_as_it_was(tmp_path: Path):
    model = net()
    save_delta(tmp_path / "d.safetensors", model, after_training(model, 1))
    delta = Delta.load(tmp_path / "d.safetensors")
    model[4] = nn.Linear(4, 5)
    before = copied(model)
    with pytest.raises(ValueError, match=r"4.weight is .*5, 4.* in the delta"):
        switch(model, delta)
    model.half()
    with pytest.raises(ValueError, match="F16"):
        switch(model, delta)
    model.float()
    del model[4]
    with pytest.raises(ValueError, match=r"has no tensor '4.weight'"):
        switch(model, delta)
    del before["4.weight"], before["4.bias"]
    assert same(model.half().state_dict(), net()[:4].half().state_dict())


def test_a_delta_goes_to_a_folder_and_comes_back(tmp_path: Path):
    model = net()
    save_delta(
        tmp_path / "d.safetensors", model, after_training(model, 1), metrics={"test/accuracy": torch.tensor(0.75)}
    )
    (tmp_path / "hub").mkdir()
    where = push_delta(tmp_path / "d.safetensors", str(tmp_path / "hub"))
    assert where == str(tmp_path / "hub/delta.safetensors")
    card = (tmp_path / "hub/README.md").read_text()
    assert "| test/accuracy | 0.7500 |" in card
    assert inspect(where)["base"][:16] in card
    fetched = pull_delta(str(tmp_path / "hub"), tmp_path / "mine.safetensors")
    assert fetched.read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    (tmp_path / "hub/README.md").write_text("mine")
    push_delta(tmp_path / "d.safetensors", str(tmp_path / "hub"), name="second.safetensors")
    assert (tmp_path / "hub/README.md").read_text() == "mine"
    assert pull_delta(str(tmp_path / "hub"), name="second.safetensors") == tmp_path / "hub/second.safetensors"

    (tmp_path / "hub/delta.safetensors").write_bytes(fetched.read_bytes()[:-1])
    with pytest.raises(ValueError, match="damaged"):
        pull_delta(str(tmp_path / "hub"), tmp_path / "mine.safetensors")
    with pytest.raises(FileNotFoundError, match="no delta file"):
        pull_delta(str(tmp_path / "hub"), name="other.safetensors")
    with pytest.raises(ValueError, match=r"is not a delta|damaged"):
        push_delta(tmp_path / "hub/README.md", str(tmp_path / "hub"))


def test_the_hub_out_of_reach_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"no delta.safetensors in 'nobody/nothing' on the hub"):
        pull_delta("nobody/nothing", tmp_path / "mine.safetensors")
