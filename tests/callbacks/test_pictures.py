"""Pictures of masks and of a confusion matrix, in the loggers of real runs."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_mask import PhaseUnfreeze, PruneMask
from lightning_mask.callbacks import LogPictures
from lightning_mask.callbacks import pictures as module_of_pictures
from lightning_mask.callbacks.heat_map import draw_confusion, draw_heat_map, grids

PHASES = [{"until": "2 steps", "train": "head", "name": "head"}, {"train": "*", "name": "all of $it$"}]


def needs(package: str) -> Any:
    """Skip a test where a logger's package, which is large, is not installed."""
    reason = f'no {package}: pip install "lightning-mask[loggers]"'
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=reason)


class Net(LightningModule):
    """Two blocks and a head; it keeps a confusion matrix, as our classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
        self.head = nn.Linear(4, 2)
        self.class_names = ["cat", "dog"]
        self.confusion_matrix: list[list[int]] | None = None

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = self.head(self.h(batch)).square().mean()
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: Tensor, index: int) -> None:
        self.confusion_matrix = [[3, 1], [0, 4]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def run(loggers: list[Logger], folder: Path, *callbacks: Any) -> None:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=loggers,
        callbacks=list(callbacks),
        default_root_dir=folder,
        log_every_n_steps=1,
        **quiet,
    )
    batches = DataLoader(torch.randn(8, 4), batch_size=2)
    model = Net()
    trainer.fit(model, batches)
    trainer.test(model, batches, verbose=False)


def test_tensorboard_and_csv_get_a_heat_map_for_each_phase_and_the_confusion_matrix(tmp_path: Path) -> None:
    loggers = [TensorBoardLogger(tmp_path, "board", ""), CSVLogger(tmp_path, "csv", "")]
    run(loggers, tmp_path, PhaseUnfreeze(PHASES), LogPictures())
    events = EventAccumulator(str(tmp_path / "board"), {"images": 0, "scalars": 0}).Reload()
    assert [event.step for event in events.Images("mask/heat_map")] == [0, 2]
    assert [event.step for event in events.Images("test/confusion_matrix")] == [4]
    assert {event.value for event in events.Scalars("mask/active")} == {10.0, 50.0}
    assert [event.value for event in events.Scalars("mask/phase")][-1] == 1
    files = sorted(path.name for path in (tmp_path / "csv/pictures").iterdir())
    assert files == ["mask-heat_map-000000.png", "mask-heat_map-000002.png", "test-confusion_matrix-000004.png"]
    drawn = [Image.open(tmp_path / "csv/pictures" / name).convert("RGB") for name in files]
    assert all(min(image.size) > 150 for image in drawn)
    colours = [len(image.getcolors(maxcolors=1 << 24)) for image in drawn[:2]]
    assert drawn[0].tobytes() != drawn[1].tobytes()
    assert min(colours) > 10, "nothing is drawn"


def test_pruning_is_shown_when_training_starts_and_ends(tmp_path: Path) -> None:
    pruned = PruneMask(0.5, start="0%", end="75%", every="1 steps")
    run([CSVLogger(tmp_path, "csv", "")], tmp_path, pruned, LogPictures())
    files = sorted(path.name for path in (tmp_path / "csv/pictures").glob("mask*"))
    assert files == ["mask-heat_map-000000.png", "mask-heat_map-000004.png"]


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module_of_pictures, "find_spec", lambda name: None)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run([CSVLogger(tmp_path, "csv", "")], tmp_path, PhaseUnfreeze(PHASES), LogPictures())
    assert [record.getMessage() for record in caplog.records if "Matplotlib" in record.getMessage()] == [
        'No pictures are logged: they need Matplotlib, pip install "lightning-mask[compare]".'
    ]
    assert not (tmp_path / "csv/pictures").exists()


def test_nothing_is_drawn_where_nobody_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_of_pictures, "draw_heat_map", lambda *_: pytest.fail("drawn"))
    run([], tmp_path, PhaseUnfreeze(PHASES), LogPictures())


@needs("wandb")
@pytest.mark.slow
def test_weights_and_biases_keeps_them_offline(tmp_path: Path) -> None:
    import wandb

    run([WandbLogger(save_dir=tmp_path, offline=True, project="test")], tmp_path, PhaseUnfreeze(PHASES), LogPictures())
    wandb.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*/files/media/images")
    assert len(list(folder.glob("mask/heat_map_*.png"))) == 2
    assert len(list(folder.glob("test/confusion_matrix_*.png"))) == 1


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_keeps_them_as_artifacts(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import MLFlowLogger

    place = {"tracking_uri": f"sqlite:///{tmp_path}/mlflow.db", "artifact_location": str(tmp_path / "artifacts")}
    logger = MLFlowLogger("test", **place)
    run([logger], tmp_path, PhaseUnfreeze(PHASES), LogPictures())
    assert logger.experiment.get_run(logger.run_id).data.metrics["mask/active"] == 50
    kept = [path.name for path in tmp_path.glob("artifacts/*/artifacts/images/*.png")]
    assert sorted(name.partition("+timestamp")[0] for name in kept) == [
        "mask~heat_map+step+0",
        "mask~heat_map+step+2",
        "test~confusion_matrix+step+4",
    ]


def test_grids_follow_the_blocks() -> None:
    tensors = [("stem.0.weight", 1, 2), ("stem.1.weight", 1, 2), ("h.0.1.q.weight", 3, 9), ("h.1.0.q.weight", 9, 9)]
    blocks, rest = grids([*tensors, ("h.1.0.k.bias", 0, 3), ("head.weight", 3, 3)])
    assert (blocks.name, blocks.types, blocks.blocks) == ("h.*.*", ["q.weight", "k.bias"], ["0.1", "1.0"])
    assert blocks.cells == {("q.weight", "0.1"): (3, 9), ("q.weight", "1.0"): (9, 9), ("k.bias", "1.0"): (0, 3)}
    assert rest.types == ["stem.0.weight", "stem.1.weight", "head.weight"]


def test_pictures_of_odd_sizes_are_drawn() -> None:
    many = [(f"h.{i}.q.weight", i % 3, 3) for i in range(40)]
    for tensors in (many, [("weight", 0, 0)], [(f"layer{i}_$x$.{'y' * 300}", 1, 1) for i in range(20)]):
        assert draw_heat_map(tensors, "a title").ndim == 3
    assert draw_confusion([[1] * 35] * 35, [f"class {i}" for i in range(35)], "many").shape[2] == 3
