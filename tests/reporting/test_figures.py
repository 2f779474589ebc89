import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from entropy_pl.reporting import delta_entropy_figure, eta_sweep_figure


def curve(axes, label):
    """x and y of the one line whose label starts like that, NaN where interrupted."""
    (line,) = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def band(axes):
    """The corner points of the one filled band, as a set."""
    (polygons,) = [item for item in axes.collections if isinstance(item, PolyCollection)]
    return {tuple(vertex) for path in polygons.get_paths() for vertex in path.vertices}


def texts(figure):
    return " ".join(text.get_text() for text in figure.texts)


def of_step(records, which, key):
    return [next(p for p in record["sweep"] if p["taken"])[which][key] for record in records]


def test_both_curves_and_their_bands_are_the_records_numbers(make):
    records = [make(step, confidence=0.95) for step in (0, 5, 10)]
    figure = delta_entropy_figure(records)
    axes, lower = figure.axes
    for label, which in (("true", "true"), ("first order", "first_order")):
        steps, values = curve(axes, label)
        assert steps.tolist() == [0, 5, 10]
        assert values.tolist() == of_step(records, which, "value")
    for key in ("ci_low", "ci_high"):
        assert set(zip((0, 5, 10), of_step(records, "true", key), strict=True)) <= band(axes)
        assert of_step(records, "first_order", key) in [list(line.get_ydata()) for line in axes.lines]
    assert lower.lines[0].get_ydata().tolist() == [record["reward"] for record in records]
    assert axes.get_ylabel() == "entropy change of the step\n[nats per token]"
    assert lower.get_xlabel() == "optimizer step"
    assert axes.get_legend().get_title().get_text() == "95 % confidence intervals"
    assert figure.canvas.get_width_height()[0] == 900


def test_curves_that_coincide_differ_in_more_than_colour(make):
    axes = delta_entropy_figure([make(0), make(5)]).axes[0]
    true, first = (
        next(line for line in axes.lines if str(line.get_label()).startswith(label)) for label in ("true", "first")
    )
    assert true.get_marker() != first.get_marker()
    assert true.is_dashed() != first.is_dashed()


def test_probes_without_result_interrupt_the_curves_and_are_marked(make, make_failed):
    records = [make(0), make(5), make_failed(10), make(15), make_failed(20, "no_movement"), make(25)]
    axes = delta_entropy_figure(records).axes[0]
    steps, values = curve(axes, "true")
    assert steps[np.isnan(values)].tolist() == [10, 20]
    assert curve(axes, "probed, no result")[0].tolist() == [10, 20]
    bars = [bar for container in axes.containers for bar in container.lines[2][0].get_segments()]
    assert sorted({bar[0][0] for bar in bars}) == [15, 25]  # points alone have error bars for a band


def test_one_probe_without_reward(make):
    figure = delta_entropy_figure([make(7, reward=None, normalize="per_sequence")])
    (axes,) = figure.axes
    assert "nats per sequence" in axes.get_ylabel()
    assert len(axes.containers) == 2


def test_a_step_probed_again_shows_its_latest_record(make):
    axes = delta_entropy_figure([make(0), make(5), make(10), make(5, reward=0.5)]).axes[1]
    assert axes.lines[0].get_xdata().tolist() == [0, 5]
    assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5]


@pytest.mark.parametrize("count", [0, 2])
def test_nothing_measured(make_failed, count):
    figure = delta_entropy_figure([make_failed(step) for step in range(count)])
    assert f"no probe has measured an entropy change yet ({count} recorded)" in texts(figure)
    assert not figure.axes


def test_sweep(make):
    record = make(multipliers=(1, 0.5, 2, 10))
    figure = eta_sweep_figure(record)
    (axes,) = figure.axes
    (bars,) = axes.containers
    assert bars.lines[0].get_xdata().tolist() == [point["eta"] for point in record["sweep"]]
    assert bars.lines[0].get_ydata().tolist() == [point["true"]["value"] for point in record["sweep"]]
    for segment, point in zip(bars.lines[2][0].get_segments(), record["sweep"], strict=True):
        np.testing.assert_allclose(segment[:, 1], [point["true"]["ci_low"], point["true"]["ci_high"]], rtol=1e-12)

    etas, line = curve(axes, "first order")
    assert (etas[0], etas[-1]) == (0, 1e-3)
    np.testing.assert_allclose(line, -12 * etas)
    assert {(1e-3, 1e-3 * record["first_order"][key]) for key in ("ci_low", "ci_high")} <= band(axes)
    np.testing.assert_allclose(curve(axes, "second order")[1], -12 * etas + 15000 * etas**2)
    assert curve(axes, r"$\eta^*$")[0].tolist() == [8e-4, 8e-4]
    assert [float(x[0]) for x in curve(axes, "step taken")] == [1e-4, record["sweep"][0]["true"]["value"]]


def test_sweep_over_decades_divides_by_eta(make):
    record = make(multipliers=(0.01, 0.1, 1, 10))
    axes = eta_sweep_figure(record).axes[0]
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(curve(axes, "first order")[1], -12)
    etas, parabola = curve(axes, "second order")
    np.testing.assert_allclose(parabola, -12 + 15000 * etas)
    values = axes.containers[0].lines[0].get_ydata()
    np.testing.assert_allclose(values, [point["true"]["value"] / point["eta"] for point in record["sweep"]])
    assert "per unit" in axes.get_ylabel()


def test_sweep_without_second_order_or_the_step_taken(make):
    axes = eta_sweep_figure(make(multipliers=(0.5, 2), second_order=None, eta_star=None)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(",")[0] for label in labels] == ["true", "first order"]


def test_no_sweep_to_draw(make, make_failed):
    assert "step 3: no η-sweep to draw (failed: got NaN in [256, 48])" in texts(eta_sweep_figure(make_failed(3)))
    assert "no η-sweep to draw (ok)" in texts(eta_sweep_figure(make(sweep=[])))


def test_message_with_dollar_signs_is_drawn_as_it_is(make_failed, tmp_path):
    eta_sweep_figure(make_failed(0, message=r"cost $\nofunction$")).savefig(tmp_path / "a.png")


def test_no_pyplot_and_no_other_backend(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    backend = matplotlib.rcParams._get("backend")
    eta_sweep_figure(make()).savefig(tmp_path / "a.png")
    delta_entropy_figure([make()]).savefig(tmp_path / "b.pdf")
    assert matplotlib.rcParams._get("backend") == backend
