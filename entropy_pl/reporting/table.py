"""Probe records as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE, ZERO
from entropy_pl.records import AnyRecord, CounterfactualRecord, EstimateRecord, Record, number, probes_of
from entropy_pl.reporting.trust import UNTRUSTED, any_untrustworthy

DASH, MARK = "–", "!"
SWEEP_COLUMNS = ("η", "ΔH ± SE", "δH₁ ± SE", "ΔH/δH₁ − 1", "ESS")
SIGNS = {POSITIVE: "A > 0", NEGATIVE: "A < 0", ZERO: "A = 0"}


def probe_table(records: Sequence[AnyRecord]) -> Table:
    """One row per probed step, with ΔH and δH₁ at the step really taken.

    Args:
        records: probe records in the order they were written; steps probed twice show their latest record.

    Returns:
        A table of 100 columns at most. Rows without a measurement show their status and message instead.
    """
    probes = probes_of(records)
    table = Table(
        title="Entropy change per optimizer step", box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(probes)
    )
    table.add_column("step", justify="right", no_wrap=True)
    # wide enough for "-1.234568e-03 ± 4.5e-09"; a message wraps inside
    table.add_column("ΔH ± SE", justify="right", min_width=20, max_width=24)
    table.add_column("δH₁ ± SE", justify="right", min_width=20, max_width=24)
    table.add_column("ESS", justify="right", no_wrap=True)
    table.add_column("η* from, to", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    for record in probes:
        # Text, not str: a message such as "got [256, 48]" is no markup
        cells = [Text(cell) for cell in probe_cells(record)]
        if not record.taken:
            for words in cells[1:3]:
                words.justify = "left"
        table.add_row(*cells)
    return table


def sweep_table(record: AnyRecord) -> Table:
    """One row per step size of one measurement: ΔH and δH₁ with their errors, and what parts them.

    Args:
        record: one probe's record, or the results of an offline measurement.

    Returns:
        The table, for a console of rich's.
    """
    record = Record.of(record)
    table = Table(
        title="Entropy change over step sizes", box=box.SIMPLE_HEAD, pad_edge=False, caption=_sweep_caption(record)
    )
    for name in SWEEP_COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in sweep_cells(record):
        table.add_row(*cells)
    return table


def sweep_cells(record: Record) -> list[list[str]]:
    """Return the rows of the table over step sizes, one per η: :data:`SWEEP_COLUMNS`."""
    rows = []
    for point in record.sweep:
        value, predicted = number(point.true.value), number(point.first_order.value)
        excess = value / predicted - 1 if predicted else math.nan
        rows.append(
            [
                f"{number(point.eta):.3g}{' *' if point.taken else ''}",
                estimate_shown(point.true),
                estimate_shown(point.first_order),
                DASH if math.isnan(excess) else f"{excess:+.2e}",
                _effective(point.true),
            ]
        )
    return rows


def attribution_table(record: AnyRecord) -> Group:
    """Who moved the entropy at one step, and what other losses would have done to it and to the reward.

    Args:
        record: one probe's record.

    Returns:
        To print: a table of the step's components, their standard errors over E and over the prompts of the U-batch, in
        nats of the step taken, with their share of δH₁; and one of the counterfactual losses, if the record has any.
    """
    record = Record.of(record)
    step = "" if record.step is None else f" of optimizer step {record.step}"
    parts = Table(
        title=f"Who moved the entropy{step}",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        caption=attribution_caption(record) if record.attribution else "no attribution recorded",
    )
    parts.add_column("")
    for name in ("nats ± SE over E", "SE over U", "of δH₁"):
        parts.add_column(name, justify="right", no_wrap=True)
    for name, *cells in attribution_cells(record):
        parts.add_row(Text(name), *cells)
    if not record.counterfactuals:
        return Group(parts)
    others = Table(title="Under another loss", box=box.SIMPLE_HEAD, pad_edge=False)
    others.add_column("loss", overflow="fold")
    for name in ("ΔH ± SE", "minus the step's", "ΔJ ± SE"):
        others.add_column(name, justify="right", no_wrap=True)
    for name, *cells in counterfactual_cells(record):
        others.add_row(Text(name), *cells)
    return Group(parts, others)


def attribution_cells(record: Record) -> list[list[str]]:
    """Return the rows of the components' table: name, nats with the error over E, the error over U, share of δH₁."""
    whole = number(record.attribution.first_order.value)
    rows = []
    for name, found in _parts(record):
        value, over_u = number(found.value), number(found.stderr_u)
        error = DASH if math.isnan(over_u) else f"{over_u:.1e}"
        share = f"{round(100 * value / whole, 1) + 0.0:.1f} %" if whole and math.isfinite(value / whole) else DASH
        rows.append([name, estimate_shown(found), error, share])
    return rows


def attribution_caption(record: Record) -> str | None:
    """Return what the remainder is made of, and why there is no error bar over U where there is none."""
    remainder, over_u = record.attribution.remainder, record.attribution.over_u
    named = ", ".join(f"{name.replace('_', ' ')} {number(value):.1e}" for name, value in remainder.items())
    lines = [f"of the remainder, without error bars of their own: {named}"] if named else []
    lines += [f"no SE over U: {over_u.absent}"] if over_u.absent else []
    return "\n".join(lines) or None


def counterfactual_cells(record: Record) -> list[list[str]]:
    """Return the rows of the other losses' table, the step taken first: name, ΔH, ΔH minus the step's, ΔJ."""
    taken = CounterfactualRecord(true=record.taken.true, reward_true=record.taken.reward_true)
    return [
        [name, estimate_shown(other.true), estimate_shown(other.difference), estimate_shown(other.reward_true)]
        for name, other in {"step taken": taken, **record.counterfactuals}.items()
    ]


def _parts(record: Record) -> list[tuple[str, EstimateRecord]]:
    """Return the rows of the components' table, in nats of the step taken, as far as the record has them."""
    found = record.attribution
    rows = [
        ("momentum", found.momentum),
        ("weight decay", found.weight_decay),
        ("gradient", found.gradient),
        # indented: the gradient's part once more, in parts (but for the remainder's rounding of θ)
        ("  tokens", found.tokens),
        *((f"    of {words}", found.part(name)) for name, words in SIGNS.items()),
        ("  remainder", found.remainder_sum),
        ("δH₁", found.first_order),
    ]
    empty = found.part(ZERO)
    shown = ((name, part) for name, part in rows if part is not empty or number(empty.value))
    return [(name, part) for name, part in shown if part.value is not None]


def _sweep_caption(record: Record) -> str:
    entropy, law = record.entropy, record.power_law
    unit = (record.normalize or "").replace("_", " ")
    parts = [f"H = {number(entropy.value):.4f} ± {number(entropy.stderr):.1e} nats {unit}".rstrip()]
    parts.append(f"N = {number(entropy.n_sequences):.0f}")
    parts.append(f"η* {eta_star_shown(record)}")
    if law:
        parts.append(f"log-log slope {number(law.slope):.4f}, R² {number(law.r_squared):.6f}")
    if any(point.taken for point in record.sweep):
        parts.append("* the step " + ("of the learning rate" if record.is_measurement else "taken"))
    if any_untrustworthy(record.sweep):
        parts.append(f"{MARK} ΔH {UNTRUSTED}")
    return ", ".join(parts)


def estimate_shown(estimate: EstimateRecord) -> str:
    """Return an estimate as :func:`with_error` shows it."""
    return with_error(number(estimate.value), number(estimate.stderr))


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


def probe_cells(record: Record) -> list[str]:
    """Return one probe's row of the run's table: step, ΔH, δH₁, ESS, η*, reward; or status, message and dashes."""
    taken = record.taken
    if taken:
        changes = [estimate_shown(taken.true), estimate_shown(taken.first_order)]
        changes = [change.replace(" ", "\N{NO-BREAK SPACE}") for change in changes]  # messages wrap, numbers do not
    else:
        changes = [record.status, record.message or ("step taken not measured" if record.is_ok else "")]
    reward = number(record.reward)
    return [
        str(record.step),
        *changes,
        _effective(taken.true),
        eta_star_shown(record),
        DASH if math.isnan(reward) else f"{reward:.3f}",
    ]


def _effective(estimate: EstimateRecord) -> str:
    """Return its effective sample size, marked where it is too small."""
    ess = number(estimate.ess)
    return DASH if math.isnan(ess) else f"{ess:.0f}{MARK if estimate.untrustworthy else ''}"


def eta_star_shown(record: Record) -> str:
    """Return η* as its confidence interval, ``0.031 to 0.052``, or ``≥ 0.012`` where it has no upper end."""
    low, high = number(record.eta_star_ci_low), number(record.eta_star_ci_high)
    if math.isnan(low):  # of an older record, which has no interval
        return DASH if record.eta_star is None else f"about {record.eta_star:.1g}"
    if math.isnan(high):
        return f"≥ {low:.2g}" if low > 0 else DASH
    return f"{low:.2g} to {high:.2g}" if low > 0 else f"≤ {high:.2g}"


def _caption(records: Sequence[Record]) -> str | None:
    if not records:
        return "no probes recorded"
    units = {record.normalize for record in records if record.normalize}
    sizes = {number(record.entropy.n_sequences) for record in records if record.entropy}
    parts = [f"entropies in nats {unit.replace('_', ' ')}" for unit in units if len(units) == 1]
    parts += [f"ESS out of {size:.0f}" for size in sizes if len(sizes) == 1 and not math.isnan(size)]
    parts += [f"{MARK} ΔH {UNTRUSTED}"] if any_untrustworthy(record.taken for record in records) else []
    return ", ".join(parts) or None
