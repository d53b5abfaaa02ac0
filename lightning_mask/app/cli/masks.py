"""``lightning-mask mask``: look at files of masks, and combine them."""

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lightning_mask.app.cli.output import AS_JSON, FILES, OVERWRITE, as_json, check_new, entries, grouped, table

if TYPE_CHECKING:
    from lightning_mask.core import MaskSet

OUT = click.option("-o", "--out", type=FILES, required=True, help="File to write.")


@click.group()
def mask() -> None:
    """Look at files of masks, and combine them.

    A mask says which entries of a model's tensors may change (of a pruned model: which are alive). A run leaves those that
    were in force when it ended in masks.safetensors.

    \b
    Examples:
      lightning-mask mask show logs/train/runs/<run>/masks.safetensors
      lightning-mask mask overlap a/masks.safetensors b/masks.safetensors c/masks.safetensors
      lightning-mask mask not a/masks.safetensors -o free.safetensors      what task A left free
      lightning-mask mask and free.safetensors b/masks.safetensors -o both.safetensors
      lightning-mask train mask=head mask.mask=both.safetensors            and train behind it
    """


@mask.command()
@click.argument("file", type=FILES)
@click.option("--all", "every", is_flag=True, help="A line for each tensor, not one for those of all blocks together.")
@AS_JSON
def show(file: Path, every: bool, json: bool) -> None:
    """Show how many entries of each tensor are active.

    Tensors that are alike but for the number of their block share a line; --json gives each its own.

    \b
    Examples:
      lightning-mask mask show masks.safetensors
      lightning-mask mask show masks.safetensors --json | jq '.tensors[] | select(.density > 0.5) | .name'
    """
    masks = _load(file)
    facts = {**_facts(masks), "file": str(file), "recipe": masks.recipe, "tensors": _tensors(masks)}
    if json:
        as_json(facts)
        return
    columns = {"tensor": "left", "tensors": "right", "entries": "right", "active": "right", "density": "right"}
    rows = [entries(name, alike) for name, _, alike in grouped([(row, "") for row in facts["tensors"]], every)]
    table(str(file), columns, rows, entries("all", facts["tensors"]))
    click.echo(f"hash: {facts['hash']}")


@mask.command("and")
@click.argument("files", nargs=-1, required=True, type=FILES)
@OUT
@OVERWRITE
@AS_JSON
def intersection(files: tuple[Path, ...], out: Path, overwrite: bool, json: bool) -> None:
    """Keep active what is active in every file.

    \b
    Example:
      lightning-mask mask and a.safetensors b.safetensors -o both.safetensors
    """
    _combine("and", operator.and_, files, out, overwrite, json)


@mask.command("or")
@click.argument("files", nargs=-1, required=True, type=FILES)
@OUT
@OVERWRITE
@AS_JSON
def union(files: tuple[Path, ...], out: Path, overwrite: bool, json: bool) -> None:
    """Make active what is active in at least one file.

    \b
    Example: all that tasks A, B and C have taken of a network
      lightning-mask mask or a.safetensors b.safetensors c.safetensors -o taken.safetensors
    """
    _combine("or", operator.or_, files, out, overwrite, json)


@mask.command("not")
@click.argument("file", type=FILES)
@OUT
@OVERWRITE
@AS_JSON
def complement(file: Path, out: Path, overwrite: bool, json: bool) -> None:
    """Make active what was not, and the other way round.

    \b
    Example:
      lightning-mask mask not taken.safetensors -o free.safetensors
    """
    check_new(out, overwrite)
    masks = _load(file)
    _write(~masks, {"not": masks.recipe}, out, json)


@mask.command()
@click.argument("files", nargs=-1, required=True, type=FILES)
@AS_JSON
def overlap(files: tuple[Path, ...], json: bool) -> None:
    """Compare the masks of two files or more, each with each: active in both over active in either (Jaccard).

    1 means the same entries, 0 none in common. Tensors that are whole in both do not count: a head that always trains says
    nothing of how alike two choices are. Two random masks of density d have about d / (2 - d) in common.

    \b
    Examples:
      lightning-mask mask overlap logs/train/runs/*/masks.safetensors
      lightning-mask mask overlap fisher.safetensors gradient.safetensors --json
    """
    from lightning_mask.app.comparison.masks import jaccard

    _several(files)
    packed = [_load(file).to_state()["masks"] for file in files]
    matrix = [[jaccard(a, b) for b in packed] for a in packed]
    if json:
        as_json({"files": [str(file) for file in files], "jaccard": matrix})
        return
    numbers = [str(number) for number in range(1, len(files) + 1)]
    columns = {"": "right", "file": "left", **dict.fromkeys(numbers, "right")}
    cells = [["-" if value != value else f"{value:.3f}" for value in row] for row in matrix]
    table("Active in both over active in either", columns, map(_join, numbers, map(str, files), cells))


def _join(number: str, file: str, cells: list[str]) -> list[str]:
    return [number, file, *cells]


def _combine(
    name: str,
    how: Callable[["MaskSet", "MaskSet"], "MaskSet"],
    files: tuple[Path, ...],
    out: Path,
    overwrite: bool,
    json: bool,
) -> None:
    _several(files)
    check_new(out, overwrite)
    sets = [_load(file) for file in files]
    _write(functools.reduce(how, sets), {name: [masks.recipe for masks in sets]}, out, json)


def _several(files: tuple[Path, ...]) -> None:
    if len(files) < 2:
        raise click.UsageError("Give two files or more.")


def _load(file: Path) -> "MaskSet":
    from lightning_mask.core import MaskSet

    return MaskSet.load(file)


def _write(masks: "MaskSet", recipe: dict[str, Any], out: Path, json: bool) -> None:
    masks.recipe = recipe
    masks.save(out)
    facts = {"out": str(out), **_facts(masks)}
    if json:
        as_json(facts)
    else:
        click.echo(f"{out}: {facts['active']:,} of {facts['entries']:,} entries active ({facts['density']:.2%})")


def _facts(masks: "MaskSet") -> dict[str, Any]:
    return {
        "hash": masks.hash(),
        "entries": masks.numel(),
        "active": masks.count(),
        "density": masks.density(),
    }


def _tensors(masks: "MaskSet") -> list[dict[str, Any]]:
    from lightning_mask.core.maskset import active

    rows = [(name, list(each.shape), each.numel(), active(each)) for name, each in masks.items()]
    return [
        {"name": name, "shape": shape, "entries": n, "active": count, "density": count / max(n, 1)}
        for name, shape, n, count in rows
    ]
