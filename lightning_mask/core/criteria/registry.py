"""The names of criteria, and how one is run."""

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from inspect import signature

import torch
from torch import Tensor

from lightning_mask.core.criteria.context import Context
from lightning_mask.core.distributed import mean_over_ranks
from lightning_mask.core.sharding import is_sharded, local, reshard, shard, totals

Scores = dict[str, Tensor]
Criterion = Callable[[Mapping[str, Tensor], Context], Scores]

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
    return CRITERIA[score]


def _check_arguments(score: Criterion) -> None:
    function = score
    while isinstance(function, partial):
        function = function.func
    if function is score:
        return
    takes = signature(function)
    try:
        signature(score).bind({}, None)
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


def from_weights(score: str | Criterion) -> bool:
    """Whether a criterion of this package looks at the weights alone, so that it can be tried before training."""
    return _defined(get(score))[0] == f"{__package__}.weights"


def is_own(score: str | Criterion) -> bool:
    """Whether a criterion is a user's own, which may look at anything, gradients that are there already too."""
    return not _defined(get(score))[0].startswith(f"{__package__}.")


def _defined(score: Criterion) -> tuple[str, str]:
    """Module and qualified name of a function, of that of a partial, or of the class of another callable object."""
    while isinstance(score, partial):
        score = score.func
    named = score if hasattr(score, "__qualname__") else type(score)
    return named.__module__, named.__qualname__


def compute(score: str | Criterion, params: Mapping[str, Tensor], context: Context) -> Scores:
    """Run a criterion, check what it returned, and average data-made scores over ranks.

    Raises:
        ValueError: If a tensor is missing, has another shape, or holds nan.
    """
    function = get(score)
    label = score if isinstance(score, str) else getattr(score, "__name__", name_of(score))
    scores = function(params, context)
    if context.used_data:
        reshard(context.model)
    for name, parameter in params.items():
        if name not in scores:
            raise ValueError(f"The criterion {label!r} returned no score for {name}.")
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
    return result
