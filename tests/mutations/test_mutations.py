"""The list of mutations belongs to the code as it is. That tests see them is what `make mutations` finds out."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.mutations import MUTATIONS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.file}: {m.what}")
def test_a_mutation_changes_one_place_and_is_still_python(mutation):
    text = (ROOT / mutation.file).read_text()
    assert text.count(mutation.old) == 1
    mutated = text.replace(mutation.old, mutation.new)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    assert all((ROOT / tests).exists() for tests in mutation.tests)


def test_every_file_of_the_estimators_is_mutated():
    files = {f"entropy_pl/estimators/{path.name}" for path in (ROOT / "entropy_pl/estimators").glob("*.py")}
    assert files - {"entropy_pl/estimators/__init__.py"} <= {mutation.file for mutation in MUTATIONS}
