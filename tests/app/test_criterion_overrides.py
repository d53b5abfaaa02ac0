"""A criterion and its arguments from the command line."""

import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from omegaconf import DictConfig

from lightning_mask import FreezeMask, MaskSet
from lightning_mask.app.parts import make_callbacks
from lightning_mask.core.criteria.weights import spectral
from tests.app.conftest import REPO, TINY, command

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


@pytest.mark.slow
@pytest.mark.parametrize("registered", [True, False])
def test_a_criterion_in_a_file_of_ones_own_works_from_the_command_line(tmp_path: Path, registered: bool) -> None:
    name = "first_entries" if registered else "first"
    (tmp_path / "mine.py").write_text(
        textwrap.dedent(
            """
            import torch
            from lightning_mask import criterion

            def first(params, context):
                return {name: -torch.arange(float(p.numel())).view_as(p) for name, p in params.items()}

            first_entries = criterion("first_entries")(first)
            """
        )
    )
    words = [f"mask.score=mine.{name}", "mask.scope=[net.stem.0.weight]", "mask.density=5"]
    words += ["mask.train=[net.classifier]", f"paths.output_dir={tmp_path / 'run'}"]
    done = command(
        sys.executable, str(REPO / "scripts/train.py"), *TINY, "mask=random", *words, cwd=tmp_path, PYTHONPATH="."
    )
    assert done.returncode == 0, done.stdout
    mask = MaskSet.load(tmp_path / "run/masks.safetensors")["net.stem.0.weight"]
    assert mask.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
