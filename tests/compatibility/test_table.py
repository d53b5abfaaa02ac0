"""``docs/compatibility.md`` says what the tests assert, and names no test that is gone."""

import ast
from pathlib import Path

import table


def test_the_page_is_current() -> None:
    assert table.DOCUMENT.read_text() == table.document(), "write it anew: python tests/compatibility/table.py"


def test_every_row_has_its_tests() -> None:
    rows = table.rows()
    assert len(rows) == len({row.feature for row in rows}) > 14
    for row in rows:
        for test in row.test.split(", "):
            file, name = test.split("::")
            tree = ast.parse(Path(table.REPO, file).read_text())
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
