"""The shape of the house: every room is packaged, and imports only rooms on lower floors."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import entropy_pl

ROOT = Path(__file__).parents[1]
FLOORS = (  # the ground floor first
    ("version", "registry", "config", "config_messages", "peers", "strategies", "progress"),
    ("rollout", "updates", "data"),
    ("estimators", "objectives", "policy"),
    ("groups", "policy_gradient", "attribution", "grpo", "records"),
    ("probe", "runs"),
    ("reporting",),
    ("callbacks", "configs", "measurements"),
    ("studies",),
    ("failures", "training", "offline", "report", "cli"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted([*(ROOT / "entropy_pl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] == "callbacks" else parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_look_down(path):
    room = room_of(path)
    if room == "__init__":
        return  # the public names, from every floor
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entropy_pl"):
            other = node.module.split(".")[1]
            allowed = FLOOR[other] <= FLOOR[room] and not (room == "probe" and other == "grpo")
            assert allowed, f"{room} imports {node.module}, which is upstairs"


def test_estimators_know_arrays_only():
    """No model, no Lightning, no file."""
    for path in (ROOT / "entropy_pl/estimators").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"lightning", "transformers", "peft", "pathlib", "os"}


def test_only_what_trains_with_lightning_loads_it():
    """Who trains otherwise, or measures offline, need not wait for it."""
    rooms = ("probe", "attribution", "policy_gradient", "reporting", "callbacks.trl")
    imports = "; ".join(f"import entropy_pl.{room}" for room in rooms)
    told = f"import sys; {imports}; print('lightning' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split()[-1] == "False"


def test_every_package_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "entropy_pl").rglob("__init__.py")}
    assert listed == found | {"entropy_pl.callbacks", "entropy_pl.configs"}


def test_public_names_are_there():
    for name in entropy_pl.__all__:
        assert getattr(entropy_pl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'EntropyProb'"):
        _ = entropy_pl.EntropyProb
