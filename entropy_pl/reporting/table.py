"""Probe records as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE, ZERO
from entropy_pl.reporting.components import part
from entropy_pl.reporting.records import latest_per_step, number, taken_point
from entropy_pl.reporting.trust import UNTRUSTED, any_untrustworthy, untrustworthy

DASH, MARK = "–", "!"
SWEEP_COLUMNS = ("η", "ΔH ± SE", "δH₁ ± SE", "ΔH/δH₁ − 1", "ESS")
SIGNS = {POSITIVE: "A > 0", NEGATIVE: "A < 0", ZERO: "A = 0"}


def probe_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """One row per probed step, with ΔH and δH₁ at the step really taken.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A table of 100 columns at most. Rows without a measurement show their status and message instead.
    """
    records = latest_per_step(records)
    table = Table(
        title="Entropy change per optimizer step", box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(records)
    )
    table.add_column("step", justify="right", no_wrap=True)
    # wide enough for "-1.234568e-03 ± 4.5e-09"; a message wraps inside
    table.add_column("ΔH ± SE", justify="right", min_width=20, max_width=24)
    table.add_column("δH₁ ± SE", justify="right", min_width=20, max_width=24)
    table.add_column("ESS", justify="right", no_wrap=True)
    table.add_column("η* from, to", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    for record in records:
        # Text, not str: a message such as "got [256, 48]" is no markup
        cells = [Text(cell) for cell in probe_cells(record)]
        if taken_point(record) is None:
            for words in cells[1:3]:
                words.justify = "left"
        table.add_row(*cells)
    return table


def sweep_table(record: Mapping[str, Any]) -> Table:
    """One row per step size of one measurement: ΔH and δH₁ with their errors, and what parts them.

    Args:
        record: one probe's record, or the results of an offline measurement.

    Returns:
        The table, for a console of rich's.
    """
    table = Table(
        title="Entropy change over step sizes", box=box.SIMPLE_HEAD, pad_edge=False, caption=_sweep_caption(record)
    )
    for name in SWEEP_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in sweep_cells(record):
        table.add_row(*cells)
    return table


def sweep_cells(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table over step sizes, one per η: :data:`SWEEP_COLUMNS`."""
    rows = []
    for point in record.get("sweep") or ():
        true, first_order = point.get("true"), point.get("first_order")
        value, predicted = number(true, "value"), number(first_order, "value")
        excess = value / predicted - 1 if predicted else math.nan
        rows.append(
            [
                f"{number(point, 'eta'):.3g}{' *' if point.get('taken') else ''}",
                with_error(value, number(true, "stderr")),
                with_error(predicted, number(first_order, "stderr")),
                DASH if math.isnan(excess) else f"{excess:+.2e}",
                _effective(true),
            ]
        )
    return rows


def attribution_table(record: Mapping[str, Any]) -> Group:
    """Who moved the entropy at one step, and what other losses would have done to it and to the reward.

    Args:
        record: one probe's record.

    Returns:
        To print: a table of the step's components, their standard errors over E and over the prompts of the U-batch, in
        nats of the step taken, with their share of δH₁; and one of the counterfactual losses, if the record has any.
    """
    step = "" if record.get("step") is None else f" of optimizer step {record['step']}"
    parts = Table(
        title=f"Who moved the entropy{step}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=attribution_caption(record) if record.get("attribution") else "no attribution recorded",
    )
    parts.add_column("")
    for name in ("nats ± SE over E", "SE over U", "of δH₁"):
        parts.add_column(name, justify="right", no_wrap=True)
    for name, *cells in attribution_cells(record):
        parts.add_row(Text(name), *cells)
    if not record.get("counterfactuals"):
        return Group(parts)
    others = Table(title="Under another loss", box=box.SIMPLE_HEAD, pad_edge=False)
    others.add_column("loss", overflow="fold")
    for name in ("ΔH ± SE", "minus the step's", "ΔJ ± SE"):
        others.add_column(name, justify="right", no_wrap=True)
    for name, *cells in counterfactual_cells(record):
        others.add_row(Text(name), *cells)
    return Group(parts, others)


def attribution_cells(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the components' table: name, nats of the step taken with the error over E, that over U, share."""
    whole = number(part(record, "first_order"), "value")
    rows = []
    for name, found in _parts(record):
        value, over_u = number(found, "value"), number(found, "stderr_u")
        error = DASH if math.isnan(over_u) else f"{over_u:.1e}"
        share = f"{round(100 * value / whole, 1) + 0.0:.1f} %" if whole and math.isfinite(value / whole) else DASH
        rows.append([name, with_error(value, number(found, "stderr")), error, share])
    return rows


def attribution_caption(record: Mapping[str, Any]) -> str | None:
    """What the remainder is made of, and why there is no error bar over U where there is none."""
    attribution = record.get("attribution") or {}
    remainder, over_u = attribution.get("remainder") or {}, attribution.get("over_u") or {}
    named = ", ".join(f"{name.replace('_', ' ')} {number(remainder, name):.1e}" for name in remainder)
    lines = [f"of the remainder, without error bars of their own: {named}"] if named else []
    lines += [f"no SE over U: {over_u['absent']}"] if over_u.get("absent") else []
    return "\n".join(lines) or None


def counterfactual_cells(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the other losses' table, the step taken first: name, ΔH, ΔH minus the step's, ΔJ."""
    rows = []
    for name, other in {"step taken": taken_point(record), **(record.get("counterfactuals") or {})}.items():
        estimates = [(other or {}).get(key) for key in ("true", "difference", "reward_true")]
        rows.append([name, *(with_error(number(item, "value"), number(item, "stderr")) for item in estimates)])
    return rows


def _parts(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """The rows of the components' table, in nats of the step taken, as far as the record has them."""
    rows: list[tuple[str, Mapping[str, Any] | None]] = [
        (name.replace("_", " "), part(record, name)) for name in ("momentum", "weight_decay", "gradient")
    ]
    # indented: the gradient's part once more, told apart (but for the remainder's rounding of θ)
    rows.append(("  tokens", part(record, "tokens")))
    rows += [(f"    of {words}", part(record, name)) for name, words in SIGNS.items()]
    rows += [("  remainder", part(record, "remainder")), ("δH₁", part(record, "first_order"))]
    empty = part(record, ZERO)
    shown = ((name, found) for name, found in rows if found is not empty or number(empty, "value"))
    return [(name, found) for name, found in shown if found and math.isfinite(number(found, "value"))]


def _sweep_caption(record: Mapping[str, Any]) -> str:
    entropy, law = record.get("entropy"), record.get("power_law")
    unit = str(record.get("normalize", "")).replace("_", " ")
    parts = [f"H = {number(entropy, 'value'):.4f} ± {number(entropy, 'stderr'):.1e} nats {unit}".rstrip()]
    parts.append(f"N = {number(entropy, 'n_sequences'):.0f}")
    parts.append(f"η* {eta_star_shown(record)}")
    if law:
        parts.append(f"log-log slope {number(law, 'slope'):.4f}, R² {number(law, 'r_squared'):.6f}")
    if any(point.get("taken") for point in record.get("sweep") or ()):
        parts.append("* the step " + ("of the learning rate" if record.get("kind") == "measurement" else "taken"))
    if any_untrustworthy(record.get("sweep") or ()):
        parts.append(f"{MARK} ΔH {UNTRUSTED}")
    return ", ".join(parts)


def with_error(value: float, stderr: float) -> str:
    """A value and its standard error, rounded at the same decimal place: ``-1.230e-03 ± 4.5e-05``.

    Args:
        value: the estimate; NaN gives a dash.
        stderr: its standard error, shown to two digits; where it is NaN or 0, the value gets four digits.
    """
    if math.isnan(value):
        return DASH
    if math.isnan(stderr):
        return f"{value:.3e} ± {DASH}"
    if stderr <= 0:
        return f"{value:.3e} ± 0"
    last_place = _exponent(stderr, 1) - 1  # of the error's second digit
    value = round(value, -last_place) + 0.0  # no negative zero
    digits = _exponent(value, 6) - last_place if value else 0
    return f"{value:.{min(max(digits, 0), 6)}e} ± {stderr:.1e}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten of ``value`` as printed with that many decimals."""
    return int(f"{value:.{digits}e}".split("e")[1])


def probe_cells(record: Mapping[str, Any]) -> list[str]:
    """One probe's row of the run's table: step, ΔH, δH₁, ESS, η*, reward; or step, status, message and dashes."""
    taken = taken_point(record)
    if taken is not None:
        true, first_order = taken.get("true"), taken.get("first_order")
        changes = [with_error(number(item, "value"), number(item, "stderr")) for item in (true, first_order)]
        changes = [change.replace(" ", "\N{NO-BREAK SPACE}") for change in changes]  # messages wrap, numbers do not
        effective = _effective(true)
    else:
        status = str(record.get("status"))
        changes = [status, record.get("message") or ("step taken not measured" if status == "ok" else "")]
        effective = DASH
    return [
        str(record["step"]),
        *changes,
        effective,
        eta_star_shown(record),
        _shown(record, "reward", ".3f"),
    ]


def _effective(estimate: Mapping[str, Any] | None) -> str:
    """Its effective sample size, marked where it is too small."""
    ess = number(estimate, "ess")
    return DASH if math.isnan(ess) else f"{ess:.0f}{MARK if untrustworthy(estimate) else ''}"


def eta_star_shown(record: Mapping[str, Any]) -> str:
    """η* as its confidence interval, ``0.031 to 0.052``, or ``≥ 0.012`` where curvature is not told from zero."""
    value, low, high = (number(record, f"eta_star{end}") for end in ("", "_ci_low", "_ci_high"))
    if math.isnan(low):
        return DASH if math.isnan(value) else f"about {value:.1g}"  # of an older record, which has no interval
    if math.isnan(high):
        return f"≥ {low:.2g}" if low > 0 else DASH
    return f"{low:.2g} to {high:.2g}" if low > 0 else f"≤ {high:.2g}"


def _shown(record: Mapping[str, Any], key: str, form: str) -> str:
    value = number(record, key)
    return DASH if math.isnan(value) else format(value, form)


def _caption(records: Sequence[Mapping[str, Any]]) -> str | None:
    if not records:
        return "no probes recorded"
    units = {record["normalize"] for record in records if record.get("normalize")}
    sizes = {number(record.get("entropy"), "n_sequences") for record in records if record.get("entropy")}
    parts = [f"entropies in nats {unit.replace('_', ' ')}" for unit in units if len(units) == 1]
    parts += [f"ESS out of {size:.0f}" for size in sizes if len(sizes) == 1 and not math.isnan(size)]
    parts += [f"{MARK} ΔH {UNTRUSTED}"] if any_untrustworthy(map(taken_point, records)) else []
    return ", ".join(parts) or None
