"""Every row of docs/reliability.md names a test, and the test is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reliability.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


@cache
def functions_of(file: Path) -> set[str]:
    """Names of the test functions of a file."""
    return {
        node.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def rows_with_tests() -> list[str]:
    """The rows of every table whose last column is ``test``."""
    rows, inside = [], False
    for line in PAGE.read_text().splitlines():
        if not line.startswith("|"):
            inside = False
        elif line.rstrip("| ").endswith("| test"):
            inside = True
        elif inside and not set(line) <= set("|-: "):
            rows.append(line)
    return rows


@pytest.mark.parametrize("row", rows_with_tests(), ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_row_names_a_test_that_is_there(row):
    named = NAMED.findall(row)
    assert named, f"expected a test in this row, got none: {row}"


def test_every_test_that_the_page_names_is_there():
    for file, name in NAMED.findall(PAGE.read_text()):
        assert (ROOT / file).is_file(), f"no file {file}"
        assert not name or name in functions_of(ROOT / file), f"no {name} in {file}"
