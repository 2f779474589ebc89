"""Figures of a whole run: their numbers are the records', at a screen's width and a phone's."""

import numpy as np
import pytest

from entropy_pl.reporting import (
    calibration_figure,
    components_figure,
    delta_entropy_figure,
    ess_figure,
    eta_sweep_figure,
    exchange_rate_figure,
    step_size_figure,
    training_figure,
)
from entropy_pl.reporting.figures import figures_of_width

OVER_STEPS = [calibration_figure, ess_figure, step_size_figure, training_figure]


def labelled(axes, label):
    (line,) = [line for line in axes.lines if str(line.get_label()) == label]
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def taken(record):
    return next(point for point in record["sweep"] if point["taken"])


def test_calibration_draws_every_step_against_the_diagonal(make, make_failed):
    records = [make(0), make(5), make_failed(7), make(10)]
    left, right = calibration_figure(records).axes[:2]
    points = left.collections[-1].get_offsets()
    expected = [(taken(r)["first_order"]["value"], taken(r)["true"]["value"]) for r in records if "sweep" in r]
    np.testing.assert_array_equal(points, expected)
    (diagonal,) = [line for line in left.lines if line.get_label() == r"$\Delta H=\delta H_1$"]
    assert (diagonal.get_xy1(), diagonal.get_slope()) == ((0, 0), 1)
    ends = [[tuple(point) for point in segment] for c in left.collections[:-1] for segment in c.get_segments()]
    for record in records[:2]:
        x, y = taken(record)["first_order"], taken(record)["true"]
        # matplotlib is given lengths, and adds them again: a rounding apart
        assert any(np.allclose(e, [(x["ci_low"], y["value"]), (x["ci_high"], y["value"])], rtol=1e-12) for e in ends)
        assert any(np.allclose(e, [(x["value"], y["ci_low"]), (x["value"], y["ci_high"])], rtol=1e-12) for e in ends)
    gap = right.lines[-1]
    # of the records' own parabola: ½·30000·(1e-4)² over 2e-4
    np.testing.assert_allclose(gap.get_ydata(), 1.5e-4 / 2e-4, rtol=1e-9)
    assert gap.get_xdata().tolist() == [0, 5, 10]


def test_training_shows_what_the_probe_and_the_trainer_measured(make_rewarded, make):
    records = [make_rewarded(step, expected_reward={"value": 0.25 + step / 100, "stderr": 0.1}) for step in (0, 10)]
    curves = {"reward": (np.arange(20.0), np.linspace(0, 1, 20))}
    reward, entropy = training_figure(records, curves).axes
    assert labelled(reward, "training batches, as logged")[1].tolist() == curves["reward"][1].tolist()
    assert labelled(reward, "E-batch of the probe")[1].tolist() == [0.25, 0.35]
    assert labelled(entropy, "E-batch of the probe")[1].tolist() == [0.9, 0.9]
    assert "nats per token" in entropy.get_ylabel()
    # without a log, the rewards beside the records
    assert labelled(training_figure([make(0), make(5)]).axes[0], "training batch of the probed step")[1].tolist() == [
        0.25,
        0.3,
    ]


def test_a_long_curve_is_drawn_as_means(make):
    steps = np.arange(4000.0)
    axes = training_figure([make(0)], {"entropy": (steps, steps**2)}).axes[1]
    x, y = labelled(axes, "training batches, as logged")
    np.testing.assert_allclose(x, steps.reshape(400, 10).mean(1))
    np.testing.assert_allclose(y, (steps**2).reshape(400, 10).mean(1))


def test_step_sizes_stay_on_their_axis(make):
    records = [
        make(0),
        make(5, eta_star_ci_low=0.0),
        make(10, eta_star_ci_high=None),
        make(12, eta_star_ci_low=None, eta_star_ci_high=None),  # an older record
        make(15, eta_star=None),
    ]
    (axes,) = step_size_figure(records).axes
    (bars,) = axes.containers
    assert bars.lines[0].get_ydata().tolist() == [8e-4] * 4
    low, high = np.array([segment[:, 1] for segment in bars.lines[2][0].get_segments()]).T
    np.testing.assert_allclose(high, [2e-3, 2e-3, 16e-4, 8e-4])  # an arrow upwards in the third
    np.testing.assert_allclose(low, [5e-4, 0.8e-4, 5e-4, 8e-4])  # zero has no place on a logarithmic axis
    assert labelled(axes, "learning rate of the step")[1].tolist() == [1e-4] * 4


def test_effective_samples_at_the_step_and_at_the_largest_eta(make, make_failed):
    (axes,) = ess_figure([make(0), make_failed(5), make(10, multipliers=(4, 1))]).axes
    np.testing.assert_allclose(labelled(axes, "at the step taken")[1], [200 / 256, 200 / 256])
    np.testing.assert_allclose(labelled(axes, r"at the largest $\eta$ of the sweep")[1], [100 / 256, 50 / 256])


@pytest.mark.parametrize("draw", OVER_STEPS)
@pytest.mark.parametrize("count", [0, 2])
def test_nothing_measured(make_failed, draw, count):
    figure = draw([make_failed(step) for step in range(count)])
    assert not figure.axes
    assert f"({count} " in figure.texts[0].get_text()


def drawn_inside(figure):
    """Every axis, label and legend lies within the picture."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    box = figure.get_tightbbox(renderer)
    width, height = figure.get_size_inches()
    # a hundredth of an inch for the roundings of glyphs to pixels
    return box.x0 > -0.01 and box.y0 > -0.01 and box.x1 < width + 0.01 and box.y1 < height + 0.01


@pytest.mark.parametrize(
    "draw", [*OVER_STEPS, delta_entropy_figure, components_figure, exchange_rate_figure, eta_sweep_figure]
)
def test_a_narrow_figure_stacks_its_panels_and_keeps_everything_inside(make_rewarded, draw):
    records = [make_rewarded(step, expected_reward={"value": 0.25, "stderr": 0.1}) for step in range(0, 1000, 100)]
    given = records[-1] if draw is eta_sweep_figure else records
    wide = draw(given)
    with figures_of_width(3.73):
        narrow = draw(given)
    assert wide.get_figwidth() == 7.5
    assert narrow.get_figwidth() == 3.73
    assert drawn_inside(narrow)
    panels = [axes for axes in narrow.axes if axes.get_xlabel() or axes.get_ylabel()]
    # colour bars have no place in the grid of panels
    assert {axes.get_subplotspec().colspan.start for axes in panels if axes.get_subplotspec()} == {0}
