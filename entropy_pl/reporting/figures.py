"""The two figures of a run: ΔH beside δH₁ over the optimizer steps, and over step sizes η at one step.

Drawn on matplotlib's `Figure` itself, without pyplot: no global state, no window, no change of backend, and nothing to
close. Save one with ``figure.savefig(path)``, or hand it to ``SummaryWriter.add_figure``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from entropy_pl.records import AnyRecord, EstimateRecord, PointRecord, Record, number, probes_of
from entropy_pl.reporting.table import DASH, eta_star_shown
from entropy_pl.reporting.trust import UNTRUSTED

WIDTH, DPI = 7.5, 120  # inches, dots per inch: 900 pixels
NARROW = 5.0  # inches: in a narrower figure panels stand below each other, and legends below the axes
_width: ContextVar[float] = ContextVar("_width", default=WIDTH)
# Blue and vermilion of Okabe and Ito's palette, told apart by colour-blind readers; line, marker and fill differ as
# well, since the two curves mostly lie on top of each other.
TRUE_STYLE: dict[str, Any] = {"color": "#0072B2", "linestyle": "-", "marker": "o", "markersize": 5.5, "linewidth": 1.6}
FIRST_STYLE: dict[str, Any] = {
    "color": "#D55E00",
    "linestyle": (0, (5, 2)),
    "marker": "s",
    "markersize": 8.5,
    "markerfacecolor": "none",
    "linewidth": 1.6,
}
SECOND_STYLE: dict[str, Any] = {"color": "#007A59", "linestyle": "-.", "linewidth": 1.4}
GREY = "#666666"
UNTRUSTED_STYLE: dict[str, Any] = {
    "color": GREY,
    "linestyle": "none",
    "marker": "o",
    "markersize": 6.5,
    "markerfacecolor": "white",
    "zorder": 6,
}
LEGEND: dict[str, Any] = {"fontsize": 9, "title_fontsize": 8, "frameon": False}
BELOW_POWER = 12.0  # points between the tick labels and a label that stays clear of the axis's power of ten
# viridis up to its green: yellow is too light for points on white, and too dark for them where a page is inverted
OF_STEPS = LinearSegmentedColormap.from_list("steps", matplotlib.colormaps["viridis"](np.linspace(0, 0.75, 256)))
RASTERIZED = 200  # points from which a scatter is drawn as an image: in a vector file each is a shape of its own
WIDE = 30.0  # a sweep whose largest η is this many times its smallest is drawn over log η


def delta_entropy_figure(records: Sequence[AnyRecord]) -> Figure:
    """ΔH and δH₁ of the steps really taken, against the optimizer step, each with its confidence band.

    Steps probed without a result (failed, skipped, no movement) interrupt the curves and are marked by a cross on the
    horizontal axis; a ΔH whose importance weights had collapsed has a hollow grey marker. A lower panel shows the
    reward, if any record has one.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    probes = probes_of(records)
    true = [probe.taken.true for probe in probes]
    first_order = [probe.taken.first_order for probe in probes]
    missing = ~np.isfinite(values_of(true) + values_of(first_order))
    if missing.all():
        return empty_figure(f"no probe has measured an entropy change yet ({len(probes)} recorded)")
    steps = column(probe.step for probe in probes)
    rewards = column(probe.reward for probe in probes)
    with_reward = bool(np.isfinite(rewards).any())

    figure = new_figure(height=5.2 if with_reward else 4.0)
    rows = figure.subplots(
        2 if with_reward else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + with_reward]
    )
    axes: Axes = rows[0, 0]
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    banded_curve(axes, steps, true, TRUE_STYLE, r"true, $\Delta H$", filled=True)
    banded_curve(axes, steps, first_order, FIRST_STYLE, r"first order, $\delta H_1$", filled=False)
    _mark_untrusted(axes, steps, values_of(true), true)
    if missing.any():
        style: dict[str, Any] = {"color": GREY, "transform": axes.get_xaxis_transform(), "clip_on": False}
        axes.plot(steps[missing], np.zeros(missing.sum()), "x", label="probed, no result", **style)
    axes.set_ylabel(f"entropy change of the step\n[{units_of(probes)}]")
    finish(axes, "y")
    place_legend(figure, axes, title=interval_title(probes))
    if with_reward:
        rows[1, 0].plot(steps, rewards, color="#333333", marker=".", linewidth=1.2)
        rows[1, 0].set_ylabel("mean reward")
        finish(rows[1, 0], "y")
    over_steps(rows[-1, 0], steps)
    figure.align_ylabels()
    return figure


def eta_sweep_figure(record: AnyRecord) -> Figure:
    """ΔH against the step size η along one step's update, beside the straight line δH₁·η.

    The parabola δH₁·η + ½ η² v'∇²Hv is drawn where the record has a second order; η*, where the straight line stops
    being the truth, where it falls within the sweep. A sweep over decades (largest η at least 30 times the smallest) is
    drawn as ΔH/η over log η instead, so that no point hides at the origin: there the straight line lies flat. A ΔH
    whose importance weights had collapsed has a hollow grey marker.

    Args:
        record: one probe's record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    record = Record.of(record)
    sweep = [point for point in record.sweep if point.eta is not None]
    step = "update" if record.step is None else f"optimizer step {record.step}"
    if not record.is_ok or not sweep:
        reason = ": ".join(filter(None, (record.status, record.message)))
        return empty_figure(f"{step}: no η-sweep to draw ({reason or 'no points'})")

    etas = column(point.eta for point in sweep)
    per_eta = bool(etas.min() > 0 and etas.max() >= WIDE * etas.min())
    figure = new_figure(height=4.2)
    axes: Axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    handles: list[Artist | ErrorbarContainer] = [_measured_changes(axes, etas, sweep, per_eta)]
    if per_eta:
        axes.set_xscale("log")
        grid = np.geomspace(etas.min(), etas.max(), 201)
    else:
        grid = np.linspace(min(0.0, etas.min()), max(0.0, etas.max()), 201)
    handles += _predictions(axes, grid, record, per_eta)
    true = [point.true for point in sweep]
    handles += _mark_untrusted(axes, etas, values_of(true) / (etas if per_eta else 1), true)
    title, eta_star = step, number(record.eta_star)
    if (interval := eta_star_shown(record)) != DASH:
        title += rf",  $\eta^*$ {interval}"
    if grid[0] <= eta_star <= grid[-1]:
        handles.append(axes.axvline(eta_star, color=GREY, linestyle=":", linewidth=1.4, label=r"$\eta^*$"))
    for eta, point in zip(etas, sweep, strict=True):
        if point.taken:
            value = number(point.true.value) / (eta if per_eta else 1)
            label = rf"{'one step' if record.is_measurement else 'step taken'}, $\eta$ = {scientific(eta)}"
            handles += axes.plot(
                eta, value, "o", markersize=13, markerfacecolor="none", markeredgecolor="black", zorder=5, label=label
            )
    label = "step size $\\eta$ along the update{}(learning rate)"
    if is_narrow():
        axes.set_xlabel(label.format("\n"), labelpad=BELOW_POWER)
    else:
        axes.set_xlabel(label.format(" "))
    units = units_of([record])
    axes.set_ylabel(f"entropy change per unit $\\eta$\n[{units}]" if per_eta else f"entropy change\n[{units}]")
    axes.set_title(title, fontsize=10)
    finish(axes, "y" if per_eta else "both")
    place_legend(figure, axes, handles=handles, title=interval_title([record]))
    return figure


def _measured_changes(
    axes: Axes, etas: NDArray[np.float64], sweep: Sequence[PointRecord], per_eta: bool
) -> ErrorbarContainer:
    """ΔH, or ΔH/η, at every η with its confidence interval."""
    true = [point.true for point in sweep]
    scale = etas if per_eta else np.ones_like(etas)
    values, (low, high) = values_of(true) / scale, ends_of(true) / scale
    style = {**TRUE_STYLE, "linestyle": "none"}
    label = r"true, $\Delta H(\eta)\,/\,\eta$" if per_eta else r"true, $\Delta H(\eta)$"
    margins = np.abs(np.stack([low, high]) - values)
    return axes.errorbar(etas, values, yerr=margins, capsize=3, elinewidth=1.2, zorder=4, label=label, **style)


def _predictions(axes: Axes, grid: NDArray[np.float64], record: Record, per_eta: bool) -> list[Artist]:
    """The straight line with its band, and the parabola, over the step sizes ``grid``."""
    first, curvature = record.first_order, number(record.second_order.value)
    slope, low, high = number(first.value), number(first.ci_low), number(first.ci_high)
    scale = np.ones_like(grid) if per_eta else grid
    handles: list[Artist] = []
    if math.isfinite(slope):
        label = r"first order, $\delta H_1$ per unit $\eta$" if per_eta else r"first order, $\delta H_1\,\eta$"
        handles += axes.plot(grid, slope * scale, zorder=3, label=label, **{**FIRST_STYLE, "marker": None})
        colour = FIRST_STYLE["color"]
        axes.fill_between(grid, low * scale, high * scale, color=colour, alpha=0.15, linewidth=0, zorder=2)
    if math.isfinite(slope + curvature):
        parabola = (slope + 0.5 * curvature * grid) * scale
        handles += axes.plot(grid, parabola, zorder=3, label="second order", **SECOND_STYLE)
    return handles


def _mark_untrusted(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], estimates: Sequence[EstimateRecord]
) -> list[Artist]:
    """A hollow grey marker over every point that must not be believed."""
    these = np.array([estimate.untrustworthy for estimate in estimates])
    return list(axes.plot(x[these], y[these], label=UNTRUSTED, **UNTRUSTED_STYLE)) if these.any() else []


def banded_curve(
    axes: Axes,
    steps: NDArray[np.float64],
    estimates: Sequence[EstimateRecord],
    style: Mapping[str, Any],
    label: str,
    *,
    filled: bool,
) -> None:
    """A curve with its confidence band: a filled one, or one drawn by its two edges."""
    values, (low, high) = values_of(estimates), ends_of(estimates)
    every = 1 + len(steps) // 50  # markers of a long run would hide its curve
    axes.plot(steps, values, label=label, zorder=3 if filled else 4, markevery=every, **style)
    colour = style["color"]
    if filled:
        axes.fill_between(steps, low, high, facecolor=colour, alpha=0.2, linewidth=0, zorder=2)
    else:
        for edge in (low, high):
            axes.plot(steps, edge, color=colour, linewidth=0.9, linestyle=style["linestyle"], zorder=2)
    # a band has no width where a point has no neighbour: an error bar there
    present = np.concatenate([[False], np.isfinite(values), [False]])
    alone = present[1:-1] & ~present[:-2] & ~present[2:]
    if alone.any():
        margins = np.abs(np.stack([low, high]) - values)[:, alone]
        axes.errorbar(steps[alone], values[alone], yerr=margins, fmt="none", ecolor=colour, capsize=3 if filled else 6)


def scatter_of_steps(
    figure: Figure,
    axes: Axes,
    steps: NDArray[np.float64],
    across: Sequence[EstimateRecord],
    upwards: Sequence[EstimateRecord],
) -> None:
    """One estimate against another, a point with both intervals for every step that has both, coloured by the step."""
    x, y = values_of(across), values_of(upwards)
    real = np.isfinite(x + y)
    x, y, xerr, yerr = x[real], y[real], margins(across)[:, real], margins(upwards)[:, real]
    as_image = len(x) > RASTERIZED
    axes.errorbar(
        x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor="#BBBBBB", elinewidth=0.9, zorder=2, rasterized=as_image
    )
    points = axes.scatter(x, y, c=steps[real], cmap=OF_STEPS, s=22, zorder=3, rasterized=as_image)
    if len(x) > 1:
        figure.colorbar(points, ax=axes, label="optimizer step", aspect=40, pad=0.02, ticks=_whole_numbers())


def at_steps_taken(records: Sequence[AnyRecord]) -> tuple[list[Record], NDArray[np.float64], list[PointRecord]]:
    """Return the probes that measured the step taken, their steps, and their points of that step."""
    kept = [record for record in probes_of(records) if record.taken]
    return kept, column(record.step for record in kept), [record.taken for record in kept]


def margins(estimates: Sequence[EstimateRecord]) -> NDArray[np.float64]:
    """Return lengths of the error bars of an interval, downwards and upwards, ``[2, n]``; 0 where there is none."""
    return np.nan_to_num(np.abs(ends_of(estimates) - values_of(estimates)))


def values_of(estimates: Sequence[EstimateRecord]) -> NDArray[np.float64]:
    """Return the values of estimates, ``[n]``, NaN where one has none."""
    return column(estimate.value for estimate in estimates)


def ends_of(estimates: Sequence[EstimateRecord]) -> NDArray[np.float64]:
    """Return lower and upper ends of their intervals, ``[2, n]``, NaN where one has none."""
    lows, highs = column(each.ci_low for each in estimates), column(each.ci_high for each in estimates)
    return np.stack([lows, highs])


def column(numbers: Iterable[float | None]) -> NDArray[np.float64]:
    """Return numbers of records as an array, NaN where one is not there."""
    return np.array([number(value) for value in numbers])


def units_of(records: Sequence[Record]) -> str:
    """``nats per token`` or ``nats per sequence``, where the records agree on it."""
    found = {record.normalize for record in records if record.normalize}
    return f"nats {found.pop().replace('_', ' ')}" if len(found) == 1 else "nats"


def interval_title(records: Sequence[Record]) -> str:
    """``95 % confidence intervals``, where the records agree on the level."""
    found = {record.confidence for record in records if record.confidence}
    return f"{100 * found.pop():g} % confidence intervals" if len(found) == 1 else "confidence intervals"


def scientific(value: float) -> str:
    """``2.5e-05`` as mathematical text."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa.removesuffix('.0')}\times 10^{{{int(exponent)}}}$"


def finish(axes: Axes, axis: Literal["both", "x", "y"]) -> None:
    """Powers of ten beside the axes named, and no frame where there is no axis."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.ticklabel_format(axis=axis, style="sci", scilimits=(-2, 3), useMathText=True)


def over_steps(axes: Axes, steps: NDArray[np.float64]) -> None:
    """Whole optimizer steps on the horizontal axis, with room around a single one."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(_whole_numbers())
    if len(steps) == 1:
        axes.set_xlim(steps[0] - 1, steps[0] + 1)


def _whole_numbers() -> MaxNLocator:
    """Ticks at whole steps, as many as there is room for."""
    return MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True, min_n_ticks=1)


@contextmanager
def figures_of_width(width: float) -> Iterator[None]:
    """Figures drawn within are ``width`` inches wide, and laid out for it: for a phone, or a column of a paper."""
    token = _width.set(width)
    try:
        yield
    finally:
        _width.reset(token)


def is_narrow() -> bool:
    """Whether figures are now drawn too narrow for two panels side by side."""
    return _width.get() < NARROW


def place_legend(figure: Figure, axes: Axes, **options: Any) -> None:
    """A legend where it covers least inside the axes, or below all axes of a narrow figure."""
    if not is_narrow():
        axes.legend(**LEGEND, **options)
        return
    if "handles" not in options:
        options["handles"] = axes.get_legend_handles_labels()[0]
    figure.legend(loc="outside lower left", **LEGEND, **options)


def side_by_side(height: float, panels: int, **options: Any) -> tuple[Figure, NDArray[np.object_]]:
    """A figure and its ``panels`` axes: beside each other, or below each other in a narrow one.

    Args:
        height: of one panel, inches.
        panels: how many.
        options: of ``Figure.subplots``.
    """
    stacked = is_narrow()
    figure = new_figure(height * (panels if stacked else 1))
    grid = figure.subplots(*((panels, 1) if stacked else (1, panels)), squeeze=False, **options)
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(wspace=0.08)  # type: ignore[call-arg]  # constrained
    return figure, grid.ravel()


def new_figure(height: float) -> Figure:
    """An empty figure, 7.5 inches wide but within :func:`figures_of_width`; ``height`` in inches."""
    figure = Figure(figsize=(_width.get(), height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def empty_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = new_figure(height=2.0)
    text = text.replace("$", r"\$")  # a message's dollars are no mathematics; wrapping ignores `parse_math`
    figure.text(0.5, 0.5, text, ha="center", va="center", color=GREY, wrap=True)
    return figure
