"""What the documents name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from entropy_pl.config import keys_of
from entropy_pl.measurements import MeasurementSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])


def names_in(module: Path) -> set[str]:
    """Functions, classes, methods as ``Class.method``, and constants of a module."""
    names: set[str] = set()
    for node in ast.parse(module.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [inner.name for inner in node.body if isinstance(inner, ast.FunctionDef)]
            names |= {*methods, *(f"{node.name}.{method}" for method in methods)}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Every relative link is a file, and a link whose text is a name leads to the module that defines it."""
    for text, target in re.findall(r"\[([^\]]+)\]\(([^)#\s]+)\)", document.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file = document.parent / target
        assert file.exists(), f"{document.name} links to {target}"
        if file.suffix == ".py" and text.startswith("`"):
            assert text.strip("`") in names_in(file), f"{document.name} says that {text} is in {target}"


def test_every_key_of_a_measurement_is_explained():
    text = (ROOT / "docs/offline.md").read_text()
    named = set(re.findall(r"`(\w+)", text))
    missing = {key for key in keys_of(MeasurementSettings) if key.rpartition(".")[2] not in named}
    assert not missing
