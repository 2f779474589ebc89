"""Figures of the studies, drawn from their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from entropy_pl.records import EstimateRecord
from entropy_pl.reporting.figures import FIRST_STYLE, GREY, LEGEND, TRUE_STYLE, banded_curve, new_figure, scientific

# Okabe and Ito's palette, told apart by colour-blind readers; yellow is left out, as too light for lines
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#666666")


def power_law_figure(table: pd.DataFrame, fits: pd.DataFrame, units: str) -> Figure:
    """|ΔH| against η, both logarithmic, a panel per precision: markers over the line η·|δH₁| of every seed.

    Args:
        table: of the linear-regime study.
        fits: likewise.
        units: what an entropy is per.
    """
    precisions = table["precision"].unique()
    figure = new_figure(height=3.6)
    rows = figure.subplots(1, len(precisions), sharex=True, sharey=True, squeeze=False)
    table = table[table["eta"] > 0]
    for axes, precision in zip(rows[0], precisions, strict=True):
        for number, (seed, group) in enumerate(table[table["precision"] == precision].groupby("seed", sort=False)):
            colour = _colour(number)
            axes.loglog(group["eta"], group["delta_h1"].abs(), color=colour, linewidth=1.2, zorder=2)
            style: dict[str, Any] = {"color": colour, "markersize": 5, "linestyle": "none", "zorder": 3}
            axes.plot(group["eta"], group["delta_h"].abs(), marker="osD^v"[number % 5], label=f"seed {seed}", **style)
        fitted = fits[fits["precision"] == precision]
        axes.axvspan(fitted["fit_from"].min(), fitted["fit_to"].max(), color=GREY, alpha=0.1, linewidth=0, zorder=1)
        slopes = fitted["loglog_slope"]
        axes.set_title(f"{precision}: slope {slopes.min():.5f} to {slopes.max():.5f}", fontsize=10)
        _finish(axes, r"step size $\eta$")
    rows[0, 0].set_ylabel(f"|entropy change|\n[nats {units}]")
    lines = [
        Line2D([], [], color=GREY, marker="o", linestyle="none", label=r"true, $|\Delta H|$"),
        Line2D([], [], color=GREY, label=r"first order, $\eta\,|\delta H_1|$"),
    ]
    seeds = rows[0, 0].get_legend_handles_labels()[0]
    rows[0, 0].legend(handles=[*lines, *seeds], **LEGEND)
    return figure


def deviation_figure(table: pd.DataFrame) -> Figure:
    """|ΔH/(η·δH₁) − 1| against η, both logarithmic, a panel per precision, beside what the second order predicts.

    Args:
        table: of the linear-regime study.
    """
    precisions = table["precision"].unique()
    figure = new_figure(height=3.9)
    rows = figure.subplots(1, len(precisions), sharex=True, sharey=True, squeeze=False)
    table = table[table["eta"] > 0]
    predicted = (table["second_order_prediction"] / table["delta_h1"] - 1).abs()
    for axes, precision in zip(rows[0], precisions, strict=True):
        chosen = table[table["precision"] == precision].assign(predicted=predicted)
        for number, (seed, group) in enumerate(chosen.groupby("seed", sort=False)):
            colour = _colour(number)
            # a line through two points: at small η the difference of two nearly equal numbers is rounding
            ends = group.iloc[[-1]].assign(eta=group["eta"].iloc[0])
            ends["predicted"] *= group["eta"].iloc[0] / group["eta"].iloc[-1]
            line = pd.concat([ends, group.iloc[[-1]]])
            axes.loglog(line["eta"], line["predicted"], color=colour, linewidth=1.0, zorder=2)
            for above in (True, False):
                points = group[(group["relative_deviation"] > 0) == above]
                axes.plot(
                    points["eta"],
                    points["relative_deviation"].abs(),
                    "osD^v"[number % 5],
                    color=colour,
                    markersize=5,
                    markerfacecolor=colour if above else "none",
                    label=f"seed {seed}" if above else None,
                    zorder=3,
                )
        axes.axhline(1e-3, color=GREY, linestyle=":", linewidth=1.0, zorder=1)
        axes.annotate(
            "0.1 %", (1, 1e-3), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY, fontsize=8
        )
        axes.set_title(precision, fontsize=10)
        _finish(axes, r"step size $\eta$")
    rows[0, 0].set_ylabel(r"$|\Delta H\,/\,(\eta\,\delta H_1) - 1|$")
    floor = table["relative_deviation"].abs()
    rows[0, 0].set_ylim(bottom=floor[floor > 0].min() / 3)
    handles = [
        *(
            Line2D([], [], color=_colour(n), marker="osD^v"[n % 5], linestyle="none", label=f"seed {seed}")
            for n, seed in enumerate(table["seed"].unique())
        ),
        Line2D([], [], color=GREY, label="second order"),
    ]
    rows[0, 0].legend(handles=handles, **LEGEND)
    return figure


def variance_ratio_figure(on_pool: pd.DataFrame, eta: float, compared_to: str) -> Figure:
    """Bars of the variance ratio per option, δH₁ and ΔH side by side.

    Args:
        on_pool: the variance study's table of the whole pool.
        eta: η of the ΔH that is shown.
        compared_to: name of the option that is 1.
    """
    names = list(on_pool["option"].unique())
    figure = new_figure(height=1.4 + 0.34 * len(names))
    axes: Axes = figure.subplots()
    place = np.arange(len(names))
    for offset, (chosen, colour, label) in zip((-0.2, 0.2), _both(on_pool, eta), strict=True):
        chosen = chosen.set_index("option").loc[names]
        ratio, high = chosen["variance_ratio"], chosen["variance_ratio_ci_high"]
        error = [ratio - chosen["variance_ratio_ci_low"], high - ratio]
        axes.barh(place + offset, ratio, height=0.38, color=colour, alpha=0.75, label=label, zorder=2)
        axes.errorbar(ratio, place + offset, xerr=error, fmt="none", ecolor="black", elinewidth=1, capsize=2, zorder=3)
        jackknife = chosen["variance_ratio_jackknife"]
        axes.plot(jackknife, place + offset, "s", color="white", markeredgecolor="black", markersize=4.5, zorder=4)
        ends = np.fmax(high, jackknife)
        for at, value, end in zip(place + offset, ratio, ends, strict=True):
            style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7.5}
            axes.annotate(f"{value:.2g}", (end, at), xytext=(6, 0), **style)
    axes.axvline(1, color=GREY, linestyle=":", linewidth=1.2, zorder=1)
    axes.set_yticks(place, names)
    axes.invert_yaxis()
    axes.set_xlabel(f"variance, in multiples of {compared_to}'s at equal N")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    if on_pool["variance_ratio_jackknife"].notna().any():
        marker = Line2D([], [], marker="s", color="white", markeredgecolor="black", markersize=4.5, linestyle="none")
        handles, labels = [*handles, marker], [*labels, "jackknife"]
    axes.legend(handles, labels, **LEGEND)
    return figure


def error_bars_figure(table: pd.DataFrame, eta: float) -> Figure:
    """Standard error against N for every option, by three ways of finding it; δH₁ and ΔH in a panel each.

    Args:
        table: of the variance study.
        eta: η of the ΔH that is shown.
    """
    names = list(table["option"].unique())
    colours = [matplotlib.colormaps["tab20"](2 * n % 20 + n // 10) for n in range(len(names))]
    figure = new_figure(height=5.4)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, (chosen, _, label) in zip(panels, _both(table, eta), strict=True):
        for name, colour in zip(names, colours, strict=True):
            group = chosen[chosen["option"] == name]
            error = {
                kind: np.sqrt(group[f"variance_{kind}"] / group["n"])
                for kind in ("influence", "jackknife", "empirical")
            }
            axes.loglog(group["n"], error["influence"], color=colour, linewidth=1.4, label=name)
            axes.plot(group["n"], error["jackknife"], "s", color=colour, markerfacecolor="none", markersize=6)
            axes.plot(group["n"], error["empirical"], "x", color=colour, markersize=6)
        axes.set_title(label, fontsize=10)
        _finish(axes, "sequences N")
        _sizes(axes, table["n"])
    panels[0].set_ylabel("standard error [nats; of δH₁ per unit η]")
    kinds = [
        Line2D([], [], color=GREY, label="influence function"),
        Line2D([], [], color=GREY, marker="s", markerfacecolor="none", linestyle="none", label="jackknife"),
        Line2D([], [], color=GREY, marker="x", linestyle="none", label="among subsets"),
    ]
    lines = panels[0].get_legend_handles_labels()[0]
    figure.legend(handles=[*lines, *kinds], loc="outside lower center", ncols=4, **LEGEND)
    return figure


def convergence_figure(table: pd.DataFrame, eta: float, units: str) -> Figure:
    """H, and below it ΔH/η with δH₁, against N with their bands.

    Args:
        table: of the convergence study.
        eta: η of the ΔH that is shown.
        units: what an entropy is per.
    """
    figure = new_figure(height=5.6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    entropy = table[table["quantity"] == "entropy"]
    _band(upper, entropy, 1.0, TRUE_STYLE, r"entropy, $H$", filled=True)
    upper.set_ylabel(f"entropy\n[nats {units}]")
    first, true = (chosen for chosen, _, _ in _both(table, eta))
    _band(lower, true, eta, TRUE_STYLE, rf"true, $\Delta H/\eta$ at $\eta$ = {scientific(eta)}", filled=True)
    _band(lower, first, 1.0, FIRST_STYLE, r"first order, $\delta H_1$", filled=False)
    lower.set_ylabel(f"entropy change per unit $\\eta$\n[nats {units}]")
    for axes in (upper, lower):
        axes.set_xscale("log")
        axes.legend(**LEGEND)
        _finish(axes, "")
        _sizes(axes, table["n"])
    lower.set_xlabel("sequences N")
    figure.align_ylabels()
    return figure


def standard_error_figure(table: pd.DataFrame, eta: float) -> Figure:
    """Relative standard errors against N, both logarithmic, with lines falling as 1/√N.

    Args:
        table: of the convergence study.
        eta: η of the ΔH that is shown.
    """
    figure = new_figure(height=3.8)
    axes: Axes = figure.subplots()
    first, true = (chosen for chosen, _, _ in _both(table, eta))
    entropy_style = {"color": "#007A59", "marker": "^", "linestyle": "-.", "linewidth": 1.4}
    for group, style, label in (
        (table[table["quantity"] == "entropy"], entropy_style, r"entropy, $H$"),
        (true, TRUE_STYLE, rf"true, $\Delta H$ at $\eta$ = {scientific(eta)}"),
        (first, FIRST_STYLE, r"first order, $\delta H_1$"),
    ):
        relative = group["stderr_typical"] / abs(group["value"].iloc[-1])
        axes.loglog(group["n"], relative, label=label, zorder=3, **cast(dict[str, Any], style))
        straight = relative.iloc[-1] * np.sqrt(group["n"].iloc[-1] / group["n"])
        axes.plot(group["n"], straight, color=GREY, linewidth=0.8, zorder=2)
    axes.set_ylabel("standard error / |estimate at the largest N|")
    _finish(axes, "sequences N")
    _sizes(axes, table["n"])
    axes.legend(**LEGEND)
    return figure


def _both(table: pd.DataFrame, eta: float) -> list[tuple[pd.DataFrame, str, str]]:
    """The rows of δH₁ and those of ΔH at η, each with colour and label."""
    return [
        (table[table["quantity"] == "delta_h1"], FIRST_STYLE["color"], r"first order, $\delta H_1$"),
        (
            table[(table["quantity"] == "delta_h") & (table["eta"] == eta)],
            TRUE_STYLE["color"],
            rf"true, $\Delta H$ at $\eta$ = {scientific(eta)}",
        ),
    ]


def _band(axes: Axes, group: pd.DataFrame, scale: float, style: dict[str, Any], label: str, *, filled: bool) -> None:
    scaled = group[["value", "ci_low", "ci_high"]] / scale
    rows = scaled.itertuples(index=False)
    estimates = [EstimateRecord(value=value, ci_low=low, ci_high=high) for value, low, high in rows]
    banded_curve(axes, group["n"].to_numpy(float), estimates, style, label, filled=filled)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)


def _sizes(axes: Axes, sizes: Sequence[int] | pd.Series) -> None:
    """The sizes themselves on a logarithmic axis."""
    ticks = sorted(set(sizes))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
