"""Every notebook runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(path):
    cells = json.loads(path.read_text())["cells"]
    scope: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "notebooks are kept without their output"
            exec(compile("".join(cell["source"]), f"{path.name}[{number}]", "exec"), scope)
    assert scope["result"].taken.true.stderr > 0


def test_there_are_notebooks():
    assert NOTEBOOKS
