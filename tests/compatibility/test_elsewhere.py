"""The same callbacks where LightningCLI, the other package of Lightning, or Fabric leads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.cli import LightningCLI
from mask_nets import QUIET, Net, fit, loader, weights
from ours import ARGUMENTS, assert_equal, assert_exact, cells, make

from lightning_mask import MaskSet, PruneMask
from lightning_mask.core import MaskEngine

GROUP = "Beside the Trainer"
TRAINER = {**QUIET, "max_epochs": 2}


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(16)


class Plain(Net):
    """Without arguments."""

    def __init__(self) -> None:
        super().__init__()


def command_line(callbacks: list[dict[str, Any]], *arguments: str) -> LightningCLI:
    """``fit --config run.yaml <arguments>`` with these callbacks in the file."""
    Path("run.yaml").write_text(yaml.safe_dump({"trainer": {**TRAINER, "callbacks": callbacks}}, sort_keys=False))
    return LightningCLI(Plain, Data, args=["fit", "--config", "run.yaml", *arguments], save_config_callback=None)


@cells(GROUP, "`LightningCLI` with a YAML file", "equal to the same arguments in Python")
def test_lightning_cli(ours: str) -> None:
    net, callback = Net(), make(ours)
    cli = command_line([{"class_path": f"lightning_mask.{ours}", "init_args": ARGUMENTS[ours]}])
    fit(net, callback, val=True)
    assert_exact(cli.trainer.callbacks[0], weights(Net()), weights(cli.model))  # type: ignore[attr-defined]
    assert_equal(weights(net), weights(cli.model))


@pytest.mark.parametrize(
    ("kind", "written", "means"),
    [
        ("FreezeMask", {"score": "random", "density": 1}, {"density": 1}),
        ("FreezeMask", {"score": "random", "density": 1.0}, {"density": 1.0}),
        ("FreezeMask", {"score": "random", "density": {"stem*": 0.5, "*": 2}}, {"density": {"stem*": 0.5, "*": 2}}),
        (
            "FreezeMask",
            {"train": ["layers:-1:", "!head.bias", "head"]},
            {"train": ["layers:-1:", "!head.bias", "head"]},
        ),
        ("FreezeMask", {"train": "layers:-1:"}, {"train": "layers:-1:"}),
    ],
)
def test_lightning_cli_takes_values_as_they_were_written(kind: str, written: Any, means: dict[str, Any]) -> None:
    """A count is no share, and a pattern no mapping: 1 is one entry, 1.0 all of them."""
    as_file = command_line([{"class_path": kind, "init_args": written}])
    options = [f"--trainer.callbacks.{name}={value!r}" for name, value in written.items() if not isinstance(value, str)]
    options += [f"--trainer.callbacks.{name}={value}" for name, value in written.items() if isinstance(value, str)]
    as_words = command_line([], f"--trainer.callbacks+={kind}", *options)
    for cli in (as_file, as_words):
        selection = cli.trainer.callbacks[0].selection  # type: ignore[attr-defined]
        for name, value in means.items():
            assert getattr(selection, name) == value
            assert type(getattr(selection, name)) is type(value)


def test_lightning_cli_tells_a_share_from_a_pattern_of_zeros() -> None:
    for written, zeros in ((0.5, 12), ("2:4", 12)):
        for cli in (
            command_line([{"class_path": "PruneMask", "init_args": {"sparsity": written, "scope": "head.weight"}}]),
            command_line(
                [],
                "--trainer.callbacks+=PruneMask",
                f"--trainer.callbacks.sparsity={written}",
                "--trainer.callbacks.scope=head.weight",
            ),
        ):
            assert int((cli.model.head.weight == 0).sum()) == zeros
            n_of_m = cli.trainer.callbacks[0].n_of_m  # type: ignore[attr-defined]
            assert (n_of_m is None) == isinstance(written, float)


OTHER_PACKAGE = """
import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import LightningCLI

import lightning_mask
from mask_nets import Block, loader


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.stem = torch.nn.Linear(8, 12)
            self.blocks = torch.nn.ModuleList([Block(12, "layer", 0.0) for _ in range(2)])
            self.head = torch.nn.Linear(12, 2)

    def training_step(self, batch, batch_idx):
        x = self.stem(batch[0])
        for block in self.blocks:
            x = block(x)
        return torch.nn.functional.cross_entropy(self.head(x), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()


def fit(callback, ckpt_path=None, **arguments):
    net = Net()
    trainer = pl.Trainer(**{**TRAINER, **arguments}, callbacks=[callback])
    trainer.fit(net, loader(), ckpt_path=ckpt_path)
    return trainer, net.state_dict()


torch.set_num_threads(1)
for name, arguments in ARGUMENTS.items():
    make = getattr(lightning_mask, name)
    assert isinstance(make(**arguments), pl.Callback)
    ends = [fit(make(**arguments))[1]]
    fit(make(**arguments), max_epochs=1)[0].save_checkpoint("half.ckpt")
    ends.append(fit(make(**arguments), "half.ckpt")[1])
    callbacks = [{"class_path": f"lightning_mask.{name}", "init_args": arguments}]
    args = {"subcommand": "fit", "fit": {"trainer": {**TRAINER, "callbacks": callbacks}}}
    ends.append(LightningCLI(Net, Data, args=args, save_config_callback=None).model.state_dict())
    assert all(torch.equal(ends[0][name], end[name]) for end in ends for name in ends[0])
    torch.save(ends[0], f"{name}.pt")
"""


@pytest.fixture(scope="module")
def other_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights at the end of a fit with each of our callbacks, from a process that begins with that package."""
    folder = tmp_path_factory.mktemp("other")
    header = f"import sys\nsys.path.append({str(Path(__file__).parents[1] / 'callbacks')!r})\n"
    header += f"ARGUMENTS, TRAINER = {ARGUMENTS!r}, {TRAINER!r}\n"
    command = [sys.executable, "-c", header + OTHER_PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@cells(GROUP, "`pytorch_lightning`", "equal to `lightning.pytorch`: a Trainer, a resumed one, and its LightningCLI")
def test_the_other_package(ours: str, other_package: Path) -> None:
    net = Net()
    fit(net, make(ours))
    assert_equal(weights(net), torch.load(other_package / f"{ours}.pt", weights_only=True))


@cells(GROUP, "Fabric, through `MaskEngine`", "equal to the Trainer, given the masks that the callback chose there")
def test_fabric(ours: str) -> None:
    net, callback = Net(), make(ours)
    masks: dict[int, MaskSet] = {}  # by the step before which they came into force

    class Look(pl.Callback):
        def on_masks_changed(self, trainer: pl.Trainer, pl_module: Any, reason: str) -> None:
            masks[trainer.global_step] = MaskSet(dict(callback._session.engine.masks))

    fit(net, callback, Look())

    module = Net()
    before, step = weights(module), 0
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(module, module.configure_optimizers())
    model.mark_forward_method("loss")
    prunes = isinstance(callback, PruneMask)
    engine = MaskEngine(module, optimizer, masks[0])
    for _ in range(2):
        for batch in fabric.setup_dataloaders(loader()):
            if step in masks and not prunes:  # between two steps
                engine.update(masks[step])
            optimizer.zero_grad()
            fabric.backward(model.loss(batch))
            if step in masks and prunes:  # before the optimizer's step
                engine.update(masks[step], zero={name: ~mask for name, mask in masks[step].items()})
            engine.after_backward()
            optimizer.step()
            step += 1
    engine.release()
    assert_exact(callback, before, weights(module))
    assert_equal(weights(net), weights(module))
