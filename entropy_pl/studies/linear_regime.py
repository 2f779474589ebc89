"""How far the straight line reaches: ΔH(η) beside η·δH₁ over decades of η, over seeds, in float64 and in float32."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pandas as pd

from entropy_pl.estimators import fit_power_law, linear_coefficient, ratio
from entropy_pl.estimators.estimate import TRUSTED_ESS
from entropy_pl.measurements import EntropyMeasurements
from entropy_pl.measurements.settings import PrecisionSettings
from entropy_pl.probe import Precision, ProbeResult, timed
from entropy_pl.progress import progress
from entropy_pl.studies.figures import deviation_figure, power_law_figure
from entropy_pl.studies.folder import Row, StudyFolder
from entropy_pl.studies.report import Report
from entropy_pl.studies.stored import drawn_once
from entropy_pl.studies.study import Study, StudyOutcome, StudySettings, advance_by_phase

NAME = "linear-regime"
LINEAR = 0.01  # of η*: there curvature takes 1 % of the straight line

COLUMNS = {
    "seed": "of prompts and completions",
    "precision": "of the forward passes",
    "eta": "η, step size along v",
    "delta_h": "ΔH(η) by importance sampling, nats",
    "delta_h_stderr": "its standard error, nats",
    "delta_h_ci_low": "lower end of its confidence interval, nats",
    "delta_h_ci_high": "upper end, nats",
    "delta_h1": "η·δH₁, nats",
    "delta_h1_stderr": "its standard error, nats",
    "relative_deviation": "ΔH/(η·δH₁) − 1",
    "relative_deviation_stderr": "its standard error: the noise that the pair does not share",
    "second_order_prediction": "η·δH₁ + η²/2 · v'∇²Hv, nats",
    "symmetric_first": "[ΔH(η) − ΔH(−η)]/2η, nats per unit η, where ±η were measured",
    "symmetric_second": "[ΔH(η) + ΔH(−η)]/η², nats per unit η², likewise",
    "ess": "effective sample size of the sequence weights",
    "max_abs_log_weight": "largest absolute log importance weight in use",
}
FIT_COLUMNS = {
    "seed": "of prompts and completions",
    "precision": "of the forward passes",
    "fit_from": "smallest η in the fits",
    "fit_to": "largest η in the fits",
    "n_points": "points on the log-log line",
    "n_left_out": "points in that range that are not on it: zero, or of the other sign",
    "loglog_slope": "slope of log |ΔH| over log η",
    "r_squared": "of that line",
    "slope": "a of the fit ΔH/η = a + bη, nats per unit η: the measured slope at η = 0",
    "first_order": "δH₁, nats per unit η",
    "first_order_stderr": "its standard error: of both, since slope and first order share their noise",
    "first_order_deviation": "first_order/slope − 1",
    "second_order": "v'∇²Hv, nats per unit η²",
    "second_order_stderr": "its standard error",
    "eta_star": "η* = 2|δH₁|/|v'∇²Hv|",
    "eta_star_ci_low": "lower end of its interval (Fieller's set)",
    "eta_star_ci_high": "upper end; empty where it is unbounded: the curvature is not told from zero",
    "symmetric_first": "[ΔH(η) − ΔH(−η)]/2η at η = fit_to, nats per unit η, where ±η were measured",
    "symmetric_first_stderr": "its standard error",
    "symmetric_second": "[ΔH(η) + ΔH(−η)]/η² at η = fit_to, nats per unit η², likewise",
    "symmetric_second_stderr": "its standard error",
}


@dataclass(frozen=True)
class LinearRegimeOptions:
    """What is repeated, and where the fits are made.

    Args:
        seeds: of prompts and completions: every one draws an E- and a U-batch of its own.
        precisions: of the forward passes that score; every one scores the same batches along the same v.
        fit_min: smallest η in the fits. None: no bound.
        fit_max: largest η in the fits. None: 1 % of η*, where curvature takes 1 % of the straight line.
    """

    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    precisions: list[Precision] = field(default_factory=lambda: ["float64", "float32"])
    fit_min: float | None = None
    fit_max: float | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "precisions"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"expected study.{name} to be at least one, each once, got {values}")
        if min(self.seeds) < 0:
            raise ValueError(f"expected study.seeds of at least 0, got {min(self.seeds)}")
        low, high = self.fit_range(math.inf)
        if not 0 <= low < high:
            raise ValueError(
                f"expected 0 <= study.fit_min < study.fit_max, got fit_min={self.fit_min} and fit_max={self.fit_max}"
            )

    def fit_range(self, eta_star: float) -> tuple[float, float]:
        """Bounds on the η of the fits."""
        high = LINEAR * eta_star if self.fit_max is None else self.fit_max
        return 0.0 if self.fit_min is None else self.fit_min, high


@dataclass(frozen=True)
class LinearRegimeSettings(StudySettings):
    """A measurement's settings, and which seeds and precisions to repeat it in.

    Args:
        study: the linear-regime study's own.
    """

    study: LinearRegimeOptions = field(default_factory=LinearRegimeOptions)


def run_linear_regime(settings: LinearRegimeSettings, *, progress_bar: bool = True) -> StudyOutcome:
    """Measure every seed in every precision, or what of that is missing, and report.

    Args:
        settings: of the study.
        progress_bar: show one, with the time left; never without a terminal.

    Raises:
        ValueError: as :meth:`EntropyMeasurements.run_experiments`, or if the folder is another study's.
    """
    folder = StudyFolder(NAME, settings)
    measurements = EntropyMeasurements(settings)
    cells = {
        (seed, precision): f"seed {seed}, {precision}"
        for seed in settings.study.seeds
        for precision in settings.study.precisions
    }
    missing = {key: cell for key, cell in cells.items() if cell not in folder}
    passes = settings.probe().passes(lr=1.0)
    total = measurements.draw_passes * len({seed for seed, _ in missing}) + passes * len(missing)
    with progress(NAME, total, "pass", shown=progress_bar) as bar:
        advance = advance_by_phase(bar)
        for (seed, precision), cell in missing.items():
            seconds: dict[str, float] = {}
            with timed(seconds, "cell"):
                of_seed = replace(settings, seed=seed)
                drawn = drawn_once(
                    folder.path / f"drawn_seed{seed}.safetensors", measurements, of_seed, on_pass=advance
                )
                scoring = replace(of_seed, precision=_scoring_in(precision, settings.precision))
                scores = measurements.score(drawn, scoring, on_pass=advance)
                result = scoring.probe().reduce(scores, drawn.update.vector)
            key: Row = {"seed": seed, "precision": precision}
            rows = [key | row for row in sweep_rows(result)]
            folder.add(cell, seconds=seconds["cell"], table=rows, fits=[key | fit_row(result, settings.study)])
    return _report(folder, settings, list(cells.values()))


def sweep_rows(result: ProbeResult) -> list[Row]:
    """One row of the table per η."""
    symmetric = {point.eta: point for point in result.symmetric}
    rows = []
    for point in result.sweep:
        true, first, odd_even = point.true, point.first_order, symmetric.get(point.eta)
        quotient = ratio(true, first)
        rows.append(
            {
                "eta": point.eta,
                "delta_h": true.value,
                "delta_h_stderr": true.stderr,
                "delta_h_ci_low": true.ci_low,
                "delta_h_ci_high": true.ci_high,
                "delta_h1": first.value,
                "delta_h1_stderr": first.stderr,
                "relative_deviation": quotient.value - 1,
                "relative_deviation_stderr": quotient.stderr,
                "second_order_prediction": first.value + point.eta**2 / 2 * result.second_order.value,
                "symmetric_first": odd_even and odd_even.first.value,
                "symmetric_second": odd_even and odd_even.second.value,
                "ess": true.ess,
                "max_abs_log_weight": true.max_abs_log_weight,
            }
        )
    return rows


def fit_row(result: ProbeResult, options: LinearRegimeOptions) -> Row:
    """The fits over the points within the linear regime; None where these are too few."""
    star = math.nan if result.eta_star is None else result.eta_star
    low, high = options.fit_range(math.inf if math.isnan(star) else star)
    points = [point for point in result.sweep if point.eta > 0 and low <= point.eta <= high]
    etas, changes = [point.eta for point in points], [point.true.value for point in points]
    line = fit_power_law(etas, changes)
    # Rounding leaves the same floor under ΔH whatever η is, and so one of 1/η under ΔH/η.
    weights = [eta**2 for eta in etas]
    slope = linear_coefficient(etas, changes, weights) if len(set(etas)) > 1 else None
    symmetric = {point.eta: point for point in result.symmetric}.get(max(etas, default=math.nan))
    return {
        "fit_from": min(etas, default=None),
        "fit_to": max(etas, default=None),
        "n_points": line.n_points if line else 0,
        "n_left_out": line.n_left_out if line else len(points),
        "loglog_slope": line and line.slope,
        "r_squared": line and line.r_squared,
        "slope": slope,
        "first_order": result.first_order.value,
        "first_order_stderr": result.first_order.stderr,
        "first_order_deviation": result.first_order.value / slope - 1 if slope else None,
        "second_order": result.second_order.value,
        "second_order_stderr": result.second_order.stderr,
        "eta_star": result.eta_star,
        "eta_star_ci_low": result.eta_star_ci_low,
        "eta_star_ci_high": result.eta_star_ci_high,
        "symmetric_first": symmetric and symmetric.first.value,
        "symmetric_first_stderr": symmetric and symmetric.first.stderr,
        "symmetric_second": symmetric and symmetric.second.value,
        "symmetric_second_stderr": symmetric and symmetric.second.stderr,
    }


def _scoring_in(precision: Precision, drawn_in: PrecisionSettings) -> PrecisionSettings:
    """The number formats of scoring alone: v is made already."""
    double = precision == "float64"
    return PrecisionSettings(
        allow_tf32=drawn_in.allow_tf32,
        matmul_precision=drawn_in.matmul_precision,
        runtime_dtype=precision,
        entropy_dtype="float64" if double else drawn_in.entropy_dtype,
    )


def _report(folder: StudyFolder, settings: LinearRegimeSettings, cells: list[str]) -> StudyOutcome:
    table, fits = folder.table("table", cells), folder.table("fits", cells)
    report = Report(
        folder,
        "Linear regime",
        f"How far does the first order ηδH₁ follow the true entropy change ΔH(η)? {len(settings.study.seeds)} pairs of "
        f"E-batch (N = {settings.batch_config.B_E}) and U-batch, each scored in "
        f"{' and in '.join(settings.study.precisions)} at {table['eta'].nunique()} step sizes.",
    )
    report.tables(table=(table, COLUMNS), fits=(fits, FIT_COLUMNS))
    units = settings.estimator.normalize.replace("_", " ")
    report.show(
        fits[
            [
                "seed",
                "precision",
                "fit_from",
                "fit_to",
                "loglog_slope",
                "r_squared",
                "first_order_deviation",
                "eta_star",
            ]
        ],
        "Fits",
        "From `fits.csv`. In the linear regime the log-log slope is 1; `first_order_deviation` is what the first order "
        "misses of the measured slope on the same batch.",
    )
    labels = table["precision"] + ", seed " + table["seed"].astype(str)
    deviations = table.assign(size=table["relative_deviation"].abs(), label=labels).pivot_table(
        index="eta", columns="label", values="size", sort=False
    )
    report.show(deviations.reset_index(), "|ΔH/(η·δH₁) − 1|", "From `table.csv`.")
    report.figure(
        "delta_h",
        power_law_figure(table, fits, units),
        "Markers are |ΔH|, lines η·|δH₁| of the same seed, the shaded range is the fits'. Points off the line at small "
        "η are rounding, at large η curvature.",
    )
    report.figure(
        "deviation",
        deviation_figure(table),
        "Filled markers: ΔH is larger than the first order says; open ones: smaller. The line is the second order's "
        "prediction, η/2 · |v'∇²Hv|/|δH₁|: deviations that lie on it are curvature. What stays flat or rises towards "
        "small η is the rounding floor of the precision.",
    )
    report.caveats(
        "ΔH and δH₁ come from one batch and share its noise, so their agreement shows linearity and correct "
        "derivatives, not that either is the truth: that is what the standard errors are about.",
        "The fits take the η between `fit_from` and `fit_to` and no others"
        + (f" (here η ≤ {LINEAR:g} η*, estimated for every seed)." if settings.study.fit_max is None else ".")
        + " The log-log line weighs every point alike, so one point in the rounding floor can spoil it.",
        "All precisions score the same tokens along the same v; completions and gradient were made in "
        f"{settings.precision.runtime_dtype}.",
        *_collapsed(table, settings.batch_config.B_E),
    )
    text = fits[["seed", "precision", "loglog_slope", "r_squared", "first_order_deviation", "eta_star"]]
    return report.write(text)


def _collapsed(table: pd.DataFrame, count: int) -> list[str]:
    """A caveat of the step sizes whose importance weights have collapsed, where there are any."""
    etas = table.loc[table["ess"] < TRUSTED_ESS * count, "eta"].abs()
    if etas.empty:
        return []
    return [
        f"From |η| = {etas.min():.3g} on the effective sample size is less than half of N = {count}: do not trust ΔH "
        "there, whatever its interval."
    ]


STUDY = Study(
    NAME,
    "How far the first order follows the true entropy change: over step sizes, seeds and precisions.",
    LinearRegimeSettings,
    run_linear_regime,
)
