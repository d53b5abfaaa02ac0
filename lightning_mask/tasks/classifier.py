"""What all classifiers share: steps and metrics."""

from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from lightning_mask.tasks.task import Batch, MakeOptimizer, MakeScheduler, Task


class Classifier(Task):
    """Trains a network that maps a batch to logits, with cross-entropy.

    A batch is a dict with ``labels``, int64 [batch], and the network's inputs. Logs ``train/loss`` (each step) and
    ``train/loss_epoch``; ``val/loss``, ``val/accuracy``, ``val/macro_f1``; the same under ``test/``. Figures of an epoch
    are over all ranks.

    Args:
        num_classes: Number of classes, 2 or more.
        optimizer: Called with all parameters, held ones too, returns the optimizer; may be left out where nothing is trained.
        scheduler: Called with the optimizer and ``num_training_steps=``, returns a learning-rate scheduler that is stepped
            once per optimizer step; None: the rate stays.
        class_names: Names of the classes, in the order of their indices.

    Attributes:
        net: The network.
        confusion_matrix: After a test: rows are true classes, columns are predicted ones, entries are counts.

    Raises:
        ValueError: If there are fewer than two classes, or not as many names.
    """

    def __init__(
        self,
        num_classes: int,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeScheduler | None = None,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__(optimizer, scheduler)
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes}.")
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"There are {num_classes} classes but {len(class_names)} class_names: {class_names}.")
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names is not None else [str(i) for i in range(num_classes)]
        self.confusion_matrix: list[list[int]] | None = None
        self.metrics["train_loss"] = MeanMetric()
        for stage in ("val", "test"):
            self.metrics[f"{stage}_loss"] = MeanMetric()
            self.metrics[f"{stage}_accuracy"] = MulticlassAccuracy(num_classes, average="micro")
            self.metrics[f"{stage}_macro_f1"] = MulticlassF1Score(num_classes, average="macro")
        self.metrics["test_confusion"] = MulticlassConfusionMatrix(num_classes)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of a batch, [batch, classes]."""
        raise TypeError(
            f"{type(self).__name__} must define forward(batch) that returns logits of shape [batch, classes]."
        )

    def mask_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, without logging: what a criterion that needs gradients is computed from."""
        return cross_entropy(self(batch).float(), batch["labels"])

    def mask_sampled_loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch against labels drawn from the network's own predictions."""
        logits = self(batch).float()
        return cross_entropy(logits, logits.detach().softmax(1).multinomial(1).squeeze(1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a training batch."""
        loss = self.mask_loss(batch)
        size = len(batch["labels"])
        self.log("train/loss", loss.detach(), prog_bar=True, on_step=True, on_epoch=False, batch_size=size)
        self._add("train/loss_epoch", "train_loss", loss.detach(), size)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add a batch to the validation figures; return ``losses``, one for each example, [batch]."""
        return {"losses": self._evaluate(batch, "val")}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test figures."""
        self._evaluate(batch, "test")

    def _evaluate(self, batch: Batch, stage: str) -> Tensor:
        labels = batch["labels"]
        logits = self(batch).float()
        losses = cross_entropy(logits, labels, reduction="none")
        self._add(f"{stage}/loss", f"{stage}_loss", losses.mean(), len(labels))
        self._add(f"{stage}/accuracy", f"{stage}_accuracy", logits, labels)
        self._add(f"{stage}/macro_f1", f"{stage}_macro_f1", logits, labels)
        if stage == "test":
            self._metric("test_confusion").update(logits, labels)
        return losses

    def on_test_epoch_end(self) -> None:
        """Keep the confusion matrix over all ranks."""
        confusion = self._metric("test_confusion")
        self.confusion_matrix = confusion.compute().tolist()
        confusion.reset()
