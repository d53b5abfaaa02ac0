"""Curves over optimizer steps. Lines are SVG that stretches with the page; words are HTML, which stays legible on a phone."""

from collections.abc import Callable, Mapping, Sequence

from lightning_mask.app.report.markup import Markup, tag
from lightning_mask.app.report.reading import Phase, Points
from lightning_mask.app.report.wording import short, ticks

_WIDTH, _HEIGHT = 1000, 100
_POINTS = 150  # of a line; more are put together into means, with the range around them


def chart(
    title: str,
    lines: Mapping[str, Points],
    *,
    steps: int,
    phases: Sequence[Phase] = (),
    form: Callable[[float], str] = short,
    exact: bool = False,
    bounds: tuple[float, float] | None = None,
    note: str | None = None,
) -> Markup:
    """Return a figure with one curve for each name.

    Args:
        title: Of the figure.
        lines: Points by name, in the order of their steps; those without any are left out.
        steps: Length of the x axis.
        phases: Their beginnings are marked.
        form: How values are written.
        exact: Draw every change as a stair, rather than means of many points.
        bounds: Ends of the y axis; None: those of the values.
        note: A sentence below the title.
    """
    lines = {name: points for name, points in lines.items() if points}
    values = [value for points in lines.values() for _, value in points]
    low, high = bounds or _room(min(values), max(values))

    def x(step: float) -> float:
        return round(_WIDTH * step / max(steps, 1), 2)

    def y(value: float) -> float:
        return round(_HEIGHT * (high - value) / (high - low), 2)

    drawn: list[Markup] = [_line(f"M0 {y(v)}H{_WIDTH}", "rule") for v in ticks(low, high)]
    drawn += [_line(f"M{x(phase.step)} 0V{_HEIGHT}", "begin") for phase in phases if phase.step > 0]
    for number, (name, points) in enumerate(lines.items()):
        drawn.append(tag("g", tag("title", name), _curve(points, x, y, exact), class_=f"series s{number % 6}"))
    plot = tag(
        "svg",
        drawn,
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{title} over optimizer steps: {', '.join(f'{n} ends at {form(p[-1][1])}' for n, p in lines.items())}",
    )
    marks = [tag("span", form(v), style=f"top:{y(v)}%") for v in ticks(low, high)]
    return tag(
        "figure",
        tag("figcaption", tag("b", title), _legend(lines, form), tag("small", note) if note else None),
        tag("div", tag("div", marks, class_="y", aria_hidden="true"), plot, class_="plot"),
        axis(steps),
        class_="chart",
    )


def axis(steps: int) -> Markup:
    """Return the labels of the x axis."""
    at = [t for t in ticks(0, max(steps, 1)) if t == int(t)]
    places = [100 * t / max(steps, 1) for t in at]
    labels = [
        tag("span", f"{t:,.0f}", style=f"left:{place:.3f}%", class_="end" if place > 97 else None)
        for t, place in zip(at, places, strict=True)
    ]
    return tag("div", labels, class_="x", aria_hidden="true")


def timeline(phases: Sequence[Phase], steps: int) -> Markup:
    """Return the phases as a bar over the same x axis as that of the charts."""
    ends = [phase.step for phase in phases[1:]] + [steps]
    parts = [
        tag(
            "span",
            phase.name,
            title=f"{phase.name}: steps {phase.step:,} to {max(end - 1, phase.step):,}",
            class_=f"phase p{number % 2}",
            style=f"left:{100 * phase.step / max(steps, 1):.3f}%;width:{100 * max(end - phase.step, 0) / max(steps, 1):.3f}%",
        )
        for number, (phase, end) in enumerate(zip(phases, ends, strict=True))
    ]
    return tag("div", parts, class_="phases")


def strips(lines: Mapping[str, Points], steps: int, shown: Callable[[float], str]) -> Markup:
    """Return a row for each name, as dark as its value in [0, 1] is at each step, with the last one beside it."""
    rows = []
    for name, points in lines.items():
        changes = [
            p for before, p in zip([(0, 0.0), *points], points, strict=False) if round(before[1], 2) != round(p[1], 2)
        ]
        ends = [*(step for step, _ in changes), steps][1:]
        bars = [
            tag("rect", x=_at(step, steps), width=_at(max(end - step, 0), steps), height=1, fill_opacity=f"{value:.2f}")
            for (step, value), end in zip(changes, ends, strict=True)
        ]
        image = tag("svg", bars, viewBox=f"0 0 {_WIDTH} 1", preserveAspectRatio="none", aria_hidden="true")
        rows.append(tag("div", tag("code", name, title=name), image, tag("span", shown(points[-1][1])), class_="strip"))
    return tag("div", rows, class_="strips")


def _at(step: int, steps: int) -> str:
    return f"{_WIDTH * step / max(steps, 1):g}"


def _room(low: float, high: float) -> tuple[float, float]:
    """Ends of an axis with room above and below; a line that is flat lies in the middle."""
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin * 3 else low - margin), high + margin


def _line(path: str, name: str) -> Markup:
    return tag("path", d=path, class_=name)


def _curve(points: Points, x: Callable[[float], float], y: Callable[[float], float], exact: bool) -> list[Markup]:
    if exact:
        kept = [p for i, p in enumerate(points) if i in (0, len(points) - 1) or p[1] != points[i - 1][1]]
        if len(kept) <= 4 * _POINTS:
            stairs = "".join(f"H{x(s)}V{y(v)}" for s, v in kept[1:])
            return [_line(f"M{x(kept[0][0])} {y(kept[0][1])}{stairs}", "curve")]
    means = _means(points)
    path = "L".join(f"{x(s)} {y(m)}" for s, m, _, _ in means)
    drawn = [_line(f"M{path}", "curve")]
    if len(means) < len(points):
        above = "L".join(f"{x(s)} {y(h)}" for s, _, _, h in means)
        below = "L".join(f"{x(s)} {y(low)}" for s, _, low, _ in reversed(means))
        drawn.insert(0, _line(f"M{above}L{below}Z", "range"))
    if len(means) <= 25:
        drawn.append(_line("".join(f"M{x(s)} {y(m)}h0" for s, m, _, _ in means), "dots"))
    return drawn


def _means(points: Points) -> list[tuple[float, float, float, float]]:
    """Step, mean, lowest and highest of so many neighbours at a time that few points are left."""
    size = -(-len(points) // _POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    found = []
    for group in groups:
        values = [value for _, value in group]
        found.append((sum(s for s, _ in group) / len(group), sum(values) / len(values), min(values), max(values)))
    return found


def _legend(lines: Mapping[str, Points], form: Callable[[float], str]) -> Markup:
    entries = [
        tag(
            "span",
            tag("i", class_=f"s{number % 6}"),
            tag("code", name),
            " ",
            tag("span", form(points[-1][1]), class_="last"),
        )
        for number, (name, points) in enumerate(lines.items())
    ]
    return tag("span", entries, class_="legend")
