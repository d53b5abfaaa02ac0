"""The Python blocks of a page, run in order in one namespace, and what the page says that they print."""

import contextlib
import io
import re
import sys
from itertools import zip_longest
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
_BLOCK = re.compile(
    r"^(?P<indent> *)``` ?(?P<language>python|text|\{ \.python \})\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


class Block(NamedTuple):
    """A Python block, and the text block that follows it with nothing but blank lines between: what it prints."""

    code: str
    prints: str | None
    line: int


def blocks(page: Path) -> list[Block]:
    """Return the Python blocks of a page in order, those in folded parts too."""
    text = page.read_text()
    found, matches = [], list(_BLOCK.finditer(text))
    for match, after in zip_longest(matches, matches[1:]):
        if "python" in match["language"]:
            code = _SNIPPET.sub(lambda m: (DOCS / m[1]).read_text(), dedent(match["body"]))
            follows = after and after["language"] == "text" and not text[match.end() : after.start()].strip()
            prints = dedent(after["body"]) if after and follows else None
            found.append(Block(code, prints, text[: match.start()].count("\n") + 2))
    return found


def run(page: Path) -> list[tuple[Block, str]]:
    """Run all Python blocks of a page, in the current folder; return each with what it printed on standard output."""
    module, seen = ModuleType("page"), []
    sys.modules["page"] = module  # classes that a page defines can be found, as in a script
    for block in blocks(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), module.__dict__)
        seen.append((block, printed.getvalue()))
    return seen
