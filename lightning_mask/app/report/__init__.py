"""The page of a run: ``report.html``, one file that says what was held, what came of it, and what differs from before."""

import os
import time
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mask.app.report import sections, tensors
from lightning_mask.app.report.markup import Content, Markup, tag
from lightning_mask.app.report.reading import Run, previous_run, read_run
from lightning_mask.app.report.style import STYLE
from lightning_mask.core.files import whole_file

__all__ = ["try_report", "write_report"]

PAGE = "report.html"
# Nothing is fetched and no script runs, whatever names in the run say.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def write_report(run_folder: str | os.PathLike[str], *, previous: str | os.PathLike[str] | None = None) -> Path:
    """Write the page of a run into its folder; parts of which the run left nothing are left out.

    Args:
        run_folder: A run's folder.
        previous: Folder of the run to compare with; None: the newest older one in the same parent folder, if there is any.

    Returns:
        The file, ``report.html``.

    Raises:
        ValueError: If a folder is not a run's, a file in it is damaged, or the two are the same.
    """
    folder = Path(run_folder)
    run = read_run(folder)
    if previous is None:
        before = previous_run(run)
    elif Path(previous).resolve() == folder.resolve():
        raise ValueError(f"{previous} is the run itself: give another one to compare it with.")
    else:
        before = read_run(Path(previous))
    target = folder / PAGE
    with whole_file(target) as temporary:
        temporary.write_text(_page(run, before), encoding="utf-8", errors="replace")
    return target


def _page(run: Run, before: Run | None) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'),
        tag("meta", name_="viewport", content_="width=device-width, initial-scale=1"),
        tag("title", f"{run.task} · {run.name}"),
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    body: list[Content] = [
        _header(run),
        [tag("p", note, class_="note", role="note") for note in _notes(run)],
        sections.tiles(run, before),
        sections.course(run),
        tensors.layers(run),
        tensors.sparsity(run),
        tensors.held(run),
        sections.figures(run),
        sections.comparison(run, before),
        sections.folded(run),
        tag("footer", "lightning_mask · ", tag("code", str(run.folder.resolve()))),
    ]
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', tag('main', body)), lang='en')}\n"


def _header(run: Run) -> Markup:
    def square(i: int) -> Markup:
        kind = "on" if i in (1, 4, 6, 7, 11, 13) else "off"
        return tag("rect", x=12 * (i % 4), y=12 * (i // 4), width=10, height=10, rx=2, class_=kind)

    kept = [group for group in ("model", "data", "mask", "experiment") if run.choices.get(group, "none") != "none"]
    groups = [f"{group}={run.choices[group]}" for group in kept]
    words = [*groups, *(str(w) for w in run.summary.get("overrides") or [] if str(w) not in groups)]
    tags = ", ".join(str(word) for word in run.summary.get("tags") or [])
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
    below = " · ".join(part for part in (run.name, f"begun {when}", tags) if part)
    return tag(
        "header",
        tag("svg", map(square, range(16)), viewBox="0 0 46 46", aria_hidden="true"),
        tag(
            "div",
            tag("h1", run.task),
            tag("span", below, class_="soft"),
            tag("div", [tag("code", word) for word in words], class_="chips"),
        ),
    )


def _notes(run: Run) -> list[str]:
    """What is missing, and why."""
    notes = []
    if not run.summary:
        notes.append(
            f"This run has no summary.json: it did not come to its end, or goes on. It logged {run.steps:,} steps."
        )
    if not run.figures:
        notes.append("There are no curves: metrics.csv is missing or empty. The CSV logger writes it (logger=csv).")
    if run.gaps:
        odd = ", ".join(f"{count:,} of {name}" for name, count in run.gaps.items())
        notes.append(f"Figures that were not finite are left out: {odd}.")
    if run.summary and not any(name.startswith("test/") for name in run.metrics):
        notes.append("The run was not tested.")
    return notes


def try_report(run_folder: str | os.PathLike[str]) -> None:
    """Write the page of a run that has just ended; what goes wrong there is said, and does not make the run a failure."""
    try:
        write_report(run_folder)
    except Exception as error:
        rank_zero_warn(f"{PAGE} was not written: {type(error).__name__}: {error}")
