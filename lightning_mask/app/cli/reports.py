"""``lightning-mask report``: the page of a run."""

import os
import sys
from pathlib import Path

import click

from lightning_mask.app.cli.output import AS_JSON, FILES, as_json


@click.command()
@click.argument("run", type=FILES)
@click.option(
    "--open/--no-open",
    "opens",
    default=None,
    help="Whether a browser shows the page. Without either: where this is a terminal on a screen.",
)
@click.option(
    "--previous", type=FILES, help="Folder of the run to compare with; default: the newest older one beside this one."
)
@AS_JSON
def report(run: Path, opens: bool | None, previous: Path | None, json: bool) -> None:
    """Write the page of a run, and show it.

    report.html goes into the run's folder, RUN, and needs no other file. It says what was held, shows the phases with loss and
    learning rates, the density by layer and the test figures, and compares it all with the run before.

    \b
    Examples:
      lightning-mask report logs/train/runs/<run>
      lightning-mask report logs/train/runs/<run> --no-open
      lightning-mask report logs/train/runs/<run> --previous logs/train/runs/<other>
    """
    from lightning_mask.app.report import write_report

    page = write_report(run, previous=previous)
    if json:
        as_json({"run": str(run), "report": str(page)})
    else:
        click.echo(page)
    if opens or (opens is None and not json and _on_a_screen()):
        click.launch(str(page))


def _on_a_screen() -> bool:
    screen = sys.platform in ("darwin", "win32") or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())
    return screen and sys.stdout.isatty()
