"""The wheel that users install: built from the sources, and run where there is no clone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import short_fit

from entropy_pl.records import read_records

ROOT = Path(__file__).parents[1]
SOURCES = ("entropy_pl", "callbacks", "configs", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")


def run(*words: str, **options: Any) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_trains_and_probes_outside_the_clone(tmp_path, tiny_policy_dir):
    sources, site = tmp_path / "sources", tmp_path / "site"
    for name in SOURCES:  # a copy, since building leaves folders behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        sources.mkdir(exist_ok=True)
        copy(ROOT / name, sources / name)
    run(
        "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(sources)
    )
    [wheel] = tmp_path.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    installed = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}}
    said = run("-c", "import entropy_pl.callbacks.trl, entropy_pl.configs as c; print(*c.__path__)", **installed)
    assert Path(said.strip()) == site / "entropy_pl/configs"
    words = short_fit(tiny_policy_dir, tmp_path / "runs")
    words[1] = f"--config={site / 'entropy_pl/configs/quickstart.yaml'}"
    run("-m", "entropy_pl.cli", *words, **installed)
    [records] = (tmp_path / "runs").rglob("records.jsonl")
    assert [(record["step"], record["status"]) for record in read_records(records)] == [(0, "ok"), (1, "ok")]
