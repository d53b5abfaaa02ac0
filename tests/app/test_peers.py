"""What a comparison sets PruneMask beside prunes the same tensors to the same share."""

from collections.abc import Callable

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from lightning_mask.app import train as application
from lightning_mask.app.comparison.peers import of_entries
from lightning_mask.core.patterns import resolve
from lightning_mask.core.prunable import default_scope
from lightning_mask.tasks import EfficientNetClassifier
from tests.app.conftest import TINY

WHERE = "+callbacks.peer._target_=lightning_mask.app.comparison.peers"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """What was trained."""
    seen: list[torch.nn.Module] = []
    fit = Trainer.fit

    def noted(trainer: Trainer, model: torch.nn.Module, *more: object, **named: object) -> None:
        seen.append(model)
        fit(trainer, model, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "fit", noted)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        [f"{WHERE}.TorchPruning"],
        [f"{WHERE}.LightningPruning", "trainer.limit_train_batches=2", "trainer.max_steps=8"],
    ],
    ids=["torch", "lightning"],
)
def test_a_peer_prunes_the_default_scope_to_the_share(
    words: list[str], config: Callable[..., DictConfig], models: list[torch.nn.Module]
) -> None:
    cfg = config(*TINY, "mask=none", "logger=none", "test=false", *words, "+callbacks.peer.sparsity=0.75")
    application.train(cfg)
    (model,) = models
    scope = default_scope(model)
    assert len(scope) > 2
    for name, parameter in model.named_parameters():
        zeros = int((parameter == 0).sum())
        if name in scope:
            assert abs(zeros - 0.75 * parameter.numel()) <= 1, name
        elif parameter.dim() > 1:
            assert zeros == 0, name


def test_torch_pruning_removes_channels_to_the_share(
    config: Callable[..., DictConfig], models: list[torch.nn.Module]
) -> None:
    words = [*TINY, "mask=none", "logger=none", "test=false"]
    application.train(config(*words))
    application.train(config(*words, f"{WHERE}.ChannelRemoval", "+callbacks.peer.sparsity=0.75"))
    of_whole, of_small = (sum(model.get_parameter(name).numel() for name in default_scope(model)) for model in models)
    assert 0.15 < of_small / of_whole <= 0.25
    outputs = [[*model.parameters()][-1].shape for model in models]
    assert outputs[0] == outputs[1], "classes"


def test_peers_and_masks_prune_the_same_tensors_of_the_image_network(config: Callable[..., DictConfig]) -> None:
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        words = compose("compare", overrides=["experiment=compare_pruning"]).tasks.digits.overrides
    scope = config(*words, "mask=prune_magnitude").mask.scope
    model = EfficientNetClassifier(num_classes=10, pretrained=False)
    named = resolve([*scope], model)
    theirs = {id(getattr(layer, name)) for layer, name in of_entries(model)}
    assert {id(model.get_parameter(name)) for name in named} == theirs
    assert any("project" in name for name in named)
    assert not any("depthwise" in name for name in named)


def test_torch_pruning_narrows_every_kind_of_layer_of_the_image_network(
    config: Callable[..., DictConfig], models: list[torch.nn.Module]
) -> None:
    words = ["model=efficientnet_lite0", "model.pretrained=false", "model.size=32", "data=mnist5k", "data.batch_size=4"]
    words += ["mask=none", "logger=none", "test=false", "delta=false", "report=false", "trainer.max_steps=1"]
    words += ["trainer.limit_val_batches=1", "trainer.val_check_interval=1", "callbacks.progress.refresh_rate=0"]
    application.train(config(*words, f"{WHERE}.ChannelRemoval", "+callbacks.peer.sparsity=0.5"))
    small, whole = models[0], EfficientNetClassifier(num_classes=10, pretrained=False)
    for kind in ("stem", "expand", "depthwise", "project"):
        of_small, of_whole = (
            sum(p.shape[0] for name, p in model.named_parameters() if name.endswith(f"{kind}.weight"))
            for model in (small, whole)
        )
        assert 0 < of_small < of_whole, kind
