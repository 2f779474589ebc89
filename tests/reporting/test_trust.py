"""Estimates that are not to be trusted, as tables, figures and studies show them; and records that do not say."""

from __future__ import annotations

import io

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from entropy_pl.reporting import delta_entropy_figure, eta_sweep_figure, probe_table, sweep_table
from entropy_pl.reporting.trust import UNTRUSTED
from entropy_pl.studies.linear_regime import _collapsed


def printed(table) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


def doubted(record, *multipliers):
    """The record, ΔH not to be trusted at these multiples of its learning rate, and to be trusted elsewhere."""
    for point in record["sweep"]:
        point["true"]["trustworthy"] = round(point["eta"] / record["lr"], 6) not in multipliers
    return record


def marked(axes):
    """Where the hollow grey markers are."""
    found = [line for line in axes.lines if line.get_label() == UNTRUSTED]
    return [(x, y) for line in found for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def test_in_the_table_of_a_run(make):
    text = printed(probe_table([doubted(make(0), 2), doubted(make(5), 1, 2)]))
    assert " 200 0.0005 to 0.002 0.250" in text  # of step 0 the step taken is well
    assert " 200! 0.0005 to 0.002 0.300" in text
    assert f"! ΔH {UNTRUSTED}" in text
    assert UNTRUSTED not in printed(probe_table([doubted(make(0), 2)]))


def test_in_the_table_of_a_sweep(make):
    text = printed(sweep_table(doubted(make(0), 2)))
    assert " 100! " in text
    assert " 200! " not in text
    assert f"! ΔH {UNTRUSTED}" in text


def test_in_the_figure_of_a_run(make):
    records = [doubted(make(0), 2), doubted(make(5), 1, 2), make(10)]
    axes = delta_entropy_figure(records).axes[0]
    assert marked(axes) == [(5, records[1]["sweep"][1]["true"]["value"])]
    assert UNTRUSTED in [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("multipliers", [(0.5, 1, 2), (0.01, 0.1, 1, 2)], ids=["linear", "per_eta"])
def test_in_the_figure_of_a_sweep(make, multipliers):
    record = doubted(make(0, multipliers=multipliers), 2)
    axes = eta_sweep_figure(record).axes[0]
    last = record["sweep"][-1]
    scale = last["eta"] if len(multipliers) == 4 else 1
    np.testing.assert_allclose(marked(axes), [(last["eta"], last["true"]["value"] / scale)], rtol=1e-12)
    assert UNTRUSTED in [text.get_text() for text in axes.get_legend().get_texts()]


def test_records_that_do_not_say_are_shown_as_ever(make):
    """As of versions before this key."""
    assert "!" not in printed(probe_table([make(0)])) + printed(sweep_table(make(0)))
    for figure in (delta_entropy_figure([make(0), make(5)]), eta_sweep_figure(make(0))):
        assert not marked(figure.axes[0])


def test_in_the_report_of_a_study():
    table = pd.DataFrame({"eta": [-2e-3, 1e-4, 1e-3, 4e-3], "ess": [100.0, 250.0, 128.0, 20.0]})
    [caveat] = _collapsed(table, 256)
    assert caveat.startswith("From |η| = 0.002 on the effective sample size is less than half of N = 256")
    assert _collapsed(table[table["ess"] >= 128], 256) == []
