"""HTML and SVG from Python values, in which all text is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = ("meta", "link", "br")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = Any
"""Text, which is escaped, markup, which is not, numbers, None, or iterables of these."""


def tag(name: str, *content: Content, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        content: Text, which is escaped, markup, which is not, or iterables of these; None is left out.
        attributes: By name; ``class_`` gives ``class`` and ``aria_label`` gives ``aria-label``. None is left out.

    Example:
        >>> tag("td", "a < b", class_="number")
        '<td class="number">a &lt; b</td>'
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def join(content: Content) -> Markup:
    """Return content as markup, text in it escaped."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str | int | float):
        return Markup(escape(str(content)))
    return Markup("".join(join(each) for each in content))


def table(
    head: Iterable[Content], rows: Iterable[Iterable[Content]], numbers: Iterable[int] = (), **attributes: object
) -> Markup:
    """Return a table that scrolls sideways on its own where it is wider than the page.

    Args:
        head: Titles of the columns; empty: no head.
        rows: Cells; an element ``td`` or ``th`` is taken as it is.
        numbers: Columns that are set flush right.
        attributes: Of the table.
    """
    right = set(numbers)

    def cells(row: Iterable[Content], kind: str) -> Iterable[Markup]:
        for index, cell in enumerate(row):
            if isinstance(cell, Markup) and cell.startswith(("<td", "<th")):
                yield cell
            else:
                yield tag(kind, cell, class_="number" if index in right else None)

    head = list(head)
    above = tag("thead", tag("tr", cells(head, "th"))) if head else None
    body = tag("tbody", (tag("tr", cells(row, "td")) for row in rows))
    return tag("div", tag("table", above, body, **attributes), class_="wide", tabindex="0")


def section(title: str, *content: Content) -> Markup:
    """Return a part of the page."""
    return tag("section", tag("h2", title), content)


def shaded(words: Content, depth: float, title: str) -> Markup:
    """Return a cell of a heat map.

    Args:
        words: In the cell.
        depth: How strongly it is coloured, in [0, 1].
        title: What is said of it where the pointer rests.
    """
    kind = (
        "deep" if depth > 0.82 else "mid" if depth > 0.55 else None
    )  # the words' colour, which the theme has a say in
    return tag("td", words, title=title, class_=kind, style=f"--d:{depth:.3f}")
