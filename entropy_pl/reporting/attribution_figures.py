"""Figures of who moved the entropy: the tokens of one step, and components and reward over the steps of a run.

Red lowers the entropy, blue raises it. Drawn as :mod:`entropy_pl.reporting.figures` draws, on matplotlib's `Figure`
itself: save one with ``figure.savefig(path)``, or hand it to ``SummaryWriter.add_figure``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager, get_font
from numpy.typing import NDArray

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE, ZERO
from entropy_pl.records import AnyRecord, number, probes_of
from entropy_pl.reporting.attributed import DECILES, AttributedTokens
from entropy_pl.reporting.figures import (
    BELOW_POWER,
    FIRST_STYLE,
    GREY,
    LEGEND,
    RASTERIZED,
    TRUE_STYLE,
    at_steps_taken,
    banded_curve,
    column,
    empty_figure,
    finish,
    interval_title,
    margins,
    new_figure,
    over_steps,
    place_legend,
    scatter_of_steps,
    scientific,
    side_by_side,
    units_of,
    values_of,
)
from entropy_pl.reporting.visible_text import shortened, visible

LOWERS, RAISES = "#D55E00", "#0072B2"
SIGN_STYLES = {  # colours of Okabe and Ito's palette, so that no meaning hangs on red against green
    POSITIVE: ("#009E73", "A > 0"),
    NEGATIVE: ("#CC79A7", "A < 0"),
    ZERO: ("#999999", "A = 0"),
    "all": (GREY, "all tokens"),
}
COMPONENT_STYLES: dict[str, dict[str, Any]] = {
    "momentum": {"color": "#0072B2", "marker": "o"},
    "weight_decay": {"color": "#999999", "marker": "v"},
    "tokens": {"color": "#009E73", "marker": "s"},
    "remainder": {"color": "#CC79A7", "marker": "x"},
}
FAMILIES = (  # for texts of any script, as far as they are installed
    "DejaVu Sans Mono",
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
)
ERROR_BARS = 200  # bars up to which they have error bars; those of more would cover them
CLIPPED = 0.98  # quantile of |influence| at which the heat map's colours end
LINEAR = 0.5  # quantile of |influence| up to which the scatter's axis is linear


def top_tokens_figure(tokens: AttributedTokens, count: int = 20) -> Figure:
    """The tokens that changed the entropy most, the largest on top, with what stands before each.

    Args:
        tokens: of one step.
        count: how many.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    top = [i for i in tokens.top(count).tolist() if math.isfinite(tokens.values[i])]
    if not top:
        return empty_figure(f"optimizer step {tokens.step}: no tokens to draw")
    figure = new_figure(height=1.2 + 0.24 * len(top))
    axes: Axes = figure.subplots()
    values = tokens.values[top]
    axes.barh(range(len(top)), values, height=0.7, color=np.where(values < 0, LOWERS, RAISES), zorder=2)
    axes.axvline(0, color=GREY, linewidth=0.8, zorder=3)
    for row, index in enumerate(top):
        _token_label(axes, row, drawable(tokens.context(index, 24)), drawable(shortened(tokens.text[index], 20)))
        details = rf"$\pi$ = {math.exp(tokens.logp[index]):.3g}"
        if tokens.advantages is not None:
            details += rf", $A$ = ${tokens.advantages[index]:+.2f}$"
        side = -1 if values[row] < 0 else 1
        axes.annotate(
            details,
            (values[row], row),
            (4 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7,
            color=GREY,
        )
    axes.set_ylim(len(top) - 0.4, -0.6)
    axes.set_yticks([])
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    room = 0.42 * (high - low) or 1.0  # for what is written beside the bars
    axes.set_xlim(low - room * bool(low < 0), high + room * bool(high > 0 or low == 0))
    axes.set_xlabel(f"entropy change by the token [{tokens.units}]", labelpad=BELOW_POWER)
    figure.suptitle(_title(tokens, f"{len(top)} of {len(tokens)} tokens, red lowers, blue raises"), fontsize=10)
    finish(axes, "x")
    return figure


def influence_scatter_figure(tokens: AttributedTokens) -> Figure:
    """Every token's influence against its log π, and against its advantage, with means over ten equal groups.

    The vertical axis is logarithmic both ways, and linear around zero, where about half of the tokens lie.

    Args:
        tokens: of one step.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    real = np.isfinite(tokens.values) & np.isfinite(tokens.logp)
    if not real.any():
        return empty_figure(f"optimizer step {tokens.step}: no tokens to draw")
    figure = new_figure(height=4.2)
    panels = [(r"$\log\,\pi$ of the token [nats]", tokens.logp)]
    if tokens.advantages is not None:
        panels.append(("advantage of its completion", tokens.advantages))
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    sizes = np.abs(tokens.values[real])
    linear = 10.0 ** round(math.log10(np.quantile(sizes[sizes > 0], LINEAR))) if (sizes > 0).any() else 1.0
    signs = tokens.by_sign() or {"all": real}
    for axes, (label, x) in zip(row, panels, strict=True):
        for name, chosen in signs.items():
            shown = chosen & real
            if shown.any():
                colour, words = SIGN_STYLES[name]
                axes.plot(
                    x[shown],
                    tokens.values[shown],
                    "o",
                    markersize=2.5 if len(tokens) > 1000 else 4,
                    markeredgewidth=0,
                    alpha=0.35,
                    color=colour,
                    label=words,
                    rasterized=True,
                )
        _group_means(axes, x[real], tokens.values[real])
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
        axes.set_yscale("symlog", linthresh=linear, linscale=1)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    row[0].set_ylabel(f"entropy change by the token\n[{tokens.units}], linear within ±{scientific(linear)}")
    handles, labels = row[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), markerscale=2, **LEGEND)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    figure.suptitle(_title(tokens, f"{int(real.sum())} tokens"), fontsize=10)
    return figure


def influence_matrix_figure(tokens: AttributedTokens) -> Figure:
    """How much each completion of U moved the entropy on each completion of E, as a heat map, and by itself above it.

    Rows go by their mean. Columns are grouped by prompt, prompts by what their completions did together, completions
    by what they did.

    Args:
        tokens: of one step.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    if tokens.matrix is None or not np.isfinite(tokens.matrix).any():
        return empty_figure(f"optimizer step {tokens.step}: no influence of U-completions on E-completions was kept")
    numbers = tokens.prompt_numbers()
    sums = np.bincount(numbers, weights=np.nan_to_num(tokens.sequence_values))
    columns = np.lexsort((tokens.sequence_values, numbers, sums[numbers]))
    rows = np.argsort(tokens.matrix.mean(1), kind="stable")
    ends = np.flatnonzero(np.diff(numbers[columns])) + 0.5

    figure = new_figure(height=6.0)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    values, places = tokens.sequence_values[columns], np.arange(len(columns))
    stderr = tokens.sequence_stderr if len(columns) <= ERROR_BARS else None
    errors = None if stderr is None else tokens.reach * stderr[columns]
    colours = np.where(values < 0, LOWERS, RAISES)
    upper.bar(places, values, width=0.8, color=colours, yerr=errors, error_kw={"elinewidth": 0.6, "ecolor": "#333333"})
    upper.axhline(0, color=GREY, linewidth=0.8)
    reach = "" if errors is None else f", ± {tokens.reach:.3g} SE"
    upper.set_ylabel(f"mean over E{reach}\n[{tokens.units}]", fontsize=8)
    finish(upper, "y")

    sizes = np.abs(tokens.matrix[np.isfinite(tokens.matrix)])
    limit = float(np.quantile(sizes, CLIPPED)) or float(sizes.max()) or 1.0
    image = lower.imshow(
        tokens.matrix[np.ix_(rows, columns)], aspect="auto", cmap="RdBu", vmin=-limit, vmax=limit, interpolation="none"
    )
    for axes in (upper, lower):
        axes.tick_params(axis="x", length=0)
        for end in ends:
            axes.axvline(end, color="black", linewidth=0.6, alpha=0.6)
    middles = np.convolve([-0.5, *ends, len(columns) - 0.5], [0.5, 0.5], "valid")
    order = numbers[columns][np.round(middles).astype(int)] + 1
    every = 1 + len(order) // 32
    lower.set_xticks(middles[::every], [str(prompt) for prompt in order[::every]], fontsize=8)
    lower.set_xlabel(f"{len(columns)} completions of U, by prompt (its number in the batch)")
    lower.set_ylabel(f"{len(rows)} completions of E, by their mean")
    lower.set_yticks([])
    bar = figure.colorbar(image, ax=lower, extend="both", pad=0.01, aspect=30)
    bar.ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    bar.set_label(f"[{tokens.units}], colours end at\n{100 * CLIPPED:g} % of the absolute values", fontsize=8)
    upper.set_title(_title(tokens, "red lowers the entropy, blue raises it"), fontsize=10)
    return figure


def influence_share_figure(tokens: AttributedTokens) -> Figure:
    """How much of the tokens' entropy change comes from each sign of the advantage and decile of the probability.

    The sums by sign have standard errors over E in the legend; the deciles have none.

    Args:
        tokens: of one step.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    if not len(tokens):
        return empty_figure(f"optimizer step {tokens.step}: no tokens to draw")
    everything = tokens.by_sign_and_decile()
    shares = {name: share for name, share in everything.items() if any(share["values"])} or everything
    total = sum(sum(share["values"]) for share in shares.values())
    deciles = np.arange(DECILES)
    figure = new_figure(height=4.2)
    axes: Axes = figure.subplots()
    width = 0.8 / len(shares)
    for place, (name, share) in enumerate(shares.items()):
        colour, words = SIGN_STYLES[name]
        own = sum(share["values"])
        label = f"{words}: {_with_error(tokens, name, own)}" + (f" ({100 * own / total:.0f} %)" if total else "")
        axes.bar(deciles + (place + 0.5) * width - 0.4, share["values"], width, color=colour, label=label, zorder=2)
    together = np.sum([share["values"] for share in shares.values()], axis=0)
    words = f"together: {_with_error(tokens, 'tokens', total)}"
    axes.plot(deciles, together, "D", color="black", markersize=4, label=words, zorder=4)
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=3)
    probabilities = np.exp(tokens.logp)
    own_decile = tokens.deciles()
    by_decile = [probabilities[own_decile == decile] for decile in deciles]
    names = [
        f"{_probability(inside.min())}\n–{_probability(inside.max())}" if len(inside) else "–" for inside in by_decile
    ]
    axes.set_xticks(deciles, names, fontsize=8)
    axes.set_xlabel(rf"$\pi$ of the token, in ten groups of {len(tokens) / DECILES:.0f} tokens")
    axes.set_ylabel(f"entropy change by the tokens\n[{tokens.units}]")
    axes.set_title(_title(tokens, f"{len(tokens)} tokens"), fontsize=10)
    finish(axes, "y")
    figure.legend(loc="outside lower center", ncols=2, **LEGEND)
    return figure


def components_figure(records: Sequence[AnyRecord]) -> Figure:
    """What the parts of each optimizer step did to the entropy, with δH₁ of the whole step, over the run.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    kept = [record for record in probes_of(records) if record.attribution]
    parts = {name: [record.attribution.part(name) for record in kept] for name in (*COMPONENT_STYLES, "first_order")}
    drawn = {name: found for name, found in parts.items() if np.isfinite(values_of(found)).any()}
    if not drawn:
        return empty_figure(f"no probe has attributed an entropy change yet ({len(records)} recorded)")
    steps = column(record.step for record in kept)
    figure = new_figure(height=4.2)
    axes: Axes = figure.subplots()
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    for name, found in drawn.items():
        words = r"whole step, $\delta H_1$" if name == "first_order" else name.replace("_", " ")
        style = {"markersize": 5, "linestyle": "-", "linewidth": 1.4, **COMPONENT_STYLES.get(name, {})}
        banded_curve(axes, steps, found, FIRST_STYLE if name == "first_order" else style, words, filled=True)
    axes.set_ylabel(f"entropy change of the step\n[{units_of(kept)}]")
    over_steps(axes, steps)
    finish(axes, "y")
    place_legend(figure, axes, title=interval_title(kept))
    return figure


def exchange_rate_figure(records: Sequence[AnyRecord]) -> Figure:
    """The price of reward: ΔH against ΔJ of every step taken, and their ratio over the steps.

    Ratios whose interval has no bounds (ΔJ is not told from zero) are crosses on the horizontal axis.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A figure 900 pixels wide; with a line of text saying so where there is nothing to draw.
    """
    kept, steps, points = at_steps_taken(records)
    reward, entropy = [point.reward_true for point in points], [point.true for point in points]
    x, y = values_of(reward), values_of(entropy)
    real = np.isfinite(x + y)
    if not real.any():
        return empty_figure(f"no probe has measured a change of reward yet ({len(records)} recorded)")
    figure, (left, right) = side_by_side(height=4.2, panels=2)
    scatter_of_steps(figure, left, steps, reward, entropy)
    left.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    left.axvline(0, color=GREY, linewidth=0.8, zorder=1)
    left.set_xlabel(r"$\Delta J$, of the mean reward", labelpad=BELOW_POWER)
    left.set_ylabel(rf"$\Delta H$ [{units_of(kept)}]")
    left.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3), useMathText=True)
    finish(left, "y")

    rates = [record.exchange_rate for record in kept]
    values = values_of(rates)
    bounded = np.array([bool(rate.bounded) for rate in rates]) & np.isfinite(values)
    unbounded = ~bounded & np.isfinite(values)
    right.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    right.errorbar(
        steps[bounded],
        values[bounded],
        yerr=margins(rates)[:, bounded],
        capsize=3,
        rasterized=bool(bounded.sum() > RASTERIZED),
        **{**TRUE_STYLE, "linestyle": "none"},
    )
    if bounded.any():  # one interval that goes far must not flatten the others: it runs out of the panel
        reach = 3 * float(np.median(margins(rates)[:, bounded]))
        right.set_ylim(min(0.0, values[bounded].min() - reach), max(0.0, values[bounded].max() + reach))
    if unbounded.any():
        style: dict[str, Any] = {"color": GREY, "transform": right.get_xaxis_transform(), "clip_on": False}
        right.plot(steps[unbounded], np.zeros(unbounded.sum()), "x", label="interval without bounds", **style)
        figure.legend(loc="outside lower right", **LEGEND)
    right.set_ylabel(r"$\Delta H\,/\,\Delta J$ [nats per unit reward]")
    over_steps(right, steps)
    finish(right, "y")
    figure.suptitle(interval_title(kept), fontsize=9, color=GREY)
    return figure


@cache
def _fonts() -> tuple[list[str], frozenset[int]]:
    """Families for texts of any script, of those installed, and the characters that one of them has."""
    installed = {entry.name for entry in fontManager.ttflist}
    families = [name for name in FAMILIES if name in installed]
    paths = [fontManager.findfont(FontProperties(family=name)) for name in families]
    return families, frozenset(code for path in paths for code in get_font(path).get_charmap())


def drawable(text: str) -> str:
    """A text as :func:`.visible` shows it, with ``□`` for characters that no installed font has."""
    _, known = _fonts()
    return "".join(character if ord(character) in known else "□" for character in visible(text))


def _token_label(axes: Axes, row: int, context: str, token: str) -> None:
    """A bar's name: the token in a frame, what stands before it in grey to its left. Neither is mathematics."""
    font: dict[str, Any] = {"family": _fonts()[0], "parse_math": False, "ha": "right", "va": "center"}
    frame = {"boxstyle": "square,pad=0.15", "facecolor": "#EEEEEE", "edgecolor": "none"}
    token = token.replace(" ", "\N{NO-BREAK SPACE}")  # spaces at an end take room, too
    label = axes.text(-0.012, row, token, transform=axes.get_yaxis_transform(), fontsize=8, bbox=frame, **font)
    axes.annotate(context, (-0.02, 0.5), xycoords=label, fontsize=7.5, color=GREY, annotation_clip=False, **font)


def _probability(value: float) -> str:
    """``0.25``, or ``1−3e-05`` where little is left of 1."""
    return f"{value:.2g}" if value < 0.99 or value >= 1 else f"1−{1 - value:.0e}"


def _group_means(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Means of y over ten groups of equal counts along x, each at its median x; over each x where there are few."""
    if len(distinct := np.unique(x)) <= DECILES:  # rewards of a few values give advantages of a few values
        groups = [np.flatnonzero(x == value) for value in distinct]
    else:
        groups = [group for group in np.array_split(np.argsort(x, kind="stable"), DECILES) if len(group)]
    middles, means = [float(np.median(x[group])) for group in groups], [float(y[group].mean()) for group in groups]
    axes.plot(middles, means, "D-", color="black", markersize=4, linewidth=1, label="mean of a tenth", zorder=5)


def _with_error(tokens: AttributedTokens, name: str, value: float) -> str:
    """``+1.2e-05 ± 3e-06 nats``, the standard error over E."""
    stderr = number(tokens.errors.get(name, {}).get("stderr"))
    return f"{value:+.2e}" + (f" ± {stderr:.0e}" if math.isfinite(stderr) else "") + " nats"


def _title(tokens: AttributedTokens, rest: str) -> str:
    return rf"optimizer step {tokens.step}, $\eta$ = {scientific(tokens.eta)}: {rest}"
