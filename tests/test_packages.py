"""Every package is installed, and imports only packages of its own layer and of those below."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

import entropy_pl

ROOT = Path(__file__).parents[1]
LAYERS = (  # the lowest first: a package imports from its own layer and from those below it
    ("version", "registry", "config", "config_messages", "peers", "strategies", "progress", "files"),
    ("rollout", "updates", "data"),
    ("estimators", "objectives", "policy"),
    ("groups", "policy_gradient", "attribution", "grpo", "records"),
    ("probe", "runs"),
    ("reporting",),
    ("monitor", "measurements"),
    ("callbacks", "configs"),
    ("studies",),
    ("failures", "training", "offline", "report", "cli"),
)
LAYER = {package: number for number, packages in enumerate(LAYERS) for package in packages}


def test_imports_look_down():
    wrong = []
    for path in [*(ROOT / "entropy_pl").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[0] if parts[0] == "callbacks" else parts[1]
        if package == "__init__":
            continue  # the public names, from every layer
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("entropy_pl"):
                other = node.module.split(".")[1]
                if LAYER[other] > LAYER[package] or (package == "probe" and other == "grpo"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports {node.module}, of a higher layer")
    assert not wrong


def test_estimators_know_arrays_only():
    """No model, no Lightning, no file."""
    for path in (ROOT / "entropy_pl/estimators").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not {name.split(".")[0] for name in names} & {"lightning", "transformers", "peft", "pathlib", "os"}


def test_only_what_trains_with_lightning_loads_it():
    """Who trains otherwise, or measures offline, need not wait for it."""
    packages = ("probe", "attribution", "policy_gradient", "reporting", "callbacks.trl")
    imports = "; ".join(f"import entropy_pl.{package}" for package in packages)
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
