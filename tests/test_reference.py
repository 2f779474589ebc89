"""The site: pages and API reference build without a warning, and the reference has every public name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from printed import ROOT
from public import PACKAGES, public_names

NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody listens there


def test_every_package_has_its_page():
    assert {path.stem for path in (ROOT / "docs/api").glob("*.md")} == set(PACKAGES)


@pytest.mark.slow
def test_the_site_builds_and_shows_every_public_name(tmp_path):
    pytest.importorskip("furo", reason="Sphinx and its theme are not installed (extra 'docs')")
    from sphinx.util.inventory import InventoryFile

    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    built = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), str(ROOT / "docs"), str(tmp_path / "html")],
        env=os.environ | NO_NETWORK,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert built.returncode == 0, built.stderr
    inventory = InventoryFile.loads((tmp_path / "html/objects.inv").read_bytes(), uri="")
    shown = {name for kind in inventory.data if kind.startswith("py:") for name in inventory.data[kind]}
    assert set(public_names()) - shown == set()
    pages = {path.stem for path in (tmp_path / "html").glob("*.html")}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= pages
    reference = (tmp_path / "html/api/entropy_pl.estimators.html").read_text()
    assert "True entropy change ΔH(η)" in reference  # docstrings, not names alone


def test_the_front_page_is_the_readme():
    assert "{include} ../README.md" in Path(ROOT / "docs/index.md").read_text()
