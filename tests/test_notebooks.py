"""Every notebook runs from top to bottom, and what it says of its numbers is so."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def quickstart(scope: dict[str, Any]) -> None:
    taken, update = scope["result"].taken, scope["update"]
    assert taken.eta == update.lr
    assert taken.true.stderr > 0
    assert update.gap() < 1e-5  # Δθ is a difference of two float32
    # They differ by curvature, η/η* of the first order; twice that for what η* is not known to, and for higher orders.
    off = abs(taken.true.value / taken.first_order.value - 1)
    assert off < 2 * taken.eta / scope["result"].eta_star


def linear_regime(scope: dict[str, Any]) -> None:
    eta, eta_star = scope["eta"], scope["eta_star"]
    float64, float32, odd = scope["deviation"], scope["deviation32"], scope["odd"]
    assert eta.min() == 1e-9
    assert abs(scope["law"].slope - 1) < 0.01
    assert scope["law"].r_squared > 0.9999
    # In float64 ΔH/η keeps to δH₁ as far down as η goes; in float32 it does not.
    assert (float64[eta <= 1e-3 * eta_star] < 2e-3).all()
    assert float64[eta <= 1e-7].max() < 1e-4 < float32[eta <= 1e-7].max()
    # η/η* is what curvature takes: to a factor of 2, where neither higher orders nor float64's rounding count.
    between = (eta > 1e-7) & (eta < 0.01 * eta_star)
    assert between.sum() >= 3
    assert np.abs(np.log2(float64 * eta_star / eta))[between].max() < 1
    assert (odd < float64)[between].all()


def variance(scope: dict[str, Any]) -> None:
    whole, v = scope["whole"], scope["v"]
    errors = {name: result.first_order.stderr for name, result in whole.items()}
    assert errors["prefix (default)"] < 1.05 * errors["sequence"]
    assert errors["prefix (default)"] < errors["prefix, surprisal"]
    assert errors["prefix, gae(0.8)"] < errors["prefix (default)"]
    for name in ("sequence", "prefix (default)"):
        # With 16 batches and 8 groups the jackknife is good to √(1/(2·16·7)) = 7 %; three times that, and the bias of
        # leaving out an eighth. The spread is good to about 10 % (the notebook).
        assert scope["jackknifed"][name] == pytest.approx(scope["influence"][name], rel=0.25)
        assert scope["spread"][name] == pytest.approx(scope["influence"][name], rel=0.35)
    for name, result in whole.items():
        smallest = result.sweep[0]
        assert smallest.eta == pytest.approx(0.01 * v.lr)
        assert smallest.true.stderr / smallest.eta == pytest.approx(result.first_order.stderr, rel=0.05), name
    # An unbiased option's difference from another is noise: four of its standard errors, since they share most of it.
    difference = whole["prefix (default)"].first_order.value - whole["prefix, critic"].first_order.value
    assert abs(difference) < 4 * errors["prefix (default)"]
    assert all(error > 0 for _, error in scope["biases"].values())


CLAIMS = {"quickstart": quickstart, "linear_regime": linear_regime, "variance": variance}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_run_in_order(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    matplotlib.use("agg")
    cells = json.loads(path.read_text())["cells"]
    scope: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "notebooks are kept without their output"
            lines = [line for line in cell["source"] if not line.startswith("%")]  # %matplotlib inline
            exec(compile("".join(lines), f"{path.name}[{number}]", "exec"), scope)
    pyplot.close("all")
    CLAIMS[path.stem](scope)


def test_every_notebook_is_checked():
    assert {path.stem for path in NOTEBOOKS} == CLAIMS.keys()
