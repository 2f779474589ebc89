"""The sections of a run's page, each a list of its parts: paragraphs, points, pictures, tables, links."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from entropy_pl.records import EstimateRecord, Json, Record, TokenRecord, latest_per_step, number
from entropy_pl.reporting.attributed import NO_TOKEN_ERRORS, AttributedTokens
from entropy_pl.reporting.attribution_figures import (
    components_figure,
    exchange_rate_figure,
    influence_scatter_figure,
    influence_share_figure,
)
from entropy_pl.reporting.figures import delta_entropy_figure, eta_sweep_figure, units_of
from entropy_pl.reporting.page import minus, signed
from entropy_pl.reporting.page_images import picture
from entropy_pl.reporting.run_figures import (
    calibration_figure,
    ess_figure,
    step_size_figure,
    training_figure,
)
from entropy_pl.reporting.run_folder import RunFolder
from entropy_pl.reporting.table import (
    DASH,
    SWEEP_COLUMNS,
    attribution_caption,
    attribution_cells,
    counterfactual_cells,
    estimate_shown,
    probe_cells,
    sweep_cells,
)
from entropy_pl.reporting.trust import UNTRUSTED, any_untrustworthy, warnings_by_text
from entropy_pl.reporting.visible_text import shortened, visible
from entropy_pl.version import __version__

SWEEPS = 8  # sweeps of step sizes that are drawn, the last one unfolded
ROWS = 200  # of any table or list
LINKS = 60  # pages of attributed tokens that are linked to
MESSAGE = 600  # characters of a message
OF_CONFIG = {  # and what the run's config says of the run
    "policy": ("model.policy.name", "checkpoint.checkpoint_path"),
    "data": ("data.dataset", "batch_config.dataset_name"),
    "advantage": ("model.advantage", "advantage"),
    "loss": ("model.loss_type", "loss_type"),
    "optimizer": ("model.optimizer.class_path",),
    "steps to take": ("trainer.max_steps",),
    "seed": ("seed_everything", "seed"),
}


def sections_of(run: RunFolder, home: Path) -> dict[str, Callable[[], list[Json]]]:
    """The page's headings in their order, each with what makes its parts.

    Args:
        run: as :func:`.read_run` found it; an offline measurement has nothing over steps.
        home: folder of the page, for its links.
    """
    over_steps: dict[str, Callable[[], list[Json]]] = {
        "Reward and entropy": partial(_training, run),
        "Entropy change per step": partial(_changes, run),
        "ΔH against δH₁": partial(_calibration, run),
        "How far first order reaches": partial(_reach, run),
        "Effective sample size": partial(_effective, run),
    }
    return {
        "What was run": partial(_what_was_run, run),
        **({} if run.is_measurement else over_steps),
        "Step sizes": partial(_sweeps, run),
        "Who moved the entropy": partial(_causes, run, home),
        "What went wrong": partial(_failures, run),
        "Time": partial(_time, run),
    }


def _probes(run: RunFolder) -> list[Record]:
    """The run as it finally went, or the one measurement."""
    return run.records if run.is_measurement else latest_per_step(run.records)


def _measured(run: RunFolder) -> list[Record]:
    return [record for record in _probes(run) if record.is_ok and record.sweep]


# --------------------------------------------------------------------------------------------------------- what was run


def _what_was_run(run: RunFolder) -> list[Json]:
    probes, measured = _probes(run), _measured(run)
    rows = [("folder", str(run.path))]
    rows += [(name, found) for name, keys in OF_CONFIG.items() if (found := _looked_up(run.config, keys)) is not None]
    if probes and not run.is_measurement:
        counts = Counter(record.status for record in probes)
        rows.append(
            ("probes", f"{len(probes)}, of which " + ", ".join(f"{n} {status}" for status, n in counts.items()))
        )
        rows.append(("optimizer steps", f"{probes[0].step} to {probes[-1].step}"))
    rates = [record.lr for record in probes if record.lr is not None]
    if rates:
        low, high = f"{min(rates):.3g}", f"{max(rates):.3g}"
        rows.append(("learning rate", low if low == high else f"{low} to {high}"))
    rows += _of_a_probe(measured[-1]) if measured else []
    versions = dict(probes[-1].versions) if probes else {}
    name, is_version, version = run.config_text.partition("\n")[0].removeprefix("# ").partition("==")
    if is_version:  # Lightning's note above its config
        versions.setdefault(name, version)
    if versions:
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    rows.append(("page drawn by", f"entropy_pl {__version__}"))
    parts = [
        _list(_in_short(run)),
        _table([], [[name, shortened(value, MESSAGE)] for name, value in rows], "name value"),
    ]
    if run.config_text:
        lines = "\n".join(visible(line) for line in run.config_text.split("\n"))
        parts.append({"folded": "the whole config", "open": False, "parts": [{"verbatim": lines}]})
    return parts


def _of_a_probe(record: Record) -> list[tuple[str, str]]:
    entropy, prompts = record.entropy, record.e_prompts
    batch = f"{number(entropy.n_sequences):.0f} completions, {number(entropy.n_tokens):.0f} tokens"
    batch += f", of {prompts.count} prompts" if prompts.count is not None else ""
    batch += f", {prompts.in_u} of which the run trains on" if prompts.in_u else ""
    rows = [("E-batch", batch)]
    if record.lr is not None and record.lr > 0:
        multiples = ", ".join(_short(number(point.eta) / record.lr) for point in record.sweep)
        rows.append(("step sizes η", f"learning rate × {multiples}"))
    return rows + [(words, text) for words, text in _settings(record).items() if text is not None]


def _settings(record: Record) -> dict[str, str | None]:
    """Return what a record says of how it was measured; None where it does not say."""
    return {
        "entropies are": None if record.normalize is None else f"in nats {record.normalize.replace('_', ' ')}",
        "importance weights": record.weighting,
        "integrand": record.integrand,
        "baseline": record.baseline,
        "tangents by": record.method,
        "confidence level": _plain(record.confidence),
        "temperature": _plain(record.temperature),
        "precision": record.precision,
        "log-weights clipped at": _plain(record.clip_log_weight),
        "processes": _plain(record.processes),
        "device": record.device,
    }


def _plain(value: float | None) -> str | None:
    return f"{value:g}" if isinstance(value, float) else None if value is None else str(value)


def _in_short(run: RunFolder) -> list[str]:
    """What a reader in a hurry should know."""
    measured = _measured(run)
    wrong = len(run.damaged) + sum(not record.is_ok for record in run.records)
    last_words = [f"{wrong} things went wrong, or were skipped: see “What went wrong”."] if wrong else []
    if not measured:
        return ["No probe has measured an entropy change.", *last_words]
    first, last = measured[0], measured[-1]
    words = f"Entropy {_with_stderr(first.entropy)} {units_of(measured)}"
    if len(measured) > 1:
        words += f" before step {first.step}, {_with_stderr(last.entropy)} before step {last.step}"
    points = [f"{words} (± one standard error)."]
    if len(measured) == 1 and (point := first.taken):
        points.append(
            f"A step of η = {number(point.eta):.3g} changes it by ΔH = {minus(estimate_shown(point.true))}, to first "
            f"order by δH₁ = {minus(estimate_shown(point.first_order))}."
        )
    ended = _ended_early(run)
    points += [ended] if ended else []
    believed = [record.taken.true for record in measured if not record.taken.true.untrustworthy]
    lowered = sum(number(true.ci_high) < 0 for true in believed)
    raised = sum(number(true.ci_low) > 0 for true in believed)
    known = sum(true.value is not None for true in believed)
    if known > 1:
        points.append(
            f"Of {known} steps measured, {lowered} lowered the entropy and {raised} raised it, their intervals clear "
            f"of zero; of {known - lowered - raised} the sign is not known."
        )
    reaches = [number(record.lr) / low for record in measured if (low := number(record.eta_star_ci_low)) > 0]
    if reaches:
        points.append(
            f"The learning rate was at most {_short(max(reaches), 2)} times η*, where the second order is as large as "
            "the first (by the lower ends of η*'s intervals)."
        )
    fractions = [fraction for record in measured if math.isfinite(fraction := record.taken.ess_fraction)]
    if fractions:
        points.append(f"Effective sample size at the steps taken: at least {min(fractions):.3g} of N.")
    doubted = [str(record.step) for record in measured if any_untrustworthy(record.sweep)]
    if doubted:
        points.append(f"At some step size ΔH is {UNTRUSTED}, at {_listed(doubted)}.")
    return points + last_words


def _ended_early(run: RunFolder) -> str | None:
    """Where the config names more steps than the records and the log know of."""
    wanted = _looked_up(run.config, OF_CONFIG["steps to take"])
    known = [record.step for record in _probes(run) if record.step is not None]
    known += [int(steps[-1]) for steps, _ in run.curves.values() if len(steps)]
    if wanted is None or not wanted.isdigit() or not known or max(known) + 1 >= int(wanted):
        return None
    return f"{wanted} steps were to be taken; the last that records or logs know of is step {max(known)}."


# ------------------------------------------------------------------------------------------------------- over the steps


def _training(run: RunFolder) -> list[Json]:
    logged = ", ".join(f"{name} ({len(steps)} points)" for name, (steps, _) in run.curves.items())
    logged = f"From the run's log: {logged}." if logged else "No reward or entropy logged by the trainer was found."
    return [
        picture(partial(training_figure, run.records, run.curves), "Mean reward and entropy over the steps"),
        paragraph(
            "The probe's values are those before the step, on prompts of its own, with confidence bands. "
            f"{logged} A training batch's entropy is on other prompts, by the trainer's own definition."
        ),
    ]


def _changes(run: RunFolder) -> list[Json]:
    probes = _probes(run)
    rows = [[minus(shortened(cell, 80)) for cell in probe_cells(record)] for record in probes]
    columns = ["step", "ΔH ± SE", "δH₁ ± SE", "ESS", "η* from, to", "reward"]
    return [
        picture(partial(delta_entropy_figure, probes), "ΔH and δH₁ of the steps taken, with confidence bands"),
        paragraph(
            "ΔH is the true change of the entropy by the step the optimizer took, δH₁ what its gradient promised. Both "
            "are made of the same samples and share their noise: where they agree, the step was in the linear regime; "
            "how right they are, the bands say."
        ),
        {"folded": "the numbers", "open": False, "parts": [_table(columns, rows, counted="probes")]},
    ]


def _calibration(run: RunFolder) -> list[Json]:
    return [
        picture(partial(calibration_figure, run.records), "ΔH against δH₁ of every step, and their gap"),
        paragraph(
            "On the diagonal the entropy was straight along the step. The points lie closer to it than their error "
            "bars are long, because both numbers have the same noise: the gap is curvature, and no test of either "
            "number. Beyond one standard error (dotted) curvature matters more than the noise of the samples."
        ),
    ]


def _reach(run: RunFolder) -> list[Json]:
    return [
        picture(partial(step_size_figure, run.records), "η* and the learning rate over the optimizer steps"),
        paragraph(
            "η* is the step size at which the second order has grown as large as the first. Far below it, first-order "
            "theory of the entropy describes the run; near it, it does not. Where curvature is not told from zero, the "
            "interval has no upper end, and its lower end is what is known."
        ),
    ]


def _effective(run: RunFolder) -> list[Json]:
    return [
        picture(partial(ess_figure, run.records), "Effective sample size over N at every probed step"),
        paragraph("How much of the E-batch the importance weights leave. Near 0 an estimate rests on a few sequences."),
    ]


def _sweeps(run: RunFolder) -> list[Json]:
    measured = _measured(run)
    if not measured:
        return [paragraph("No sweep of step sizes was measured.")]
    chosen = np.unique(np.linspace(0, len(measured) - 1, min(SWEEPS, len(measured))).round().astype(int)).tolist()
    parts = []
    if len(measured) > len(chosen):
        parts.append(paragraph(f"{len(chosen)} of {len(measured)} sweeps, evenly spread from the first to the last."))
    for index in chosen:
        record = measured[index]
        name = "the update" if record.step is None else f"step {record.step}"
        drawing = picture(partial(eta_sweep_figure, record), f"Entropy change against the step size, {name}")
        rows = _table(list(SWEEP_COLUMNS), _with_minus(sweep_cells(record)), counted="step sizes")
        parts.append({"folded": name, "open": index == chosen[-1], "parts": [drawing, rows]})
    return parts


# ------------------------------------------------------------------------------------------------ who moved the entropy


def _causes(run: RunFolder, home: Path) -> list[Json]:
    probes = _probes(run)
    parts: list[Json] = []
    attributed = [record for record in probes if record.attribution]
    if attributed:
        if not run.is_measurement:
            drawing = partial(components_figure, probes)
            parts.append(picture(drawing, "Parts of the first-order change over the steps"))
        parts += _of_one_step(run, attributed[-1])
    if run.token_pages:
        parts.append(_links(run, home))
    if any(record.exchange_rate for record in probes) and not run.is_measurement:
        parts.append(paragraph("The price of reward: ΔH against ΔJ, and their ratio over the steps.", faint=False))
        parts.append(picture(partial(exchange_rate_figure, probes), "ΔH against ΔJ, and their ratio over the steps"))
    compared = [record for record in probes if record.counterfactuals]
    if compared:
        columns = ["loss", "ΔH ± SE", "minus the step's", "ΔJ ± SE"]
        rows, heading = counterfactual_cells(compared[-1]), f"Under another loss{_at_step(compared[-1])}"
        parts.append(_table(columns, _with_minus(rows), "words", heading=heading, counted="losses"))
    predicted = [record for record in probes if record.predictors]
    if predicted:
        parts.append(_predictors(predicted[-1]))
    reasons: dict[str, list[str]] = {}
    for record in probes:
        for name, why in record.absent.items():
            reasons.setdefault(shortened(f"{name}: {why}", MESSAGE), []).append(str(record.step))
    if reasons:
        parts.append(paragraph("What was asked for and is not there:", faint=False))
        parts.append(_list([f"{reason} ({_listed(steps)})" for reason, steps in reasons.items()]))
    return parts or [paragraph("No probe has attributed an entropy change.")]


def _of_one_step(run: RunFolder, record: Record) -> list[Json]:
    """Components and tokens of the last step that was attributed."""
    columns, heading = ["part of the step", "nats ± SE over E", "SE over U", "of δH₁"], f"The parts{_at_step(record)}"
    rows = _with_minus(attribution_cells(record))
    table = _table(columns, rows, "words", heading=heading, counted="parts")
    parts = [{**table, "below": visible(attribution_caption(record) or "")}]
    top = record.attribution.top_tokens
    if top:
        columns = ["before it, and the token", "nats ± SE over E", "π", "H", "A", "completion"]
        rows, heading = [_token_row(token) for token in top], f"The tokens that moved it most{_at_step(record)}"
        table = _table(columns, rows, "words", heading=heading, counted="tokens")
        known = any(token.stderr is not None for token in top)
        parts.append({**table, "below": table["below"] if known else NO_TOKEN_ERRORS})
    file = run.token_files.get(record.step)
    if file is None:
        return parts
    try:
        tokens = AttributedTokens.load(file)
    except (OSError, ValueError) as error:
        return [*parts, paragraph(shortened(str(error), MESSAGE), faint=False)]
    share, scatter = partial(influence_share_figure, tokens), partial(influence_scatter_figure, tokens)
    return [
        *parts,
        picture(share, "The tokens' part by advantage and probability", scrolls=True),
        picture(scatter, "Every token's influence against its log-prob and advantage", scrolls=True),
    ]


def _token_row(token: TokenRecord) -> list[Any]:
    error = "" if token.stderr is None else f" ± {token.stderr:.1e}"
    return [
        {"before": visible(token.context or ""), "marked": visible(shortened(token.text or "", 40))},
        signed(number(token.value)) + error,
        _short(math.exp(number(token.logp))),
        _short(number(token.entropy)),
        DASH if token.advantage is None else minus(f"{token.advantage:+.2f}"),
        f"{number(token.sequence) + 1:.0f}, token {number(token.position) + 1:.0f}",
    ]


def _links(run: RunFolder, home: Path) -> Json:
    links = []
    for step, file in list(run.token_pages.items())[-LINKS:]:
        relative = os.path.relpath(file.absolute(), home.absolute()).replace(os.sep, "/")
        links.append(
            {"address": quote(os.fsencode(relative)), "words": "the update" if step is None else f"step {step}"}
        )
    left_out = len(run.token_pages) - len(links)
    more = f", and {left_out} earlier ones beside them." if left_out else "."
    return {"before": "Pages with every token coloured by what it did:", "links": links, "after": more}


def _predictors(record: Record) -> Json:
    rows = []
    for name, found in record.predictors.items():
        values = (found.pearson, found.spearman, found.step_pearson, found.step_spearman)
        rows.append([name, *(DASH if value is None else minus(f"{value:.2f}") for value in values)])
    heading = f"How published predictors agree with it{_at_step(record)}"
    columns = ["predictor", "r, tokens", "ρ, tokens", "r, steps", "ρ, steps"]
    table = _table(columns, rows, "words", heading=heading, counted="predictors")
    below = "Correlations with the tokens' values at that step, and with ΔH/lr over the steps so far."
    return {**table, "below": below}


# ------------------------------------------------------------------------------------------------ what went wrong, time


def _failures(run: RunFolder) -> list[Json]:
    parts: list[Json] = []
    groups: dict[tuple[str, str], list[str]] = {}
    for record in run.records:
        if not record.is_ok:
            message = shortened(record.message or DASH, MESSAGE)
            groups.setdefault((record.status, message), []).append(str(record.step))
    if groups:
        rows = [[_listed(steps), status, message] for (status, message), steps in groups.items()]
        parts.append(_table(["probe of", "status", "message"], rows, "value name value", counted="messages"))
    if run.damaged:
        parts.append(paragraph(f"{len(run.damaged)} things could not be read, and are not on this page:", faint=False))
        parts.append(_list([shortened(line, MESSAGE) for line in run.damaged]))
    if warned := warnings_by_text(_probes(run)):
        rows = [[_listed([str(step) for step in steps]), shortened(text, MESSAGE)] for text, steps in warned.items()]
        parts.append(_table(["probe of", "warning"], rows, "value value", counted="warnings"))
    return parts or [paragraph("Nothing: every probe gave a result, and every line of the records could be read.")]


def _time(run: RunFolder) -> list[Json]:
    probes = _probes(run)
    phases: dict[str, list[float]] = {}
    for record in probes:
        for phase, seconds in (record.seconds or record.timing).items():
            if math.isfinite(number(seconds)):
                phases.setdefault(phase, []).append(number(seconds))
    if not phases:
        return [paragraph("No times were recorded.")]
    rows = [
        [name.replace("_", " "), _short(statistics.median(spent)), f"{sum(spent):.4g}"]
        for name, spent in phases.items()
    ]
    table = _table(["phase", "seconds, median of a probe", "in all"], rows, "words", counted="phases")
    overheads = [record.overhead for record in probes if record.overhead is not None]
    if len(overheads) > 1:  # the first probe's is divided by the time before it, which is next to none
        table["below"] = f"The probes took {overheads[-1]:.2g} times as long as the rest of the run between them."
    return [table]


# ---------------------------------------------------------------------------------------------------------------- parts


def paragraph(words: str, *, faint: bool = True) -> Json:
    """A paragraph, in grey unless told; characters that cannot be seen become visible."""
    return {"text": visible(words), "faint": faint}


def _list(points: Sequence[str]) -> Json:
    more = [f"… and {len(points) - ROWS} more"] if len(points) > ROWS else []
    return {"points": [visible(point) for point in [*points[:ROWS], *more]]}


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], kinds: str = "", *, heading: str = "", counted: str = "rows"
) -> Json:
    """The last rows of a table; ``kinds`` are the classes of its columns, ``counted`` what the rows are."""
    width = max(len(row) for row in [columns, *rows])
    shown = [[visible(cell) if isinstance(cell, str) else cell for cell in row] for row in rows[-ROWS:]]
    below = f"The last {ROWS} of {len(rows)} {counted}." if len(rows) > ROWS else ""
    kinds_of = [*kinds.split(), *[""] * width][:width]
    return {"columns": columns, "rows": shown, "kinds": kinds_of, "below": below, "heading": visible(heading)}


def _with_minus(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[row[0], *map(minus, row[1:])] for row in rows]


def _with_stderr(estimate: EstimateRecord) -> str:
    value, stderr = number(estimate.value), number(estimate.stderr)
    places = 1 - math.floor(math.log10(stderr)) if stderr > 0 else 4  # the second digit of the error
    return f"{value:.{max(places, 0)}f} ± {stderr:.{max(places, 0)}f}"


def _short(value: float, digits: int = 3) -> str:
    return DASH if math.isnan(value) else f"{value:.{digits}g}"


def _at_step(record: Record) -> str:
    return "" if record.step is None else f", step {record.step}"


def _listed(steps: Iterable[str], most: int = 12) -> str:
    """``step 5``, or ``steps 5, 10 and 3 more``."""
    steps = list(steps)
    more = f" and {len(steps) - most} more" if len(steps) > most else ""
    return f"step{'s' if len(steps) > 1 else ''} {', '.join(steps[:most])}{more}"


def _looked_up(config: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that the config has a plain value of, sections separated by dots."""
    for key in keys:
        value: Any = config
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, str | int | float):  # a few lines of YAML's aliases make lists of billions
            return str(value)
    return None
