"""How H, ΔH and δH₁ settle as the E-batch grows: smaller batches are beginnings of one large one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
from scipy import stats

from entropy_pl.probe import EntropyProbe
from entropy_pl.studies.figures import convergence_figure, standard_error_figure
from entropy_pl.studies.folder import Row, StudyFolder
from entropy_pl.studies.pool import Pool, check_sizes, pool_of, pool_sizes
from entropy_pl.studies.report import Report
from entropy_pl.studies.study import Study, StudyOutcome, StudySettings

NAME = "convergence"

COLUMNS = {
    "quantity": "`entropy`, H at θ; `delta_h1`, δH₁ per unit η; `delta_h`, ΔH(η)",
    "eta": "η of ΔH; else empty",
    "n": "N, sequences in the E-batch",
    "value": "the estimate, nats (δH₁: per unit η)",
    "stderr": "its standard error",
    "ci_low": "lower end of its confidence interval",
    "ci_high": "upper end",
    "ess": "effective sample size of the sequence weights",
    "stderr_typical": "root mean square standard error of all E-batches of N that share no sequence, this one included",
}
FIT_COLUMNS = {
    "quantity": "as in the table",
    "eta": "likewise",
    "exponent": "slope of log `stderr_typical` over log N; −½ is expected",
    "exponent_stderr": "of the straight line, as if the points were independent",
    "n_sizes": "points on the line",
}


@dataclass(frozen=True)
class ConvergenceOptions:
    """Which E-batches.

    Args:
        sizes: N of the smaller E-batches, each a beginning of the next. None: powers of two from 64 on, in multiples
            of `completions_per_prompt`. The whole of B_E is always among them.
    """

    sizes: list[int] | None = None


@dataclass(frozen=True)
class ConvergenceSettings(StudySettings):
    """A measurement's settings, whose E-batch is the largest, and which parts of it to look at.

    Args:
        study: the convergence study's own.
    """

    study: ConvergenceOptions = field(default_factory=ConvergenceOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, self.study.sizes)


def run_convergence(settings: ConvergenceSettings, *, progress_bar: bool = True) -> StudyOutcome:
    """Make the largest E-batch, the estimates of all its beginnings, or what of that is missing, and report.

    Args:
        settings: of the study.
        progress_bar: show one, with the time left; never without a terminal.

    Raises:
        ValueError: as :meth:`EntropyMeasurements.run_experiments`, or if the folder is another study's.
    """
    folder, probe = StudyFolder(NAME, settings), settings.probe()
    cells = {size: f"N = {size}" for size in pool_sizes(settings, settings.study.sizes)}
    pool = pool_of(settings, folder, features=probe.needs_features, progress_bar=progress_bar)
    folder.finish(
        {cell: partial(size_rows, pool, probe, size) for size, cell in cells.items()}, progress_bar=progress_bar
    )
    return _report(folder, settings, pool, list(cells.values()))


def size_rows(pool: Pool, probe: EntropyProbe, size: int) -> list[Row]:
    """The estimates of the first ``size`` sequences, as if there were no others, and what error others of N have."""
    batches = [pool.estimates(probe, rows) for rows in pool.subsets(size)]
    return [
        {
            "quantity": quantity,
            "eta": eta,
            "n": size,
            **{name: getattr(change, name) for name in ("value", "stderr", "ci_low", "ci_high", "ess")},
            "stderr_typical": float(np.sqrt(np.mean([batch[quantity, eta].stderr ** 2 for batch in batches]))),
        }
        for (quantity, eta), change in batches[0].items()
    ]


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """Of every quantity, how its standard error falls with N; NaN with fewer than three sizes."""
    rows = []
    for (quantity, eta), group in table.groupby(["quantity", "eta"], sort=False, dropna=False):
        fitted = len(group) > 2 and (group["stderr_typical"] > 0).all()
        line = stats.linregress(np.log(group["n"]), np.log(group["stderr_typical"])) if fitted else None
        rows.append(
            {
                "quantity": quantity,
                "eta": eta,
                "exponent": line.slope if line else np.nan,
                "exponent_stderr": line.stderr if line else np.nan,
                "n_sizes": len(group),
            }
        )
    return pd.DataFrame(rows)


def _report(folder: StudyFolder, settings: ConvergenceSettings, pool: Pool, cells: list[str]) -> StudyOutcome:
    table = folder.table("rows", cells)
    fits = exponents(table)
    eta = pool.eta_shown
    report = Report(
        folder,
        "Convergence",
        f"How do H, ΔH and δH₁ settle as the E-batch grows to N = {len(pool.order)}? Every smaller E-batch is a "
        "beginning of the largest, in a seeded order.",
    )
    report.tables(table=(table, COLUMNS), fits=(fits, FIT_COLUMNS))
    report.show(fits, "Standard errors fall as N to the power", "From `fits.csv`; −½ is expected.")
    shown = table[(table["quantity"] != "delta_h") | (table["eta"] == eta)].sort_values(
        ["quantity", "n"], kind="stable"
    )
    report.show(
        shown[list(COLUMNS)], "Estimates", f"From `table.csv`; of ΔH at η = {eta:g}, the one next to the learning rate."
    )
    report.figure(
        "convergence",
        convergence_figure(table, eta, settings.estimator.normalize.replace("_", " ")),
        "Estimates with their confidence bands. As N grows they should stay within the bands of smaller N.",
    )
    report.figure(
        "standard_error",
        standard_error_figure(table, eta),
        "Relative standard error against N (`stderr_typical`); the grey lines fall as 1/√N.",
    )
    report.caveats(
        "Smaller E-batches are parts of larger ones: the points of a curve are not independent, and the exponent's "
        "standard error takes them as if they were.",
        "Estimates are unbiased to O(1/N); with few sequences, self-normalization and the error bar itself are "
        "less to be trusted.",
    )
    return report.write(fits)


STUDY = Study(
    NAME,
    "How H, ΔH and δH₁ and their error bars settle as the E-batch grows.",
    ConvergenceSettings,
    run_convergence,
)
