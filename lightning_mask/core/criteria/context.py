"""What a criterion may look at besides the parameters."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_mask.core.criteria.examples import examples
from lightning_mask.core.criteria.seeds import named_seed
from lightning_mask.core.distributed import rank
from lightning_mask.core.sharding import deals_out, is_sharded

Loss = Callable[[object], Tensor | None]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

NO_SAMPLED_LOSS = (
    "This criterion needs a loss against labels drawn from the model's own predictions; define mask_sampled_loss(self, batch) "
    "in the module (or pass sampled_loss=), or take score=fisher, which looks at the labels of the data."
)


class Context:
    """What a criterion may look at besides the parameters.

    Args:
        model: The module that owns the parameters.
        loss: Maps a batch to a scalar loss, with gradients; or to None, and :meth:`gradients` passes over the batch.
        batches: Called to get the training batches, fewer or more as the selection says.
        seed: Seed of the selection.
        reference: Weights to compare with (at the start of training), by parameter name.
        movement: Sum of ``-g * w`` over the optimizer steps so far, by parameter name, where it was kept.
        sampled_loss: As ``loss``, but against labels drawn from the model's own predictions, with torch's global random
            state (which is seeded before each call and put back after it).
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        batches: Callable[[], Iterable[object]] | None = None,
        seed: int = 0,
        reference: Mapping[str, Tensor] | None = None,
        sampled_loss: Loss | None = None,
        movement: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.seed = model, seed
        self._loss, self._batches, self._reference = loss, batches, reference
        self._sampled_loss, self._draws = sampled_loss, 0
        self.movement = movement
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

    def sampled_loss(self, batch: object) -> Tensor | None:
        """Return the loss of one batch against labels drawn from the model's own predictions; None for a batch without.

        The draw depends on the context's seed, the rank, and how many were made before it.

        Raises:
            ValueError: If the context has no such loss.
        """
        if self._sampled_loss is None:
            raise ValueError(NO_SAMPLED_LOSS)
        devices = sorted({p.device.index for p in self.model.parameters() if p.device.type == "cuda"})
        seed = named_seed(self.seed, f"rank {rank()} draw {self._draws}")
        self._draws += 1
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return self._sampled_loss(batch)

    def forward(self) -> Iterator[object]:
        """Yield each batch after its loss was computed, in eval mode and without gradients: for criteria with hooks.

        Raises:
            ValueError: If there is no batch.
        """
        with self._looking():
            seen = 0
            for batch in self.batches:
                with torch.no_grad():
                    self._maybe_loss(batch)
                seen += 1
                yield batch
        if not seen:
            raise ValueError("This criterion needs training batches, and the training data gave none.")

    def gradients(
        self, params: Mapping[str, Tensor], loss: Loss | None = None, *, split: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Yield, batch by batch, the gradient of the mean loss over ``params``; zeros where the loss does not reach.

        The model is in eval mode meanwhile; ``.grad``, ``requires_grad``, buffers and every module's mode are as before after
        it. What else a loss writes down in Python stays.
        Of sharded parameters the gradients are of the mean loss over the ranks, and sharded too.

        Args:
            params: Name to parameter.
            loss: Another loss than the training's, for example :meth:`sampled_loss`.
            split: Example by example instead, each a batch of one.

        Raises:
            ValueError: If a batch cannot be split.
        """
        tensors = list(params.values())
        every = list(self.model.parameters())  # before a forward, after which some may stay gathered
        for value in self._losses(tensors, loss or self._maybe_loss, split):
            yield _named(params, _gradients_of(value, tensors, every))

    def hessian_products(
        self, params: Mapping[str, Tensor], vectors: Mapping[str, Tensor]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield, batch by batch, the product of the loss's Hessian over ``params`` with ``vectors``; as :meth:`gradients`.

        Args:
            params: Name to parameter, not sharded.
            vectors: Name to tensor of the parameter's shape.
        """
        tensors = list(params.values())
        for value in self._losses(tensors, self._maybe_loss):
            with torch.enable_grad():
                found = torch.autograd.grad(value, tensors, allow_unused=True, create_graph=True)
                pairs = zip(found, vectors.values(), strict=True)
                terms = [(g * v).sum() for g, v in pairs if g is not None and g.requires_grad]
            none = [None] * len(tensors)  # a loss that is linear in every tensor
            yield _named(params, torch.autograd.grad(terms, tensors, allow_unused=True) if terms else none)

    def _losses(self, tensors: list[Tensor], loss_of: Loss, split: bool = False) -> Iterator[Tensor]:
        with self._looking(), _requiring_gradients(tensors), _differentiable(self.model):
            seen = 0
            for batch in self._examples() if split else self.batches:
                with torch.enable_grad():
                    value = loss_of(batch)
                if value is not None:
                    seen += 1
                    yield value
            if not seen:
                raise ValueError("This criterion needs training batches with a loss, and the training data gave none.")

    @contextmanager
    def _looking(self) -> Iterator[None]:
        """Eval mode, after which buffers are as before; a warning names a frozen parameter that is not."""
        before = _marks(self.model)
        with eval_mode(self.model), _buffers_kept(self.model):
            yield
        moved = next((name for name, mark in _marks(self.model).items() if before.get(name, mark) != mark), None)
        if moved is not None and rank() == 0:
            warnings.warn(
                f"The loss that a criterion asked for moved {moved}, which requires no gradient; is it of a second network that "
                "follows? Define mask_loss(self, batch) that returns the loss alone, or choose a criterion without data.",
                stacklevel=4,
            )

    def _examples(self) -> Iterator[object]:
        for batch in self.batches:
            yield from examples(batch)


def _gradients_of(loss: Tensor, tensors: list[Tensor], parameters: list[nn.Parameter]) -> Sequence[Tensor | None]:
    if not any(is_sharded(tensor) for tensor in tensors):
        return torch.autograd.grad(loss, tensors, allow_unused=True)
    # The forward ran on gathered copies: a backward pass alone reaches the parameters.
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    found = [tensor.grad for tensor in tensors]
    for parameter, grad in zip(parameters, kept, strict=True):
        parameter.grad = grad
    return found


def _named(params: Mapping[str, Tensor], found: Sequence[Tensor | None]) -> dict[str, Tensor]:
    pairs = zip(params.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else _dense(g.detach()) for (name, p), g in pairs}


def _dense(tensor: Tensor) -> Tensor:
    return tensor.to_dense() if tensor.is_sparse else tensor


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; every module's own mode is as before afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _marks(model: nn.Module) -> dict[str, int]:
    """A sum of the bits of each parameter that requires no gradient; none of those that are dealt out over ranks."""
    if deals_out(model):
        return {}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad and _is_here(p)}
    return {
        name: int(p.view(_BITS[p.element_size()]).sum(dtype=torch.int64)) for name, p in frozen.items() if p.numel()
    }


def _is_here(tensor: Tensor) -> bool:
    """Whether it has values that may be read and written in place."""
    odd = is_lazy(tensor) or tensor.is_meta or tensor.is_inference() or tensor.layout != torch.strided
    return not odd and tensor.element_size() in _BITS


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back buffers whose values changed, but for caches (not persistent) and those that have another shape since."""
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set and _is_here(buffer)
    ]
    try:
        yield
    finally:
        for module, name, buffer, value in kept:
            now = module._buffers.get(name)
            if now is None or now.shape != value.shape or now.dtype != value.dtype or torch.equal(now, value):
                continue
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)


@contextmanager
def _requiring_gradients(tensors: list[Tensor]) -> Iterator[None]:
    frozen = [t for t in tensors if not t.requires_grad]
    for tensor in frozen:
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[None]:
    """Without cuDNN where the model is recurrent: it differentiates such layers in training mode alone."""
    cudnn, before = torch.backends.cudnn, torch.backends.cudnn.enabled
    cudnn.enabled = before and not any(isinstance(module, nn.RNNBase) for module in model.modules())
    try:
        yield
    finally:
        cudnn.enabled = before
