"""What every option of the estimator costs in variance, against N, with three kinds of error bar side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from entropy_pl.estimators import interval, jackknife_standard_error
from entropy_pl.estimators.estimate import cluster_index
from entropy_pl.studies.figures import error_bars_figure, variance_ratio_figure
from entropy_pl.studies.folder import Row, StudyFolder
from entropy_pl.studies.options import DEFAULT_OPTIONS, EstimatorOption, PoolEstimates, variance_ratio
from entropy_pl.studies.pool import Pool, Quantity, check_sizes, pool_of, pool_sizes
from entropy_pl.studies.report import Report
from entropy_pl.studies.study import Study, StudyOutcome, StudySettings
from entropy_pl.studies.variance_table import variance_table

NAME = "variance"

COLUMNS = {
    "option": "of the estimator",
    "quantity": "`delta_h1`, δH₁ per unit η, or `delta_h`, ΔH(η)",
    "eta": "η of ΔH; empty for δH₁",
    "n": "N, sequences per subset",
    "n_subsets": "R, subsets that share no sequence",
    "mean": "of the R estimates, nats (δH₁: per unit η)",
    "variance_influence": "N times the mean squared standard error from the influence function, unit squared",
    "variance_jackknife": "N times the mean squared jackknife standard error, of the first `n_jackknife` subsets",
    "n_jackknife": "subsets that the jackknife was made on",
    "jackknife_to_influence": "jackknife variance over influence variance, on the same subsets",
    "variance_empirical": "N times the variance of the R estimates among one another",
    "variance_empirical_relative_sd": "its own relative standard deviation, √(2/(R−1))",
    "ratio_influence": "`variance_influence` over the compared option's at the same N",
    "ratio_jackknife": "`variance_jackknife`, likewise",
    "ratio_empirical": "`variance_empirical`, likewise",
    "coverage": "share of the R intervals that hold the reference, corrected for the pool being finite",
    "coverage_uncorrected": "the same without correction",
}
POOL_COLUMNS = {
    "option": "of the estimator",
    "quantity": "`delta_h1`, δH₁ per unit η, or `delta_h`, ΔH(η)",
    "eta": "η of ΔH; empty for δH₁",
    "n": "N, sequences in the pool",
    "value": "the estimate from the whole pool, nats (δH₁: per unit η)",
    "stderr": "its standard error from the influence function",
    "stderr_jackknife": "and by the jackknife",
    "variance_ratio": "`stderr`² over the compared option's",
    "variance_ratio_stderr": "the ratio's standard error, from the influences of both",
    "variance_ratio_ci_low": "lower end of its confidence interval",
    "variance_ratio_ci_high": "upper end",
    "variance_ratio_jackknife": "`stderr_jackknife`² over the compared option's",
    "difference": "value minus the reference option's on the same pool: the bias, if the option has one",
    "difference_stderr": "standard error of the difference: paired, from the influences of both",
    "difference_stderr_jackknife": "and by the jackknife of the difference",
}
SUBSET_COLUMNS = {
    "option": "of the estimator",
    "quantity": "`delta_h1`, δH₁ per unit η, or `delta_h`, ΔH(η)",
    "eta": "η of ΔH; empty for δH₁",
    "n": "N, sequences in the subset",
    "subset": "its number; the same number is the same sequences for every option",
    "value": "the estimate, nats (δH₁: per unit η)",
    "stderr": "its standard error from the influence function",
    "ci_low": "lower end of its confidence interval",
    "ci_high": "upper end",
    "stderr_jackknife": "standard error by the jackknife, where it was made",
}


@dataclass(frozen=True)
class VarianceOptions:
    """What is compared.

    Args:
        options: of the estimator.
        compared_to: name of the option that variances are given in multiples of.
        reference: name of the unbiased option whose estimate from the whole pool stands for the truth.
        sizes: N of the subsets. None: powers of two from 64 on, in multiples of `completions_per_prompt`. The whole
            pool is always among them.
        max_subsets: most subsets of a size.
        jackknife_groups: groups of prompts to leave out in turn; as many estimates per jackknife.
        jackknife_subsets: subsets of a size to jackknife; 0 leaves it out, on the whole pool too.
    """

    options: list[EstimatorOption] = field(default_factory=lambda: list(DEFAULT_OPTIONS))
    compared_to: str = "sequence"
    reference: str = "prefix+critic"
    sizes: list[int] | None = None
    max_subsets: int = 32
    jackknife_groups: int = 32
    jackknife_subsets: int = 4

    def __post_init__(self) -> None:
        names = [option.name for option in self.options]
        if len(set(names)) < len(names):
            raise ValueError(f"expected every name in study.options once, got {', '.join(names)}")
        for name in ("compared_to", "reference"):
            if getattr(self, name) not in names:
                raise ValueError(
                    f"expected study.{name} among the options {', '.join(names)}, got {getattr(self, name)!r}"
                )
        if not next(option for option in self.options if option.name == self.reference).unbiased:
            raise ValueError(f"expected an unbiased study.reference, got {self.reference!r}, of baseline gae")
        for name, least in (("max_subsets", 1), ("jackknife_groups", 2), ("jackknife_subsets", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected study.{name} of at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class VarianceSettings(StudySettings):
    """A measurement's settings, whose E-batch is the pool, and which estimators to compare on it.

    `estimator`'s own weighting, integrand and baseline have no part in it.

    Args:
        study: the variance study's own.
    """

    study: VarianceOptions = field(default_factory=VarianceOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, self.study.sizes)


def run_variance(settings: VarianceSettings, *, progress_bar: bool = True) -> StudyOutcome:
    """Make the pool, every option's estimates on the whole and on its parts, or what of that is missing, and report.

    Args:
        settings: of the study.
        progress_bar: show one, with the time left; never without a terminal.

    Raises:
        ValueError: as :meth:`EntropyMeasurements.run_experiments`, or if the folder is another study's.
    """
    study, folder = settings.study, StudyFolder(NAME, settings)
    names, sizes = [option.name for option in study.options], pool_sizes(settings, study.sizes)
    whole = {name: f"{name}, whole pool" for name in names}
    parts = {(name, size): f"{name}, N = {size}" for name in names for size in sizes}
    pool = pool_of(
        settings, folder, features=any(option.needs_features for option in study.options), progress_bar=progress_bar
    )
    # A probe jackknifes gae by itself; here influences and jackknife stand side by side.
    estimates = PoolEstimates(pool, replace(settings.probe(), jackknife_groups=0), study.options)
    jobs: dict[str, Callable[[], list[Row]]] = {}
    for name in names:  # an option's cells side by side: they share estimates
        jobs[whole[name]] = partial(whole_pool_rows, estimates, name, study)
        jobs |= {parts[name, size]: partial(subset_rows, estimates, name, size, study) for size in sizes}
    folder.finish(jobs, progress_bar=progress_bar)
    return _report(folder, settings, pool, whole, parts)


def whole_pool_rows(estimates: PoolEstimates, name: str, study: VarianceOptions) -> list[Row]:
    """An option on the whole pool: its estimates, and how they differ from the reference's."""
    pool = estimates.pool
    everything, clusters = torch.arange(len(pool.order)), pool.scores.clusters
    prompts = int(cluster_index(clusters, len(everything)).max()) + 1
    own, compared, reference = (
        estimates.changes(option, everything) for option in (name, study.compared_to, study.reference)
    )
    rows: list[Row] = []
    for quantity, change in own.items():
        ratio, ratio_error = variance_ratio(change, compared[quantity], clusters)
        low, high = interval(ratio, ratio_error, prompts, estimates.confidence)
        difference = change - reference[quantity]

        def apart(rows: Tensor, quantity: Quantity = quantity) -> float:
            return estimates.values(name, rows)[quantity] - estimates.values(study.reference, rows)[quantity]

        jackknifed = None
        if study.jackknife_subsets and name != study.reference:
            jackknifed = jackknife_standard_error(
                apart, len(everything), clusters=clusters, groups=study.jackknife_groups
            )
        rows.append(
            {
                **_labels(name, quantity, len(everything)),
                "value": change.value,
                "stderr": change.stderr,
                "variance_ratio": ratio,
                "variance_ratio_stderr": ratio_error,
                "variance_ratio_ci_low": low,
                "variance_ratio_ci_high": high,
                "difference": difference.value,
                "difference_stderr": difference.stderr,
                "difference_stderr_jackknife": jackknifed,
            }
        )
    return rows


def subset_rows(estimates: PoolEstimates, name: str, size: int, study: VarianceOptions) -> list[Row]:
    """An option on every subset of a size."""
    rows = []
    for number, subset in enumerate(estimates.pool.subsets(size, study.max_subsets)):
        for quantity, change in estimates.changes(name, subset).items():
            jackknifed = None
            if number < study.jackknife_subsets:
                jackknifed = _jackknife(estimates, name, subset, quantity, study.jackknife_groups)
            rows.append(
                {
                    **_labels(name, quantity, size),
                    "subset": number,
                    "value": change.value,
                    "stderr": change.stderr,
                    "ci_low": change.ci_low,
                    "ci_high": change.ci_high,
                    "stderr_jackknife": jackknifed,
                }
            )
    return rows


def _jackknife(estimates: PoolEstimates, name: str, subset: Tensor, quantity: Quantity, groups: int) -> float:
    """The jackknife of the whole calculation on a subset, its critic fitted anew every time."""
    clusters = estimates.pool.scores.clusters
    return jackknife_standard_error(
        lambda kept: estimates.values(name, subset[kept])[quantity],
        len(subset),
        clusters=None if clusters is None else clusters[subset],
        groups=groups,
    )


def _labels(name: str, quantity: Quantity, size: int) -> Row:
    kind, eta = quantity
    return {"option": name, "quantity": kind, "eta": eta, "n": size}


def _report(
    folder: StudyFolder,
    settings: VarianceSettings,
    pool: Pool,
    whole: dict[str, str],
    parts: dict[tuple[str, int], str],
) -> StudyOutcome:
    study, size = settings.study, len(pool.order)
    subsets = folder.table("rows", parts.values())
    table, on_pool = variance_table(
        subsets,
        folder.table("rows", whole.values()),
        size=size,
        reference=study.reference,
        compared_to=study.compared_to,
    )
    report = Report(
        folder,
        "Variance",
        f"What does every option of the estimator cost in variance? One pool of N = {size} sequences, one update, "
        f"{len(whole)} options on the whole pool and on its parts. Ratios are to `{study.compared_to}`; "
        f"`{study.reference}` on the whole pool is the reference.",
    )
    report.tables(table=(table, COLUMNS), pool=(on_pool, POOL_COLUMNS), subsets=(subsets, SUBSET_COLUMNS))
    eta = pool.eta_shown
    shown = on_pool[(on_pool["quantity"] == "delta_h1") | (on_pool["eta"] == eta)]
    ratios = shown[["option", "quantity", "eta", "variance_ratio", "variance_ratio_stderr", "variance_ratio_jackknife"]]
    report.show(
        ratios,
        "Variance on the whole pool",
        f"From `pool.csv`, in multiples of `{study.compared_to}`'s at equal N.",
    )
    report.figure(
        "variance_ratio",
        variance_ratio_figure(on_pool, eta, study.compared_to),
        f"Bars: from the influence function, with {100 * settings.estimator.confidence:g} % intervals; squares: "
        "jackknife of the whole calculation, critics fitted anew. Shorter is better.",
    )
    report.show(
        shown[
            [
                "option",
                "quantity",
                "eta",
                "value",
                "stderr",
                "difference",
                "difference_stderr",
                "difference_stderr_jackknife",
            ]
        ],
        f"Difference from {study.reference}",
        "On the same sequences, so that shared noise cancels. Of an unbiased option it is noise (and O(1/N)); of `gae` "
        "it is the bias that its critic's error makes, measured.",
    )
    report.figure(
        "error_bars",
        error_bars_figure(table, eta),
        "Standard error against N for every option. Lines: influence function; squares: jackknife; crosses: spread of "
        "the estimates among subsets. Where the three agree, the error bar can be trusted.",
    )
    coverage = table[(table["quantity"] == "delta_h1") | (table["eta"] == eta)].dropna(subset="coverage")
    coverage = coverage[coverage["n"] == coverage["n"].min()]
    if len(coverage):
        report.show(
            coverage[
                ["option", "quantity", "n", "n_subsets", "jackknife_to_influence", "coverage", "coverage_uncorrected"]
            ],
            "Do the intervals cover?",
            f"From `table.csv`, its smallest N, where subsets are most; ΔH at η = {eta:g}; nominal is "
            f"{settings.estimator.confidence:g}.",
        )
    times = "\n".join(
        f"* `{name}`: {folder.seconds([cell, *(parts[key] for key in parts if key[0] == name)]):.1f} s"
        for name, cell in whole.items()
    )
    report.say("Time per option, jackknife included", times)
    report.caveats(
        "The subsets are parts of the pool that the reference comes from, so a raw count of intervals that hold it is "
        "optimistic: the error's variance is short by the factor 1 − N/pool. `coverage` shortens the intervals by that "
        "(and widens them by the paired noise of the option's difference from the reference); "
        "`coverage_uncorrected` does not. Both stand on few subsets: R intervals tell a coverage of 95 % to "
        "±2√(0.95·0.05/R).",
        "The reference has a standard error of its own: a `difference` below about two of its standard errors shows "
        "no bias.",
        "The influences of `gae` leave out the noise of its critic, at first order: its intervals are too short, and "
        "the jackknife is the one to trust (a probe's own error bars of `gae` hold one). Its paired standard error "
        "from influences suffers alike.",
        f"The jackknife leaves out {study.jackknife_groups} groups in turn and has a relative error of its own of "
        "about √(2/(groups − 1)) in variance.",
        "ΔH of an option with a baseline is the importance-sampling estimate of its weighting with the first order "
        "exchanged for the low-variance one; the option of the same weighting and no baseline is ΔH without that.",
    )
    return report.write(ratios)


STUDY = Study(
    NAME,
    "The variance of every option of the estimator, against N, by influence function, jackknife and repetition.",
    VarianceSettings,
    run_variance,
)
