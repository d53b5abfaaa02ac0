"""What the subcommands print, as a table or as JSON, and where they write."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

FILES = click.Path(path_type=Path)
AS_JSON = click.option("--json", is_flag=True, help="Print one JSON value, for programs, on standard output.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT where it is there already.")


def as_json(value: Any) -> None:
    """Print a value as JSON; what is not finite becomes null."""
    click.echo(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False))


def table(title: str, columns: Mapping[str, str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()) -> None:
    """Print a table.

    Args:
        title: Above it.
        columns: Heading to "left" or "right".
        rows: Cells, as text.
        total: A last row, below a line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title)
    for name, side in columns.items():
        made.add_column(name, justify=side, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        made.add_row(*map(Text, row))
    if total:
        made.add_section()
        made.add_row(*map(Text, total))
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(made)


def grouped(
    rows: Iterable[tuple[Mapping[str, Any], str]], every: bool
) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """Put tensors together that are alike but for the number of their block.

    Args:
        rows: Each with a ``name``, and a word that those of one group share.
        every: Each stays alone.

    Returns:
        Name, with ``*`` for numbers where there are several; word; members.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row, word in rows:
        key = row["name"] if every else ".".join("*" if part.isdigit() else part for part in row["name"].split("."))
        groups.setdefault((key, word), []).append(row)
    return [(key if len(m) > 1 else m[0]["name"], word, m) for (key, word), m in groups.items()]


def entries(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cells of a group of tensors: its name, and their number, entries, active entries and density."""
    total, count = sum(row["entries"] for row in rows), sum(row["active"] for row in rows)
    return [name, str(len(rows)), f"{total:,}", f"{count:,}", f"{count / max(total, 1):.2%}"]


def check_new(out: Path, overwrite: bool) -> None:
    """Refuse to write over something; an empty folder is nothing.

    Raises:
        ValueError: If ``out`` is there and is not to be replaced.
    """
    there = any(out.iterdir()) if out.is_dir() else out.exists()
    if there and not overwrite:
        raise ValueError(f"{out} is there already: give another with --out, or replace it with --overwrite.")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
