"""A criterion and its arguments from the command line."""

from collections.abc import Callable
from functools import partial

import pytest
from omegaconf import DictConfig

from lightning_mask import FreezeMask
from lightning_mask.app.parts import make_callbacks
from lightning_mask.core.criteria.weights import spectral

RANK_8 = "{_target_:lightning_mask.core.criteria.weights.spectral,_partial_:true,rank:8}"


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["mask=spectral"], "spectral(rank=32)"),
        (["mask=spectral", "mask.score.rank=8"], "spectral(rank=8)"),
        (["mask=random", f"mask.score={RANK_8}"], "spectral(rank=8)"),
        (["mask=spectral", "mask.score=fisher"], "fisher"),
        (["mask=lisa", "mask.refresh='3 steps'"], "random"),
    ],
)
def test_arguments_reach_the_criterion_and_its_recipe(
    overrides: list[str], name: str, config: Callable[..., DictConfig]
) -> None:
    (mask,) = make_callbacks(config(*overrides, "callbacks=none"))
    assert isinstance(mask, FreezeMask)
    assert mask.selection.recipe()["score"] == name
    if name.startswith("spectral"):
        assert isinstance(mask.selection.score, partial)
        assert mask.selection.score.func is spectral


def test_an_argument_that_it_does_not_take_is_refused_before_training(config: Callable[..., DictConfig]) -> None:
    with pytest.raises(Exception, match=r"FreezeMask: score=spectral.*rank=32, power=2.*cannot be called"):
        make_callbacks(config("mask=spectral", "+mask.score.power=2", "callbacks=none"))
