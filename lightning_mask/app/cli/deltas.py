"""``lightning-mask delta``: small files that make a tuned model of its base, and the base of the tuned model."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lightning_mask.app.cli.output import AS_JSON, FILES, OVERWRITE, as_json, check_new, entries, grouped, table

FORCE = click.option("--force", is_flag=True, help="Also with another base than the delta was made from.")


@click.group()
def delta() -> None:
    """Put small files of changes onto a model, and take them off.

    A delta is what training changed in a network: the entries that were active, with their values.

    BASE, TUNED, A and B are checkpoints: a .safetensors, .ckpt, .pt or .bin file, or a folder as save_pretrained writes it.
    They are gone through tensor by tensor. Nothing is written before everything was checked; what is written appears whole.

    \b
    Examples:
      lightning-mask delta save base/ tuned/ -o delta.safetensors
      lightning-mask delta inspect run/delta.safetensors
      lightning-mask delta hash base/
      lightning-mask delta apply base/ run/delta.safetensors -o tuned/
      lightning-mask delta revert tuned/ run/delta.safetensors --base base/ -o base_again/
      lightning-mask delta diff base/ base_again/
      lightning-mask delta merge a.safetensors b.safetensors -o both.safetensors
    """


@delta.command()
@click.argument("base", type=FILES)
@click.argument("tuned", type=FILES)
@click.option("-o", "--out", type=FILES, required=True, help="File to write.")
@click.option("--masks", type=FILES, help="File of masks: the delta has the entries that were active, and no others.")
@click.option("--originals", is_flag=True, help="Keep BASE's values, too: revert does without BASE then.")
@OVERWRITE
@AS_JSON
def save(base: Path, tuned: Path, out: Path, masks: Path | None, originals: bool, overwrite: bool, json: bool) -> None:
    """Write what TUNED has other than BASE.

    Without --masks, that is whatever differs, bit for bit.

    \b
    Examples:
      lightning-mask delta save base/ tuned/ -o delta.safetensors
      lightning-mask delta save base/ run/checkpoints/last.ckpt -o delta.safetensors --masks run/masks.safetensors
    """
    from lightning_mask.delta import save_delta

    check_new(out, overwrite)
    save_delta(out, base, tuned, masks, originals=originals)
    _made({"base": base, "tuned": tuned}, out, json)


@delta.command()
@click.argument("delta", type=FILES)
@click.option("--all", "every", is_flag=True, help="A line for each tensor, not one for those of all blocks together.")
@AS_JSON
def inspect(delta: Path, every: bool, json: bool) -> None:
    """Check that a delta is whole, and show what it changes and where it comes from.

    \b
    Examples:
      lightning-mask delta inspect run/delta.safetensors
      lightning-mask delta inspect run/delta.safetensors --json | jq .base
    """
    from lightning_mask.delta import inspect

    facts = inspect(delta)
    if json:
        as_json({"delta": str(delta), **facts})
        return
    rows = [(row, str(row["form"])) for row in facts["tensors"]]
    columns = {"tensor": "left", "tensors": "right", "entries": "right", "active": "right", "density": "right"}
    lines = [[*entries(name, alike), form] for name, form, alike in grouped(rows, every)]
    table(str(delta), {**columns, "as": "left"}, lines, [*entries("all", facts["tensors"]), ""])
    for name, value in facts.items():
        if name not in ("tensors", "active", "total", "density"):
            click.echo(f"{name}: {_said(value)}")


@delta.command("hash")
@click.argument("checkpoint", type=FILES)
@AS_JSON
def content(checkpoint: Path, json: bool) -> None:
    """Print the hash of a checkpoint's content: what inspect calls base, of the base that a delta was made from.

    \b
    Examples:
      lightning-mask delta hash base/
      lightning-mask delta hash model.safetensors --json | jq -r .hash
    """
    from lightning_mask.delta import content_hash

    made = content_hash(checkpoint)
    if json:
        as_json({"checkpoint": str(checkpoint), "hash": made})
    else:
        click.echo(made)


@delta.command()
@click.argument("base", type=FILES)
@click.argument("delta", type=FILES)
@click.option("-o", "--out", type=FILES, help="Where to write; default: BASE's name with -tuned, in this folder.")
@OVERWRITE
@FORCE
@AS_JSON
def apply(base: Path, delta: Path, out: Path | None, overwrite: bool, force: bool, json: bool) -> None:
    """Write the tuned model: BASE with the values of the delta, equal to the model it was made from, bit for bit.

    BASE is left as it is, and what is there already is not written over. To change BASE itself: -o BASE --overwrite. A
    folder with other things in it is never replaced. Of a folder, all is taken along but weights in further forms
    (pytorch_model.bin or onnx/ beside model.safetensors), which would be BASE's still. Another base is refused, by the hash
    of its content; --force takes it where names and shapes fit.

    \b
    Examples:
      lightning-mask delta apply base/ run/delta.safetensors                  writes base-tuned/
      lightning-mask delta apply model.safetensors run/delta.safetensors      writes model-tuned.safetensors
      lightning-mask delta apply base/ run/delta.safetensors -o tuned/
      lightning-mask delta apply base/ run/delta.safetensors -o base/ --overwrite
    """
    from lightning_mask.delta import apply

    out = out or _beside(base, "tuned")
    check_new(out, overwrite)
    apply(base, delta, out, force=force)
    _written({"base": base, "delta": delta, "out": out}, json)


@delta.command()
@click.argument("tuned", type=FILES)
@click.argument("delta", type=FILES)
@click.option("-o", "--out", type=FILES, help="Where to write; default: TUNED's name with -reverted, in this folder.")
@click.option("--base", type=FILES, help="The base, to take its values from; needed where the delta has no originals.")
@OVERWRITE
@FORCE
@AS_JSON
def revert(
    tuned: Path, delta: Path, out: Path | None, base: Path | None, overwrite: bool, force: bool, json: bool
) -> None:
    """Write the base that TUNED came from, bit for bit: the values come from the delta's originals, or from --base.

    TUNED is left as it is, and what is there already is not written over. To change TUNED itself: -o TUNED --overwrite.

    \b
    Examples:
      lightning-mask delta revert tuned/ run/delta.safetensors --base base/                writes tuned-reverted/
      lightning-mask delta revert tuned/ with_originals.safetensors -o base_again/
    """
    from lightning_mask.delta import revert

    out = out or _beside(tuned, "reverted")
    check_new(out, overwrite)
    revert(tuned, delta, out, base=base, force=force)
    _written({"tuned": tuned, "delta": delta, "out": out}, json)


@delta.command()
@click.argument("a", type=FILES)
@click.argument("b", type=FILES)
@click.option("--all", "every", is_flag=True, help="Also the tensors that are equal.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 where they differ; without it, 0 either way.")
@AS_JSON
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, every: bool, exit_code: bool, json: bool) -> None:
    """Compare two checkpoints, tensor by tensor and bit for bit, in whatever form each is.

    \b
    Examples:
      lightning-mask delta diff base/ tuned/
      lightning-mask delta diff base/model.safetensors run/checkpoints/last.ckpt
      lightning-mask delta diff base/ base_again/ --exit-code && echo equal
    """
    from lightning_mask.delta import diff

    rows = [asdict(row) for row in diff(a, b)]
    differ = [row for row in rows if row["status"] != "equal"]
    entries, changed = (sum(row[key] for row in rows) for key in ("entries", "changed"))
    if json:
        facts = {"a": str(a), "b": str(b), "equal": not differ, "entries": entries, "changed": changed}
        as_json({**facts, "tensors": rows})
    else:
        shown = rows if every else differ
        if shown:
            columns = dict.fromkeys(("entries", "changed", "largest", "norm"), "right")
            table(f"{a} and {b}", {"tensor": "left", "": "left", **columns}, map(_difference, shown))
        click.echo(f"{len(differ):,} of {len(rows):,} tensors differ, in {changed:,} of {entries:,} entries")
    if exit_code and differ:
        ctx.exit(1)


@delta.command()
@click.argument("deltas", nargs=-1, required=True, type=FILES)
@click.option("-o", "--out", type=FILES, required=True, help="File to write.")
@click.option(
    "--how",
    type=click.Choice(["error", "sum", "mean", "ties"]),
    default="error",
    show_default=True,
    help="What to do about entries that several deltas change: refuse them, add the differences from the base, take their "
    "mean, or TIES-merging (the largest of each, one sign for each entry, the mean of those that agree).",
)
@click.option(
    "--base", type=FILES, help="The base; needed where entries are in common and the deltas have no originals."
)
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True), default=0.2, show_default=True,
    help="For ties: share of the entries of each delta that are kept.",
)  # fmt: skip
@OVERWRITE
@AS_JSON
def merge(
    deltas: tuple[Path, ...], out: Path, how: Any, base: Path | None, density: float, overwrite: bool, json: bool
) -> None:
    """Write one delta that does what several of the same base do.

    Deltas with no entry in common are united exactly, whatever --how says.

    \b
    Examples:
      lightning-mask delta merge a.safetensors b.safetensors -o both.safetensors
      lightning-mask delta merge a.safetensors b.safetensors -o both.safetensors --how ties --base base/
    """
    from lightning_mask.delta import merge

    if len(deltas) < 2:
        raise click.UsageError("Give two deltas or more.")
    check_new(out, overwrite)
    merge(deltas, out, how=how, base=base, density=density)
    _made({"deltas": deltas}, out, json)


def _made(sources: dict[str, Any], out: Path, json: bool) -> None:
    """Say what a delta that was written has in it."""
    from lightning_mask.delta import inspect

    facts = inspect(out)
    if json:
        as_json({**sources, "out": out, **facts})
    else:
        of = f"{facts['active']:,} of {facts['total']:,} entries ({facts['density']:.2%})"
        click.echo(f"{out}: {of}, {facts['bytes']:,} bytes")


def _beside(checkpoint: Path, word: str) -> Path:
    """A name in this folder for what is made of a checkpoint."""
    checkpoint = checkpoint.resolve()
    ending = "" if checkpoint.is_dir() else checkpoint.suffix
    return Path(f"{checkpoint.name.removesuffix(ending)}-{word}{ending}")


def _written(paths: dict[str, Path], json: bool) -> None:
    if json:
        as_json(paths)
    else:
        click.echo(f"written: {paths['out']}")


def _difference(row: dict[str, Any]) -> list[str]:
    figures = ("-" if value != value else f"{value:.4g}" for value in (row["largest"], row["norm"]))
    return [row["name"], row["status"], f"{row['entries']:,}", f"{row['changed']:,}", *figures]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(each)}" for name, each in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
