"""Probe records as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from entropy_pl.reporting.records import latest_per_step, number, taken_point

DASH = "–"


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
    table.add_column("η* ± SE", justify="right", no_wrap=True)
    table.add_column("reward", justify="right", no_wrap=True)
    for record in records:
        # Text, not str: a message such as "got [256, 48]" is no markup
        cells = [Text(cell) for cell in _cells(record)]
        if taken_point(record) is None:
            for words in cells[1:3]:
                words.justify = "left"
        table.add_row(*cells)
    return table


def sweep_table(record: Mapping[str, Any]) -> Table:
    """One row per step size of one measurement: ΔH and δH₁ with their errors, and what parts them.

    Args:
        record: one probe's record, or the results of an offline measurement.
    """
    table = Table(
        title="Entropy change over step sizes", box=box.SIMPLE_HEAD, pad_edge=False, caption=_sweep_caption(record)
    )
    for name in ("η", "ΔH ± SE", "δH₁ ± SE", "ΔH/δH₁ − 1", "ESS"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in record.get("sweep") or ():
        true, first_order = point.get("true"), point.get("first_order")
        value, predicted = number(true, "value"), number(first_order, "value")
        excess = value / predicted - 1 if predicted else math.nan
        ess = number(true, "ess")
        table.add_row(
            f"{number(point, 'eta'):.3g}{' *' if point.get('taken') else ''}",
            with_error(value, number(true, "stderr")),
            with_error(predicted, number(first_order, "stderr")),
            DASH if math.isnan(excess) else f"{excess:+.2e}",
            DASH if math.isnan(ess) else f"{ess:.0f}",
        )
    return table


def _sweep_caption(record: Mapping[str, Any]) -> str:
    entropy, law = record.get("entropy"), record.get("power_law")
    unit = str(record.get("normalize", "")).replace("_", " ")
    parts = [f"H = {number(entropy, 'value'):.4f} ± {number(entropy, 'stderr'):.1e} nats {unit}".rstrip()]
    parts.append(f"N = {number(entropy, 'n_sequences'):.0f}")
    parts.append(f"η* = {_shown(record, 'eta_star', '.1e', error='eta_star_stderr')}")
    if law:
        parts.append(f"log-log slope {number(law, 'slope'):.4f}, R² {number(law, 'r_squared'):.6f}")
    if any(point.get("taken") for point in record.get("sweep") or ()):
        parts.append("* the step " + ("of the learning rate" if record.get("kind") == "measurement" else "taken"))
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


def _cells(record: Mapping[str, Any]) -> list[str]:
    taken = taken_point(record)
    if taken is not None:
        true, first_order = taken.get("true"), taken.get("first_order")
        changes = [with_error(number(item, "value"), number(item, "stderr")) for item in (true, first_order)]
        changes = [change.replace(" ", "\N{NO-BREAK SPACE}") for change in changes]  # messages wrap, numbers do not
        ess = number(true, "ess")
        effective = DASH if math.isnan(ess) else f"{ess:.0f}"
    else:
        status = str(record.get("status"))
        changes = [status, record.get("message") or ("step taken not measured" if status == "ok" else "")]
        effective = DASH
    return [
        str(record["step"]),
        *changes,
        effective,
        _shown(record, "eta_star", ".0e", error="eta_star_stderr"),
        _shown(record, "reward", ".3f"),
    ]


def _shown(record: Mapping[str, Any], key: str, form: str, error: str | None = None) -> str:
    value = number(record, key)
    if math.isnan(value):
        return DASH
    stderr = math.nan if error is None else number(record, error)
    return format(value, form) + ("" if math.isnan(stderr) else f"±{stderr:{form}}")


def _caption(records: Sequence[Mapping[str, Any]]) -> str | None:
    if not records:
        return "no probes recorded"
    units = {record["normalize"] for record in records if record.get("normalize")}
    sizes = {number(record.get("entropy"), "n_sequences") for record in records if record.get("entropy")}
    parts = [f"entropies in nats {unit.replace('_', ' ')}" for unit in units if len(units) == 1]
    parts += [f"ESS out of {size:.0f}" for size in sizes if len(sizes) == 1 and not math.isnan(size)]
    return ", ".join(parts) or None
