"""The names of criteria, and how one is run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from inspect import signature

import torch
from torch import Tensor, nn

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.distributed import mean_over_ranks, rank
from lightning_mask.core.sharding import deals_out, is_sharded, local, reshard, shard, totals

Scores = dict[str, Tensor]
Criterion = Callable[[Mapping[str, Tensor], Context], Scores]
Check = Callable[[Sequence[str], nn.Module], object]

CRITERIA: dict[str, Criterion] = {}
_CHECKS: dict[str, Check] = {}


def criterion(name: str, check: Check | None = None) -> Callable[[Criterion], Criterion]:
    """Register a criterion under ``name``, so that ``score=name`` finds it.

    Args:
        name: The name.
        check: Called before training with the names in scope and the model; raises ValueError for what it cannot score, so
            that a criterion that comes in mid-training does not stop it.

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
        if check is not None:
            _CHECKS[name] = check
        return function

    return register


def get(score: str | Criterion) -> Criterion:
    """Return the criterion of that name, or ``score`` itself when it is a function.

    A name with dots that is not registered is imported: ``"mine.beyond_its_row"`` is that function of ``mine.py``.

    Raises:
        ValueError: If there is none of that name, or a partial gives arguments that its function does not take.
    """
    if not isinstance(score, str):
        if not callable(score):
            raise ValueError(f"score must be the name of a criterion or a function, got {score!r}.")
        _check_arguments(score)
        return score
    if score not in CRITERIA and "." in score:
        return _imported(score)
    if score not in CRITERIA:
        close = get_close_matches(score, CRITERIA, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"score={score!r} is unknown; {hint}there are {', '.join(sorted(CRITERIA))}. Register your own with @criterion."
        )
    _check_arguments(CRITERIA[score])
    return CRITERIA[score]


def require(score: str | Criterion, names: Sequence[str], model: nn.Module) -> None:
    """Refuse what a criterion cannot score, as far as that can be told without data.

    Args:
        score: The criterion.
        names: Of the parameters in scope.
        model: The module that owns them.

    Raises:
        ValueError: Naming what it cannot score.
    """
    function = _function(get(score))
    for name, check in _CHECKS.items():
        if CRITERIA.get(name) is function:
            check(names, model)


def not_of_shards(why: str) -> Check:
    """Return a check that refuses parameters that are dealt out over ranks, and says why."""

    def check(names: Sequence[str], model: nn.Module) -> None:
        if deals_out(model):
            raise ValueError(why)

    return check


def _function(score: Criterion) -> Criterion:
    while isinstance(score, partial):
        score = score.func
    return score


def _check_arguments(score: Criterion) -> None:
    function = _function(score)
    try:
        takes = signature(function, follow_wrapped=False)
    except (TypeError, ValueError):  # it is not written in Python
        return
    try:
        signature(score, follow_wrapped=False).bind({}, None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"score={name_of(score)} cannot be called with params and context alone ({error}); {name_of(function)} takes {takes}."
        ) from None


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
    _check_arguments(function)
    return function


def name_of(score: str | Criterion) -> str:
    """Return the name a criterion is registered under, or that of its function or class; of a partial with its arguments.

    Example:
        >>> name_of(partial(get("spectral"), rank=16))
        'spectral(rank=16)'
    """
    if isinstance(score, str):
        return score
    registered = next((name for name, function in CRITERIA.items() if function is score), None)
    if registered is None and isinstance(score, partial):
        given = [*map(repr, score.args), *(f"{name}={value!r}" for name, value in score.keywords.items())]
        return f"{name_of(score.func)}({', '.join(given)})"
    return registered or _defined(score)[1]


def may_need_reference(score: str | Criterion) -> bool:
    """Whether a criterion may ask for the weights from the start of training, so that they must be kept.

    Of those of this package, the ones in ``training`` do; a user's own may.
    """
    return is_own(score) or _defined(get(score))[0] == f"{__package__}.training"


def accumulates(score: str | Criterion) -> bool:
    """Whether a criterion goes by a sum over the steps of training, which has to be kept."""
    return _defined(get(score)) == _defined(CRITERIA["movement"])


def needs_loss(score: str | Criterion) -> bool:
    """Whether a criterion of this package looks at the training's loss, or at what goes on in the network meanwhile."""
    places = (f"{__package__}.gradients", f"{__package__}.activations")
    return _defined(get(score))[0] in places and not accumulates(score) and not needs_sampled_loss(score)


def needs_sampled_loss(score: str | Criterion) -> bool:
    """Whether a criterion looks at the loss against labels that are drawn from the model's own predictions."""
    return _defined(get(score)) == _defined(CRITERIA["fisher_sampled"])


def from_weights(score: str | Criterion) -> bool:
    """Whether a criterion of this package looks at the weights alone, so that it can be tried before training."""
    return _defined(get(score))[0] == f"{__package__}.weights"


def is_own(score: str | Criterion) -> bool:
    """Whether a criterion is a user's own, which may look at anything, gradients that are there already too."""
    return not _defined(get(score))[0].startswith(f"{__package__}.")


def _defined(score: Criterion) -> tuple[str, str]:
    """Module and qualified name of a function, of that of a partial, or of the class of another callable object."""
    score = _function(score)
    named = score if hasattr(score, "__qualname__") else type(score)
    return named.__module__, named.__qualname__


def compute(score: str | Criterion, params: Mapping[str, Tensor], context: Context) -> Scores:
    """Run a criterion, check what it returned, and average data-made scores over ranks.

    Raises:
        ValueError: If it cannot score these (:func:`require`), or a tensor that it returned is missing, is none of real numbers,
            has another shape, or holds nan.

    Warns:
        UserWarning: If all scores are 0, so that the order of the entries decides.
    """
    function = get(score)
    label = score if isinstance(score, str) else getattr(score, "__name__", name_of(score))
    require(score, list(params), context.model)
    scores = function(params, context)
    if not isinstance(scores, Mapping):
        raise ValueError(
            f"The criterion {label!r} returned {type(scores).__name__}; it must return a dict of names to tensors."
        )
    if context.used_data:
        reshard(context.model)
    for name, parameter in params.items():
        if name not in scores:
            raise ValueError(f"The criterion {label!r} returned no score for {name}.")
        if not isinstance(scores[name], Tensor) or scores[name].is_complex():
            what = scores[name].dtype if isinstance(scores[name], Tensor) else type(scores[name]).__name__
            raise ValueError(
                f"The criterion {label!r} returned {what} for {name}; it must be a tensor of real numbers."
            )
        if scores[name].shape != parameter.shape:
            raise ValueError(
                f"The criterion {label!r} returned shape {tuple(scores[name].shape)} for {name} of {tuple(parameter.shape)}."
            )
    result = {name: scores[name].detach() for name in params}
    for name, value in result.items():
        if context.used_data and not is_sharded(value):
            value = mean_over_ranks(value)
        value = result[name] = shard(value, params[name])
        if any(totals([int(torch.isnan(local(value)).any())], value)):
            raise ValueError(
                f"The criterion {label!r} gave nan for {name}; check the loss, or run it in a higher precision."
            )
    # A depth may be 0 for all; what is measured and 0 everywhere would leave the choice to the order of the entries.
    if (
        not from_weights(score)
        and not any(any(totals([int(local(v).any())], v)) for v in result.values())
        and rank() == 0
    ):
        warnings.warn(
            f"The criterion {label!r} scored every entry 0, so the first entries are taken. At the start of training nothing has "
            "changed yet, and one batch alone has no variance: ask for it later (a later phase, refresh=, start= of PruneMask), "
            "give it more batches, or take another criterion.",
            stacklevel=2,
        )
    return result
