"""Every config composes and instantiates, and spells out what its target takes."""

import inspect
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_method, instantiate
from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import nn

from lightning_mask import FreezeMask
from lightning_mask.app.parts import make_callbacks, make_trainer
from tests.app.conftest import CONF, GROUPS

# What a target takes and the application gives, not the yaml.
GIVEN = {
    "self",
    "callbacks",
    "logger",
    "params",
    "context",
    "num_training_steps",
    "kwargs",
    "summarize_kwargs",
    "theme",
}
NEEDS = {"tensorboard": "tensorboard", "many": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
VALUES = {
    "data=csv": ["data.source.path=rows.csv"],
    "data=hub": ["data.source.name=rows"],
    "data=image_folder": ["data.source.path=pictures", "model=resnet", "model.channels=3"],
    "data=mnist5k": ["model=resnet"],
    "model=efficientnet_lite0": ["data=mnist5k"],
    "data=reviews_lm": ["model=smollm2"],
    "data=reviews_instruct": ["model=smollm2"],
    "model=smollm2": ["data=reviews_lm"],
    "model=hf": ["model.model=some/model"],
    "model=hf_image": ["model.model=some/model", "data=mnist5k"],
    "model=timm": ["data=mnist5k"],
    "model=resnet": ["data=mnist5k"],
}
OPTIONS = [(group, option) for group, options in GROUPS.items() for option in options if group != "tuned"]


def blocks(node: Any, key: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield every block that makes something."""
    if isinstance(node, DictConfig):
        if node.get("_target_") is not None:
            yield key, node
        for name in node:
            yield from blocks(node[name], f"{key}.{name}")


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{g}={o}" for g, o in OPTIONS])
def test_every_option_composes_and_names_every_argument_of_its_target(
    group: str, option: str, config: Callable[..., DictConfig]
) -> None:
    cfg = config(f"{group}={option}", *VALUES.get(f"{group}={option}", []))
    targets = dict(blocks(cfg))
    if group in ("model", "data", "optimizer", "trainer"):
        assert f".{group}" in targets
    for key, block in targets.items():
        written = {name for name in block if not name.startswith("_")}
        takes = inspect.signature(get_method(block._target_)).parameters
        if not any(p.kind == p.VAR_KEYWORD for p in takes.values()):
            assert written <= set(takes), key
        if key == ".mask.phases" or block.get("_target_") == "lightning_mask.Phase":
            continue
        missing = set(takes) - written - GIVEN
        if key.endswith("scheduler"):
            missing -= {"optimizer"}
        assert not missing, f"{key} leaves out {sorted(missing)}"


def test_phases_name_every_argument_of_a_phase(config: Callable[..., DictConfig]) -> None:
    takes = set(inspect.signature(get_method("lightning_mask.Phase")).parameters) - {"self"}
    for option in ("lottery", "mask_then_lift", "unfreeze_on_plateau"):
        for phase in config(f"mask={option}").mask.phases:
            assert set(phase) == takes


@pytest.mark.parametrize("option", [option for option in GROUPS["mask"] if option != "auto"])
def test_every_mask_makes_its_callback(option: str, config: Callable[..., DictConfig]) -> None:
    cfg = config(f"mask={option}", "callbacks=none")
    made = make_callbacks(cfg)
    assert [type(m).__name__ for m in made] == ([] if option == "none" else [cfg.mask._target_.rpartition(".")[2]])


def test_trainers_callbacks_and_loggers_are_made(config: Callable[..., DictConfig]) -> None:
    for option in GROUPS["callbacks"]:
        cfg = config(f"callbacks={option}")
        assert len(make_callbacks(cfg)) == len(cfg.get("callbacks") or {}) + 1
    for option in GROUPS["logger"]:
        if find_spec(NEEDS.get(option, "torch")) is not None:
            cfg = config(f"logger={option}", "callbacks=none")
            assert len(make_trainer(cfg, []).loggers) == len(cfg.get("logger") or {})
    for option in GROUPS["debug"]:
        cfg = config(f"debug={option}")
        assert isinstance(make_trainer(cfg, make_callbacks(cfg)), Trainer)
    for option in GROUPS["trainer"]:
        cfg = config(f"trainer={option}", "callbacks=none")
        if cfg.trainer.accelerator == "cpu" or torch.cuda.is_available():
            assert isinstance(make_trainer(cfg, []), Trainer)


def test_optimizers_and_schedulers_are_made(config: Callable[..., DictConfig]) -> None:
    for option in GROUPS["optimizer"]:
        for schedule in GROUPS["scheduler"]:
            cfg = config(f"optimizer={option}", f"scheduler={schedule}")
            optimizer = instantiate(cfg.optimizer)(nn.Linear(3, 2).parameters())
            assert isinstance(optimizer, torch.optim.Optimizer)
            if cfg.scheduler is not None:
                instantiate(cfg.scheduler)(optimizer, num_training_steps=10)


def test_models_and_data_are_made(config: Callable[..., DictConfig]) -> None:
    for data, model in (("tweets", "minilm"), ("mnist5k", "resnet"), ("mnist5k", "efficientnet_lite0")):
        cfg = config(f"data={data}", f"model={model}")
        made = instantiate(cfg.model, num_classes=3)
        assert isinstance(made, LightningModule)
        assert any(name.startswith(f"{cfg.head}.") for name, _ in made.named_parameters())
        assert instantiate(cfg.data).source.keywords["split_seed"] == 0


def test_every_value_is_plain_after_conversion(config: Callable[..., DictConfig]) -> None:
    for option in GROUPS["mask"]:
        for key, block in blocks(config(f"mask={option}")):
            assert block.get("_convert_") == "all" or block.get("_partial_"), f"{key} may hand out a DictConfig"


def test_override_grammar(config: Callable[..., DictConfig]) -> None:
    assert config("mask=fisher", "mask.density=0.01", "mask.engine=dense").mask.density == 0.01
    assert config("mask.density=20000").mask.density == 20000
    assert config("mask=prune_gradual", "mask.sparsity='2:4'").mask.sparsity == "2:4"
    assert config("mask=last_layers", "last_layers=2").mask.train[0] == "layers:-2:"
    assert config("mask=bitfit").mask.train == ["*.bias", "net.classifier"]
    assert config("mask=mask_then_lift", "mask.phases.0.density=0.02").mask.phases[0].density == 0.02
    assert config("mask=mask_then_lift", "mask.phases.0.until='100 steps'").mask.phases[0].until == "100 steps"
    assert config(r"mask.train=['re:net\.bert\..*bias']").mask.train == [r"re:net\.bert\..*bias"]
    there = ["best", "last", "progress", "report", "pictures", "preemption"]
    assert list(config("~callbacks.lr_monitor").callbacks) == there
    assert "early_stopping" in config("callbacks=[default,early_stopping]").callbacks
    assert set(config("logger=[]").get("logger") or {}) == set()
    both = config("mask=fisher", "+mask@callbacks.prune=prune_gradual")
    assert {"FreezeMask", "PruneMask"} <= {type(c).__name__ for c in make_callbacks(both)}
    two = make_callbacks(
        config("mask=head", "+mask@callbacks.two=last_layers", "last_layers=2", "+mask@callbacks.no=none")
    )
    assert [c.selection.train for c in two if isinstance(c, FreezeMask)][1] == ["layers:-2:", "net.classifier"]
    assert config("seed=7").mask.seed == 7
    assert config("seed=7").data.seed == 7
    assert config().optimizer.lr == 1e-3
    assert config("lr=2e-3").optimizer.lr == config("optimizer.lr=2e-3").optimizer.lr == 2e-3
    assert config("optimizer=sgd").optimizer.lr == config("optimizer=sgd").model.optimizer.lr == 0.05
    assert config("optimizer=sgd", "lr=0.5").optimizer.lr == 0.5
    assert config("mask=none").optimizer.lr < 1e-3
    assert config("mask=none", "lr=5e-3").optimizer.lr == 5e-3
    assert config("experiment=mnist_prune").optimizer.lr == 3e-3
    assert config("debug=limit", "experiment=mnist_prune").trainer.max_steps == 20
    assert config("data=mnist5k", "model=resnet").data.mean is None
    taught = config("data=image_folder", "data.source.path=pictures", "model=efficientnet_lite0").data
    assert (taught.source.size, taught.source.channels) == (64, 3)
    assert (taught.mean, taught.deviation) == (127 / 255, 128 / 255)


@pytest.mark.parametrize("mask", GROUPS["mask"])
def test_what_prunes_and_trains_the_rest_has_the_rate_of_training_everything(
    mask: str, config: Callable[..., DictConfig]
) -> None:
    made = config(f"mask={mask}")
    if made.mask.get("_target_") == "lightning_mask.PruneMask":
        assert made.optimizer.lr == config("mask=none").optimizer.lr
        assert config(f"mask={mask}", "lr=5e-3").optimizer.lr == 5e-3


@pytest.mark.parametrize("trainer", ["ddp", "fsdp"])
def test_devices_and_nodes_are_short_words_that_the_trainer_and_slurm_take(trainer: str) -> None:
    words = [f"trainer={trainer}", "devices=8", "num_nodes=4", "launcher=slurm", "hydra.launcher.account=mine"]
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        cfg = compose("train", overrides=words, return_hydra_config=True)
        one = compose("train", overrides=["launcher=slurm", "trainer.devices=2"], return_hydra_config=True)
        plain = compose("train")
    assert (cfg.trainer.devices, cfg.trainer.num_nodes, cfg.trainer.accelerator) == (8, 4, "gpu")
    asked = cfg.hydra.launcher
    assert (asked.tasks_per_node, asked.nodes, asked.gpus_per_node, asked.account) == (8, 4, 8, "mine")
    assert cfg.ckpt_path == "auto"
    assert (one.hydra.launcher.tasks_per_node, one.hydra.launcher.gpus_per_node) == (2, None)
    assert (plain.trainer.devices, plain.trainer.num_nodes, plain.ckpt_path) == (1, 1, None)


def test_sweeps_say_what_they_sweep() -> None:
    with initialize_config_module("lightning_mask.conf", version_base="1.3"):
        for option in GROUPS["sweep"]:
            if option == "none":
                continue
            cfg = compose("train", overrides=[f"sweep={option}"], return_hydra_config=True)
            assert cfg.hydra.mode.name == "MULTIRUN"
            for key, values in OmegaConf.to_container(cfg.hydra.sweeper.params).items():  # type: ignore[union-attr]
                swept = OverridesParser.create().parse_override(f"{key}={values}")
                span = swept.value() if swept.is_interval_sweep() else None
                for value in str(values).split(",") if span is None else (span.start, span.end):
                    compose("train", overrides=[f"{key}={value}"])


def test_every_tuned_file_goes_with_a_mask() -> None:
    assert set(GROUPS["tuned"]) <= set(GROUPS["mask"])


def test_help_names_every_strategy() -> None:
    text = (CONF / "hydra/default.yaml").read_text()
    for option in GROUPS["mask"]:
        assert any(line.split()[:1] == [option] for line in text.splitlines()), f"--help does not say what {option} is"
