"""The wheel brings the configs; the command line works from anywhere; a user's own Hydra application finds the groups."""

import sys
import zipfile
from pathlib import Path
from textwrap import dedent

import pytest

from tests.app.conftest import CONF, REPO, TINY, command


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked into a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = "cp -r lightning_mask conf pyproject.toml README.md LICENSE"
    made = command("bash", "-c", f"mkdir {folder}/src && {copy} {folder}/src", cwd=REPO)
    assert made.returncode == 0, made.stdout
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    built = command(*pip, cwd=folder / "src")
    assert built.returncode == 0, built.stdout
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(folder / "site")
    return folder / "site"


@pytest.mark.slow
def test_the_wheel_has_every_config_the_licence_and_the_types(installed: Path) -> None:
    there = {
        str(f.relative_to(installed / "lightning_mask/conf")) for f in installed.glob("lightning_mask/conf/**/*.yaml")
    }
    wanted = {str(f.relative_to(CONF)) for f in CONF.rglob("*.yaml") if f.relative_to(CONF).parts[0] != "local"}
    assert there == wanted
    assert (installed / "lightning_mask/py.typed").exists()
    assert list(installed.glob("*.dist-info/licenses/LICENSE"))
    assert not (installed / "conf").exists()
    assert not (installed / "tests").exists()


@pytest.mark.slow
def test_the_wheel_has_every_module(installed: Path) -> None:
    def modules(root: Path) -> set[str]:
        return {str(f.relative_to(root)) for f in (root / "lightning_mask").rglob("*.py") if "conf" not in f.parts}

    assert modules(installed) == modules(REPO) > {"lightning_mask/core/engine.py"}


@pytest.mark.slow
def test_the_wheel_trains_from_any_folder(installed: Path, tmp_path: Path) -> None:
    code = "import sys, lightning_mask; print(lightning_mask.__file__); sys.argv[0] = 'lightning-mask'"
    code += "; from lightning_mask.app.cli import main; main()"
    done = command(sys.executable, "-c", code, "train", *TINY, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith(str(installed))
    assert list((tmp_path / "logs/smoke/runs").glob("*/summary.json"))


@pytest.mark.slow
def test_a_checkout_that_is_not_the_installed_one_uses_its_own_configs(tmp_path: Path) -> None:
    copied = command("bash", "-c", f"cp -r lightning_mask conf scripts pyproject.toml {tmp_path}", cwd=REPO)
    assert copied.returncode == 0, copied.stdout
    root = tmp_path / "conf/train.yaml"
    root.write_text(root.read_text().replace("task_name: train", "task_name: of_the_copy"))
    done = command(sys.executable, str(tmp_path / "scripts/train.py"), "--cfg", "job", cwd=tmp_path)
    assert "task_name: of_the_copy" in done.stdout


@pytest.mark.slow
def test_a_users_own_hydra_application_uses_our_groups(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/mine.yaml").write_text(
        dedent(
            """
            defaults:
              - mask: fisher
              - optimizer: sgd
              - _self_
            hydra:
              searchpath: [pkg://lightning_mask.conf]
            head: out
            seed: 5
            """
        )
    )
    (tmp_path / "app.py").write_text(
        dedent(
            """
            import hydra
            import lightning as L
            import torch
            from hydra.utils import instantiate


            class Net(L.LightningModule):
                def __init__(self, optimizer):
                    super().__init__()
                    self.body, self.out, self.optimizer = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2), optimizer

                def training_step(self, batch, index):
                    x, y = batch
                    return torch.nn.functional.cross_entropy(self.out(self.body(x).relu()), y)

                def configure_optimizers(self):
                    return self.optimizer(self.parameters())


            @hydra.main(version_base="1.3", config_path="conf", config_name="mine")
            def main(cfg):
                L.seed_everything(cfg.seed)
                mask = instantiate(cfg.mask)
                net = Net(instantiate(cfg.optimizer))
                before = net.body.weight.detach().clone()
                rows = torch.utils.data.TensorDataset(torch.randn(64, 4), torch.randint(0, 2, (64,)))
                trainer = L.Trainer(
                    accelerator="cpu", max_epochs=2, callbacks=[mask], logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False,
                )
                trainer.fit(net, torch.utils.data.DataLoader(rows, batch_size=8))
                held = ~mask.masks["body.weight"]
                assert torch.equal(net.body.weight.detach()[held], before[held])
                print("held", int(held.sum()), "seed", mask.selection.seed)


            main()
            """
        )
    )
    done = command(sys.executable, "app.py", "mask.density=10", "mask.batches=2", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "seed 5" in done.stdout
