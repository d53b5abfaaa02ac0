"""The parts of the page that are about tensors; each is None where the run left nothing for it."""

from lightning_mask.app.report.charts import strips
from lightning_mask.app.report.markup import Content, Markup, section, shaded, table, tag
from lightning_mask.app.report.reading import Run
from lightning_mask.app.report.wording import percent
from lightning_mask.callbacks.heat_map import Grid, grids, shade
from lightning_mask.callbacks.report import group_rows, numel
from lightning_mask.core.engine import Row

_ROWS = 120  # of a table


def layers(run: Run) -> Markup | None:
    """Return the density of each layer as heat maps, one for each phase where that is known."""
    if not run.tensors:
        return None
    sizes = {row.name: numel(row) for row in run.tensors}
    known = [(phase.name, phase.active) for phase in run.phases if phase.active is not None]
    shown = known if len(known) > 1 else [("", {row.name: row.active for row in run.tensors})]
    marks = [(0.0, "none"), (0.001, "0.1 %"), (0.01, "1 %"), (0.1, "10 %"), (1.0, "all")]
    scale = [tag("span", tag("i", style=f"--d:{shade(d):.3f}"), word) for d, word in marks]
    parts: list[Content] = []
    for name, counts in shown:
        maps = grids((tensor, counts.get(tensor, 0), size) for tensor, size in sizes.items())
        parts.append(
            [tag("h3", f"phase {name}") if name else None, tag("div", [_heat(grid) for grid in maps], class_="grids")]
        )
    return section(
        "Density per layer",
        tag(
            "p",
            "Per cent of the entries that train (of a pruned tensor: that live); blocks from left to right, tensors downwards.",
            class_="soft",
        ),
        tag("div", scale, class_="scale"),
        parts,
    )


def _heat(grid: Grid) -> Markup:
    rows = []
    for kind in grid.types[:_ROWS]:
        cells = [_cell(kind, block, grid) for block in grid.blocks]
        rows.append((tag("th", tag("code", kind), scope="row"), *cells))
    head = ("", *grid.blocks) if grid.name else ()
    title = tag("code", grid.name) if grid.name else "outside of these blocks"
    return tag("div", tag("h3", title), table(head, rows, class_="heat"), _more(len(grid.types), "tensors"))


def _cell(kind: str, block: str, grid: Grid) -> Markup:
    cell = grid.cells.get((kind, block))
    if cell is None:
        return tag("td", class_="none")
    density = cell[0] / max(cell[1], 1)
    words = "" if cell[0] == 0 else "all" if cell[0] == cell[1] else percent(density).removesuffix(" %")
    return shaded(words, shade(density), f"{cell[0]:,} of {cell[1]:,}")


def sparsity(run: Run) -> Markup | None:
    """Return the sparsity of each pruned tensor over time."""
    of_tensors = {name: points for name, points in run.sparsity.items() if name}
    if not of_tensors:
        return None
    shown = dict(list(of_tensors.items())[:_ROWS])
    return section(
        "Sparsity over time",
        tag(
            "p",
            "Share of zeros in each pruned tensor, from the first step on the left to the last one on the right.",
            class_="soft",
        ),
        strips(shown, run.steps, percent),
        _more(len(of_tensors), "tensors"),
    )


def held(run: Run) -> Markup | None:
    """Return the table of what trained and what was held; tensors that differ in their block's number alone share a line."""
    if not run.tensors:
        return None
    groups = group_rows(run.tensors)
    rows = [_held_row(tag("code", name), members) for name, members in groups[:_ROWS]]
    return section(
        "What trained and what was held",
        tag("p", "As training ended.", class_="soft") if len(run.phases) > 1 else None,
        table(
            ("tensor", "tensors", "entries", "active", "density", "", "held by"),
            [*rows, _held_row("all", run.tensors)],
            (1, 2, 3, 4),
            class_="names sums",
        ),
        _more(len(groups), "groups"),
    )


def _held_row(name: Content, members: list[Row]) -> list[Content]:
    total, count = sum(map(numel, members)), sum(row.active for row in members)
    bar = tag("span", tag("i", style=f"width:{100 * count / max(total, 1):.2f}%"), class_="bar")
    ways = {row.held_by for row in members}
    words = {"-": "nothing", "requires_grad": "no gradient"}
    held_by = words.get(*ways, *ways) if len(ways) == 1 else ""
    return [name, f"{len(members):,}", f"{total:,}", f"{count:,}", percent(count / max(total, 1)), bar, held_by]


def _more(count: int, things: str) -> Markup | None:
    return tag("p", f"and {count - _ROWS:,} more {things}", class_="soft") if count > _ROWS else None
