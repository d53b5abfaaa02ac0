"""What a criterion may look at besides the parameters."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_mask.core.sharding import is_sharded


class Context:
    """What a criterion may look at besides the parameters.

    Args:
        model: The module that owns the parameters.
        loss: Maps a batch to a scalar loss, with gradients; or to None, and :meth:`gradients` passes over the batch.
        batches: Called to get the training batches, fewer or more as the selection says.
        seed: Seed of the selection.
        reference: Weights to compare with (at the start of training), by parameter name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[object], Tensor | None] | None = None,
        batches: Callable[[], Iterable[object]] | None = None,
        seed: int = 0,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.seed = model, seed
        self._loss, self._batches, self._reference = loss, batches, reference
        self.used_data = False

    @property
    def reference(self) -> Mapping[str, Tensor]:
        """Weights at the start of training, detached, by parameter name."""
        if self._reference is None:
            raise ValueError("This criterion needs the weights from the start of training, and none were kept.")
        return self._reference

    @property
    def batches(self) -> Iterable[object]:
        """Training batches of this rank, on the model's device."""
        if self._batches is None:
            raise ValueError(
                "This criterion needs training batches; pass batches= and loss=, or pick one without data."
            )
        self.used_data = True
        return self._batches()

    def loss(self, batch: object) -> Tensor:
        """Return the scalar loss of one batch.

        Raises:
            ValueError: If there is no loss function, or it gives none for this batch.
        """
        loss = self._maybe_loss(batch)
        if loss is None:
            raise ValueError(
                "A criterion asked for a loss and no loss came back for this batch; let the criterion pass over it."
            )
        return loss

    def _maybe_loss(self, batch: object) -> Tensor | None:
        if self._loss is None:
            raise ValueError("This criterion needs a loss; pass loss=, or pick one without data.")
        return self._loss(batch)

    def gradients(self, params: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
        """Yield, batch by batch, the gradient of the mean loss over ``params``; zeros where the loss does not reach.

        The model is in eval mode meanwhile; ``.grad``, ``requires_grad`` and every module's mode are as before after it.
        Of sharded parameters the gradients are of the mean loss over the ranks, and sharded too.
        """
        tensors = list(params.values())
        with _ready_for_gradients(self.model, tensors):
            seen = 0
            for batch in self.batches:
                with torch.enable_grad():
                    loss = self._maybe_loss(batch)
                    if loss is None:
                        continue
                    found = self._gradients_of(loss, tensors)
                seen += 1
                yield {
                    name: torch.zeros_like(p) if g is None else g.detach()
                    for (name, p), g in zip(params.items(), found, strict=True)
                }
            if not seen:
                raise ValueError("This criterion needs training batches with a loss, and the training data gave none.")

    def _gradients_of(self, loss: Tensor, tensors: list[Tensor]) -> Sequence[Tensor | None]:
        if not any(is_sharded(tensor) for tensor in tensors):
            return torch.autograd.grad(loss, tensors, allow_unused=True)
        parameters = list(self.model.parameters())  # the forward ran on gathered copies: backward alone reaches these
        kept = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        loss.backward()
        found = [tensor.grad for tensor in tensors]
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad
        return found


@contextmanager
def _ready_for_gradients(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    frozen = [t for t in tensors if not t.requires_grad]
    model.eval()
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)
        for module, mode in modes:
            module.training = mode
