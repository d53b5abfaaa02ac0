"""The parts of the page; each is None where the run left nothing for it."""

import re
from collections.abc import Sequence

from lightning_mask.app.report import differences
from lightning_mask.app.report.charts import chart, timeline
from lightning_mask.app.report.differences import Change
from lightning_mask.app.report.markup import Content, Markup, section, shaded, table, tag
from lightning_mask.app.report.reading import Phase, Points, Run
from lightning_mask.app.report.wording import percent, seconds, short

_CLASSES = 25  # of a confusion matrix that is shown whole
_SHOWN = 12  # of what two runs do differently, before the rest is folded away


def tiles(run: Run, before: Run | None) -> Markup:
    """Return the figures that one looks for first."""
    made: list[Markup] = []
    for name in _first_metrics(run):
        value = run.metrics[name]
        change = Change(name, before.metrics.get(name) if before else None, value)
        made.append(_tile(name, short(value), _difference(change)))
    mask = run.mask
    if mask.get("total"):
        made.append(_tile("entries that train", percent(mask["density"]), f"{mask['active']:,} of {mask['total']:,}"))
    if mask.get("sparsity") is not None:
        made.append(_tile("sparsity", percent(mask["sparsity"]), "of what may be pruned"))
    if mask.get("held_checked"):
        changed, checked = mask["held_changed"], mask["held_checked"]
        word = tag("span", f"of {checked:,} held entries, bit for bit", class_="bad" if changed else None)
        made.append(
            _tile(
                "held, yet changed",
                tag("span", f"{changed:,}", style="font:inherit", class_="bad" if changed else "good"),
                word,
            )
        )
    if run.steps:
        per_step = mask.get("seconds_per_step")
        made.append(_tile("steps", f"{run.steps:,}", f"{seconds(per_step)} each" if per_step else None))
    if (run.summary.get("seconds") or {}).get("all"):
        spent = run.summary["seconds"]
        made.append(
            _tile("time", seconds(spent["all"]), ", ".join(f"{k} {seconds(v)}" for k, v in spent.items() if k != "all"))
        )
    return tag("div", made, class_="tiles")


def _first_metrics(run: Run) -> list[str]:
    names = [n for n in run.metrics if n.startswith("test/")] or [n for n in run.metrics if n.startswith("val/")]
    return sorted(names, key=lambda name: ("accuracy" not in name, "loss" in name))[:2]


def _tile(label: str, figure: Content, below: Content) -> Markup:
    return tag(
        "div",
        tag("span", label, class_="label"),
        tag("b", figure),
        tag("span", below) if below else None,
        class_="tile",
    )


def _difference(change: Change) -> Markup | None:
    if not isinstance(change.before, int | float) or not isinstance(change.after, int | float):
        return None
    step, good = change.after - change.before, differences.better(change)
    if step == 0:
        return tag("span", "as before")
    word = f"{'+' if step > 0 else '−'}{short(abs(step))} on the run before"
    return tag("span", word, class_=None if good is None else "good" if good else "bad")


def course(run: Run) -> Markup | None:
    """Return what went on over the steps: phases, losses, rates, sparsity, and whatever else was logged."""
    figures = {name: points for name, points in run.figures.items() if points}
    if not figures and not run.phases:
        return None
    groups: dict[str, dict[str, Points]] = {}
    for name, points in figures.items():
        groups.setdefault(_place(name, points), {})[name] = points
    elsewhere = groups.pop("", {})
    if "train/loss" not in figures and "train/loss_epoch" in elsewhere:
        groups.setdefault("loss", {})["train/loss_epoch"] = elsewhere["train/loss_epoch"]
    if run.sparsity.get(""):
        groups["sparsity"] = {"zeros in scope": [(0, 0.0), *run.sparsity[""], (run.steps, run.sparsity[""][-1][1])]}
    share = groups.pop("share of entries that train", {})
    if any(len({value for _, value in points}) > 1 for points in share.values()):
        groups["share of entries that train"] = share
    drawn = {title: _chart(run, title, groups.pop(title)) for title in _ORDER if title in groups}
    rest = [_chart(run, title, lines) for title, lines in list(groups.items())[:40]]
    more = tag("details", tag("summary", f"More figures: {len(groups)}"), rest) if groups else None
    return section(
        "The run, step by step",
        tag("p", "All curves share one axis: optimizer steps.", class_="soft"),
        _phase_table(run.phases) if run.phases else None,
        timeline(run.phases, run.steps) if run.phases else None,
        drawn.values(),
        more,
    )


_ORDER = ("loss", "learning rate", "validation", "sparsity", "share of entries that train")
_PLACES = (  # the first that a name fits; what fits "" is shown elsewhere
    ("", r"test/|mask/(active|phase|sparsity/)|train/loss_epoch$"),
    ("loss", r"(train|val)/.*loss[^/]*$"),
    ("learning rate", r"lr-"),
    ("sparsity", r"mask/sparsity$"),
    ("share of entries that train", r"mask/density$"),
)


def _place(name: str, points: Points) -> str:
    """Title of the chart that a figure is drawn in; its own name where no other shares its scale."""
    title = next((title for title, pattern in _PLACES if re.match(pattern, name)), None)
    if title is not None:
        return title
    return "validation" if name.startswith("val/") and all(0 <= value <= 1 for _, value in points) else name


def _chart(run: Run, title: str, lines: dict[str, Points]) -> Markup:
    if title in ("sparsity", "share of entries that train"):
        return chart(title, lines, steps=run.steps, phases=run.phases, form=percent, exact=True, bounds=(-0.03, 1.03))
    if title == "learning rate":
        scaled = any(p.settings.get("lr_scale", 1.0) != 1.0 or p.settings.get("warmup") for p in run.phases)
        note = "A phase multiplies these for its tensors, as the table above says." if scaled else None
        return chart(title, lines, steps=run.steps, phases=run.phases, form=lambda v: f"{v:.3g}", note=note)
    return chart(title, lines, steps=run.steps, phases=run.phases)


def _phase_table(phases: Sequence[Phase]) -> Markup:
    rows = [
        (
            phase.name,
            f"{phase.step:,}",
            phase.reason,
            tag("code", _recipe(phase)) if phase.settings else "–",
            _factor(phase.settings.get("lr_scale", 1.0)),
            phase.settings.get("warmup") or "–",
        )
        for phase in phases
    ]
    return table(("phase", "from step", "because", "trains", "rate ×", "warm-up"), rows, (1,))


def _recipe(phase: Phase) -> str:
    given = phase.settings
    train = given.get("train")
    words = [", ".join(map(str, train)) if isinstance(train, list) else str(train)] if train else []
    words += [f"{key}={given[key]}" for key in ("scope", "score", "density", "structure", "mask") if given.get(key)]
    return " · ".join(words) or "as before"


def _factor(scale: object) -> str:
    if isinstance(scale, dict):
        return ", ".join(f"{short(float(v))} {k}" for k, v in scale.items())
    return short(scale) if isinstance(scale, int | float) else "–"


def figures(run: Run) -> Markup | None:
    """Return the figures of the test and the confusion matrix."""
    tested = {name: value for name, value in run.metrics.items() if name.startswith("test/")}
    confusion = run.summary.get("confusion_matrix")
    if not tested and not confusion:
        return None
    weights = run.summary.get("tested")
    rows = [(tag("code", name), short(value)) for name, value in tested.items()]
    return section(
        "Test",
        tag("p", "Tested weights: ", tag("code", weights), class_="soft") if weights else None,
        tag(
            "div",
            table(("figure", "value"), rows, (1,)) if rows else None,
            _confusion(confusion["classes"], confusion["rows_true"]) if confusion else None,
            class_="two",
        ),
    )


def _confusion(classes: Sequence[object], counts: Sequence[Sequence[int]]) -> Markup:
    names = [str(name) for name in classes]
    if len(names) > _CLASSES:
        pairs = [(n, names[i], names[j]) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
        most = sorted(pairs, key=lambda pair: -pair[0])[:20]
        rows = [(true, predicted, f"{count:,}") for count, true, predicted in most]
        title = tag("h3", f"The most frequent confusions of {len(names)} classes")
        return tag("div", title, table(("true", "predicted as", "times"), rows, (2,)))
    body = []
    for i, row in enumerate(counts):
        total = sum(row)
        cells = [
            shaded(f"{n:,}", n / total if total else 0.0, f"{names[i]} as {names[j]}: {n:,} of {total:,}")
            for j, n in enumerate(row)
        ]
        right = tag("th", percent(row[i] / total) if total else "–", class_="number")
        body.append((tag("th", names[i], scope="row"), *cells, right))
    title = tag("h3", "Confusion matrix: true classes downwards, predicted ones to the right")
    return tag("div", title, table(("", *names, "found"), body, class_="heat confusion"))


def comparison(run: Run, before: Run | None) -> Markup | None:
    """Return what differs from the run before, in figures, in facts and in the config."""
    if before is None:
        return None
    measured = differences.metrics(run, before)
    rows = [(tag("code", c.name), short(c.before), short(c.after), _step(c)) for c in measured]
    changed = [*differences.facts(run, before), *differences.config(run, before)]
    other = [(tag("code", c.name), _value(c.before), _value(c.after)) for c in changed]
    head, unknown = ("", "before", "now"), not run.config or not before.config
    same = "Nothing: the config and the facts are the same."
    rest = tag("summary", f"{len(other) - _SHOWN} more")
    return section(
        "Compared with the run before",
        tag("p", "The run before is ", tag("code", before.name), ".", class_="soft"),
        tag("h3", "Figures"),
        table((*head, "change"), rows, (1, 2, 3), class_="values") if rows else "Neither has any.",
        tag("h3", "What was done differently"),
        table(head, other[:_SHOWN], class_="values") if other else same,
        tag("details", rest, table(head, other[_SHOWN:], class_="values")) if len(other) > _SHOWN else None,
        tag("p", "One of them has no config to compare.", class_="soft") if unknown else None,
    )


def _step(change: Change) -> Content:
    if not isinstance(change.before, int | float) or not isinstance(change.after, int | float):
        return "–"
    step, good = change.after - change.before, differences.better(change)
    word = "=" if step == 0 else f"{'+' if step > 0 else '−'}{short(abs(step))}"
    return tag("span", word, class_=None if good is None else "good" if good else "bad")


def _value(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:,}" if type(value) is int else short(value) if type(value) is float else str(value)


def folded(run: Run) -> list[Markup]:
    """Return the configuration and the versions, folded away."""
    versions = list((run.summary.get("versions") or {}).items())
    facts = [*versions, ("processes", run.summary.get("world_size")), ("seed", run.summary.get("seed"))]
    rows = [(name, str(value)) for name, value in facts if value is not None]
    parts = []
    if run.config_text:
        parts.append(tag("details", tag("summary", "Configuration"), tag("pre", run.config_text)))
    if versions:
        parts.append(tag("details", tag("summary", "Versions"), table((), rows)))
    return parts
