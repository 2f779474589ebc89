"""Figures of a whole run beside ΔH's and the attribution's: training, calibration, step sizes, effective samples.

Drawn as :mod:`entropy_pl.reporting.figures` draws, on matplotlib's `Figure` itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from entropy_pl.records import AnyRecord, number, probes_of
from entropy_pl.reporting.figures import (
    BELOW_POWER,
    FIRST_STYLE,
    GREY,
    RASTERIZED,
    TRUE_STYLE,
    at_steps_taken,
    banded_curve,
    column,
    empty_figure,
    finish,
    interval_title,
    new_figure,
    over_steps,
    place_legend,
    scatter_of_steps,
    side_by_side,
    units_of,
    values_of,
)
from entropy_pl.reporting.run_folder import Curve

POINTS = 400  # of a trainer's curve; of a longer one, the means of so many stretches


def training_figure(records: Sequence[AnyRecord], curves: Mapping[str, Curve] | None = None) -> Figure:
    """Reward and entropy over the optimizer steps: what the probe measured on its E-batch, and what the trainer logged.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.
        curves: what the trainer logged as ``reward`` and ``entropy``, by these names. Curves of more than 400 points
            are drawn as means over that many stretches.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    probes, curves = probes_of(records), curves or {}
    steps = column(probe.step for probe in probes)
    measured = {
        "reward": [probe.expected_reward for probe in probes],
        "entropy": [probe.entropy for probe in probes],
    }
    noted = column(probe.reward for probe in probes)
    labels = {"reward": "mean reward", "entropy": f"entropy\n[{units_of(probes)}]"}
    drawn = [
        name
        for name in labels
        if len(curves.get(name, ((), ()))[0])
        or np.isfinite(values_of(measured[name])).any()
        or (name == "reward" and np.isfinite(noted).any())
    ]
    if not drawn:
        return empty_figure(f"neither reward nor entropy was recorded ({len(probes)} probes)")
    figure = new_figure(height=0.6 + 2.3 * len(drawn))
    rows = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(rows, drawn, strict=True):
        if len(curves.get(name, ((), ()))[0]):
            axes.plot(*_thinned(*curves[name]), color=GREY, linewidth=1.2, label="training batches, as logged")
        elif name == "reward" and np.isfinite(noted).any():
            axes.plot(steps, noted, color=GREY, marker=".", linewidth=1.2, label="training batch of the probed step")
        if np.isfinite(values_of(measured[name])).any():
            banded_curve(axes, steps, measured[name], TRUE_STYLE, "E-batch of the probe", filled=True)
        axes.set_ylabel(labels[name])
        finish(axes, "y")
    over_steps(rows[-1], np.array(sorted({*steps, *(x for name in drawn for x in curves.get(name, ((), ()))[0])})))
    # every panel's curves once, where both have the same ones
    handles = {label: handle for axes in rows for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    place_legend(figure, rows[0], handles=list(handles.values()))
    figure.align_ylabels()
    return figure


def calibration_figure(records: Sequence[AnyRecord]) -> Figure:
    """ΔH against δH₁ of every step taken, beside the diagonal; and their gap in standard errors of ΔH, over the steps.

    Both come from the same samples, so that their noise is largely the same: the points lie far closer to the diagonal
    than their error bars are long, and the gap is curvature, not chance. What the picture shows is how straight the
    entropy was along each step, not how right either number is.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    kept, steps, points = at_steps_taken(records)
    first, true = [point.first_order for point in points], [point.true for point in points]
    x, y = values_of(first), values_of(true)
    real = np.isfinite(x + y)
    if not real.any():
        return empty_figure(f"no probe has measured an entropy change yet ({len(records)} recorded)")
    figure, (left, right) = side_by_side(height=4.0, panels=2)
    scatter_of_steps(figure, left, steps, first, true)
    left.axline(
        (0.0, 0.0), slope=1, color=GREY, linewidth=1.0, linestyle="--", zorder=3, label=r"$\Delta H=\delta H_1$"
    )
    left.set_xlabel(rf"first order, $\delta H_1$ [{units_of(kept)}]", labelpad=BELOW_POWER)
    left.set_ylabel(rf"true, $\Delta H$ [{units_of(kept)}]")
    left.legend(fontsize=9, frameon=False, title=interval_title(kept), title_fontsize=8)
    finish(left, "both")

    errors = column(estimate.stderr for estimate in true)
    gap = np.divide(y - x, errors, out=np.full_like(x, np.nan), where=errors > 0)
    for line in (-1.0, 0.0, 1.0):
        right.axhline(line, color=GREY, linewidth=0.8, linestyle=":" if line else "-", zorder=1)
    right.plot(steps, gap, color=TRUE_STYLE["color"], marker=".", markersize=7, linewidth=1.0, zorder=3)
    right.set_ylabel(r"$(\Delta H-\delta H_1)\,/\,$standard error of $\Delta H$")
    over_steps(right, steps)
    right.spines[["top", "right"]].set_visible(False)
    return figure


def step_size_figure(records: Sequence[AnyRecord]) -> Figure:
    """η*, where the straight line stops being the truth, over the steps, beside the learning rate that was taken.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide, its vertical axis logarithmic, η* with its confidence interval, an arrow where that
        has no upper end; with a line of text saying so where there is nothing to draw.
    """
    kept = [record for record in probes_of(records) if number(record.eta_star) > 0]
    if not kept:
        return empty_figure(f"no probe has found an η* yet ({len(records)} recorded)")
    steps, stars = column(record.step for record in kept), column(record.eta_star for record in kept)
    lows = column(record.eta_star_ci_low for record in kept)
    highs = column(record.eta_star_ci_high for record in kept)
    rates = column(record.lr for record in kept)
    figure = new_figure(height=3.4)
    axes: Axes = figure.subplots()
    axes.set_yscale("log")
    # zero has no place on a logarithmic axis: an error bar down to it ends at a tenth
    below = np.minimum(np.nan_to_num(stars - lows), 0.9 * stars)
    unbounded = np.isfinite(lows) & np.isnan(highs)
    axes.errorbar(
        steps,
        stars,
        yerr=np.stack([below.clip(0), np.where(unbounded, stars, np.nan_to_num(highs - stars)).clip(0)]),
        color=TRUE_STYLE["color"],
        marker="o",
        markersize=5,
        linewidth=1.4,
        elinewidth=1.0,
        label=r"$\eta^*$ with its interval (arrow: unbounded)",
        rasterized=bool(len(steps) > RASTERIZED),
    )
    axes.plot(steps[unbounded], 2 * stars[unbounded], "^", color=TRUE_STYLE["color"], markersize=6)
    rated = rates > 0
    axes.plot(steps[rated], rates[rated], color=FIRST_STYLE["color"], linestyle="--", label="learning rate of the step")
    axes.set_ylabel("step size (learning rate)")
    axes.spines[["top", "right"]].set_visible(False)
    over_steps(axes, steps)
    place_legend(figure, axes)
    return figure


def ess_figure(records: Sequence[AnyRecord]) -> Figure:
    """Effective sample size of ΔH's importance weights, as a fraction of N: at the step taken, and at the largest η.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    kept = [record for record in probes_of(records) if record.sweep]
    at_taken = column(record.taken.ess_fraction for record in kept)
    at_largest = column(max(record.sweep, key=lambda point: number(point.eta)).ess_fraction for record in kept)
    if not np.isfinite(np.concatenate([at_taken, at_largest])).any():
        return empty_figure(f"no effective sample size was recorded ({len(records)} probes)")
    steps = column(record.step for record in kept)
    figure = new_figure(height=3.0)
    axes: Axes = figure.subplots()
    axes.plot(steps, at_taken, color=TRUE_STYLE["color"], marker="o", markersize=5, label="at the step taken")
    axes.plot(
        steps, at_largest, color=FIRST_STYLE["color"], linestyle="--", label=r"at the largest $\eta$ of the sweep"
    )
    axes.set_ylim(0, 1.05)
    axes.set_ylabel("ESS / N")
    axes.spines[["top", "right"]].set_visible(False)
    over_steps(axes, steps)
    place_legend(figure, axes)
    return figure


def _thinned(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Curve:
    """A curve of at most ``POINTS`` points: itself, or means over stretches."""
    if len(steps) <= POINTS:
        return steps, values
    stretches = np.array_split(np.arange(len(steps)), POINTS)
    return tuple(np.array([part[stretch].mean() for stretch in stretches]) for part in (steps, values))  # type: ignore[return-value]
