"""Criteria: functions that give every entry in scope a number; higher = more worth keeping active.

A criterion takes the parameters in scope and a :class:`Context` and returns one real tensor of the same shape for each.
Gradients are taken in eval mode (no dropout noise, batch statistics do not move) and leave ``.grad`` alone; scores that
were made from data are averaged over ranks before they are ranked.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from lightning_mask.core.distributed import mean_over_ranks

Scores = dict[str, Tensor]
Criterion = Callable[[Mapping[str, Tensor], "Context"], Scores]

CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a criterion under ``name``, so that ``score=name`` finds it.

    Raises:
        ValueError: If another function has that name already.

    Example:
        >>> @criterion("distance_from_one")
        ... def distance_from_one(params, context):
        ...     return {name: (p - 1).abs() for name, p in params.items()}
    """

    def register(function: Criterion) -> Criterion:
        known = CRITERIA.get(name)
        if known is not None and _defined(known) != _defined(function):
            raise ValueError(f"A criterion named {name!r} exists already ({'.'.join(_defined(known))}).")
        CRITERIA[name] = function
        return function

    return register


def get(score: str | Criterion) -> Criterion:
    """Return the criterion of that name, or ``score`` itself when it is a function.

    A name with dots that is not registered is imported: ``"mine.last_minus_first"`` is that function of ``mine.py``.

    Raises:
        ValueError: If there is none of that name.
    """
    if not isinstance(score, str):
        if not callable(score):
            raise ValueError(f"score must be the name of a criterion or a function, got {score!r}.")
        return score
    if score not in CRITERIA and "." in score:
        return _imported(score)
    if score not in CRITERIA:
        close = get_close_matches(score, CRITERIA, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"score={score!r} is unknown; {hint}there are {', '.join(sorted(CRITERIA))}. Register your own with @criterion."
        )
    return CRITERIA[score]


def _imported(path: str) -> Criterion:
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"score={path!r} cannot be imported ({error}); the file's folder must be on PYTHONPATH."
        ) from None
    if not callable(function):
        raise ValueError(f"score={path!r} is not a function.")
    return function


def name_of(score: str | Criterion) -> str:
    """Return the name a criterion is registered under, or that of its function or class."""
    if isinstance(score, str):
        return score
    return next((name for name, function in CRITERIA.items() if function is score), _defined(score)[1])


def _defined(score: Criterion) -> tuple[str, str]:
    """Module and qualified name of a function, of that of a partial, or of the class of another callable object."""
    while isinstance(score, partial):
        score = score.func
    named = score if hasattr(score, "__qualname__") else type(score)
    return named.__module__, named.__qualname__


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
        """
        tensors = list(params.values())
        with _ready_for_gradients(self.model, tensors):
            seen = 0
            for batch in self.batches:
                with torch.enable_grad():
                    loss = self._maybe_loss(batch)
                    if loss is None:
                        continue
                    found = torch.autograd.grad(loss, tensors, allow_unused=True)
                seen += 1
                yield {
                    name: torch.zeros_like(p) if g is None else g.detach()
                    for (name, p), g in zip(params.items(), found, strict=True)
                }
            if not seen:
                raise ValueError("This criterion needs training batches with a loss, and the training data gave none.")


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


def compute(score: str | Criterion, params: Mapping[str, Tensor], context: Context) -> Scores:
    """Run a criterion, check what it returned, and average data-made scores over ranks.

    Raises:
        ValueError: If a tensor is missing, has another shape, or holds nan.
    """
    function = get(score)
    label = score if isinstance(score, str) else getattr(score, "__name__", name_of(score))
    scores = function(params, context)
    for name, parameter in params.items():
        if name not in scores:
            raise ValueError(f"The criterion {label!r} returned no score for {name}.")
        if scores[name].shape != parameter.shape:
            raise ValueError(
                f"The criterion {label!r} returned shape {tuple(scores[name].shape)} for {name} of {tuple(parameter.shape)}."
            )
    result = {name: scores[name].detach() for name in params}
    if context.used_data:
        result = {name: mean_over_ranks(value) for name, value in result.items()}
    for name, value in result.items():
        if bool(torch.isnan(value).any()):
            raise ValueError(
                f"The criterion {label!r} gave nan for {name}; check the loss, or run it in a higher precision."
            )
    return result


def named_seed(seed: int, name: str) -> int:
    """Return a 63-bit seed that differs from tensor to tensor and from seed to seed, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def random_scores(shapes: Mapping[str, tuple[int, ...]], seed: int) -> Scores:
    """Return uniform float32 scores on the CPU, independent for each name and seed."""
    scores = {}
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(named_seed(seed, name))
        scores[name] = torch.rand(shape, generator=generator)
    return scores


@criterion("random")
def random(params: Mapping[str, Tensor], context: Context) -> Scores:
    """Uniform noise, independent for each tensor and seed.

    Source: Xu and Zhang, "Random Masking Finds Winning Tickets for Parameter Efficient Fine-tuning" (2024).
    """
    return random_scores({name: tuple(p.shape) for name, p in params.items()}, context.seed)


@criterion("magnitude")
def magnitude(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``|w|``. Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks" (2015)."""
    return {name: p.detach().abs() for name, p in params.items()}


@criterion("gradient")
def gradient(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``sum over batches of |dL_b/dw|``. Source: Song et al., "Sparse is Enough in Fine-tuning" (SIFT, 2023), on batches."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    for grads in context.gradients(params):
        for name, g in grads.items():
            total[name] += g.abs()
    return total


@criterion("fisher")
def fisher(params: Mapping[str, Tensor], context: Context) -> Scores:
    """``1/B * sum over batches of (dL_b/dw)^2``: the empirical Fisher information with squared *batch* gradients.

    Source: Xu et al., "Raise a Child in Large Language Model" (Child-Tuning-D, 2021), equation (6), as its code takes it;
    Sung et al., "Training Neural Networks with Fixed Sparse Masks" (FISH, 2021) squares the gradients of single examples
    instead, which a batch size of 1 gives here.
    """
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in params.items()}
    count = 0
    for grads in context.gradients(params):
        count += 1
        for name, g in grads.items():
            total[name] += g.float().square()
    return {name: value / max(count, 1) for name, value in total.items()}
