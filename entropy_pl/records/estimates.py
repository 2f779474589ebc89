"""What a record holds of an estimate, of a step size and of another loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from entropy_pl.records.stored import Stored, detail, number


@dataclass(frozen=True, kw_only=True)
class EstimateRecord(Stored):
    """A number with its error bar; None where the record does not say.

    Args:
        value: the estimate, in the unit that its place in the record has.
        stderr: standard error over the prompts of the E-batch.
        stderr_jackknife: the same by leaving prompts out in turn, of the parts of an attribution.
        ci_low: lower end of the confidence interval; of an exchange rate None where it is unbounded.
        ci_high: upper end.
        stderr_u: standard error over the prompts of the U-batch, of the tokens of an attribution and of their signs.
        stderr_u_jackknife: the same by leaving prompts out in turn.
        ess: effective sample size of the importance weights, at the last token.
        ess_min: the smallest over the token positions.
        max_abs_log_weight: largest absolute log-weight.
        clip_fraction: share of the log-weights that were clipped.
        n_sequences: completions in the E-batch.
        n_tokens: tokens in it.
        mean_weight: of the importance weights, 1 but for chance.
        mean_weight_stderr: its standard error.
        confidence: level of the interval.
        n_clusters: independent prompts behind the error bar.
        trustworthy: whether the estimate may be believed.
        bounded: of an exchange rate, whether its interval has bounds: False where ΔJ is not told from zero.
        warnings: why it must not be believed, a sentence each.
    """

    value: float | None = None
    stderr: float | None = None
    stderr_jackknife: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    stderr_u: float | None = None
    stderr_u_jackknife: float | None = None
    ess: float | None = None
    ess_min: float | None = None
    max_abs_log_weight: float | None = None
    clip_fraction: float | None = None
    n_sequences: int | None = None
    n_tokens: int | None = None
    mean_weight: float | None = None
    mean_weight_stderr: float | None = None
    confidence: float | None = None
    n_clusters: int | None = None
    trustworthy: bool | None = None
    bounded: bool | None = None
    warnings: tuple[str, ...] = detail(())

    @property
    def untrustworthy(self) -> bool:
        """Whether the estimate says of itself that it must not be believed; False where it does not say."""
        return self.trustworthy is False


NO_ESTIMATE = EstimateRecord()


@dataclass(frozen=True, kw_only=True)
class PointRecord(Stored):
    """One step size of the sweep.

    Args:
        eta: η, a learning rate.
        taken: whether this is the step that the optimizer took.
        true: ΔH(η), nats.
        first_order: δH₁(η), nats: the slope multiplied by η.
        reward_true: ΔJ(η), the change of the expected reward.
        reward_first_order: δJ₁(η).
    """

    eta: float | None = None
    taken: bool | None = None
    true: EstimateRecord = NO_ESTIMATE
    first_order: EstimateRecord = NO_ESTIMATE
    reward_true: EstimateRecord = NO_ESTIMATE
    reward_first_order: EstimateRecord = NO_ESTIMATE

    @property
    def ess_fraction(self) -> float:
        """ESS of ΔH over the number of sequences, in [0, 1]; NaN where it is not known."""
        return number(self.true.ess) / self.true.n_sequences if self.true.n_sequences else math.nan


NO_POINT = PointRecord()


@dataclass(frozen=True, kw_only=True)
class SymmetricRecord(Stored):
    """A pair of step sizes ±η, split into odd and even orders.

    Args:
        eta: η > 0.
        first: [ΔH(η) − ΔH(−η)]/2η, nats per unit η.
        second: [ΔH(η) + ΔH(−η)]/η², nats per unit η².
    """

    eta: float | None = None
    first: EstimateRecord = NO_ESTIMATE
    second: EstimateRecord = NO_ESTIMATE


@dataclass(frozen=True, kw_only=True)
class PowerLawRecord(Stored):
    """The line through ``log |ΔH|`` over log η.

    Args:
        slope: 1 where ΔH is of first order.
        intercept: ``log |ΔH|`` at η = 1.
        r_squared: share of the variance that the line explains.
        n_points: step sizes that it was fitted to.
        coefficient: e to the power of the intercept, with the sign of ΔH, nats.
        n_left_out: step sizes without a sign of their own.
    """

    slope: float | None = None
    intercept: float | None = None
    r_squared: float | None = None
    n_points: int | None = None
    coefficient: float | None = None
    n_left_out: int | None = None


@dataclass(frozen=True, kw_only=True)
class CounterfactualRecord(Stored):
    """What a step by another loss, from the same parameters and U-batch, would have done.

    Args:
        true: ΔH after it, nats.
        difference: ΔH after it minus that of the step taken, nats.
        reward_true: ΔJ after it.
        reward_difference: ΔJ after it minus that of the step taken.
        update_norm: norm of its update per unit learning rate.
        cosine: of the angle between its update and the one taken.
    """

    true: EstimateRecord = NO_ESTIMATE
    difference: EstimateRecord = NO_ESTIMATE
    reward_true: EstimateRecord = NO_ESTIMATE
    reward_difference: EstimateRecord = NO_ESTIMATE
    update_norm: float | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class PredictorRecord(Stored):
    """How well a predictor from the literature follows what was measured.

    Args:
        pearson: correlation with the attributed changes, token by token.
        pearson_stderr: its standard error, by leaving prompts out in turn.
        pearson_ci_low: lower end of its interval.
        pearson_ci_high: upper end.
        spearman: correlation of the ranks.
        spearman_stderr: its standard error.
        spearman_ci_low: lower end of its interval.
        spearman_ci_high: upper end.
        sign_agreement: share of ``Σ|change|`` on tokens whose sign was predicted.
        n_tokens: tokens compared.
        step: what it predicts of the whole step, nats per unit η.
        n_steps: probed steps that ``step_pearson`` and ``step_spearman`` compare.
        step_pearson: correlation of ``step`` with ΔH per unit learning rate over the run's probes so far.
        step_pearson_ci_low: lower end of its interval.
        step_pearson_ci_high: upper end.
        step_spearman: correlation of the ranks.
    """

    pearson: float | None = None
    pearson_stderr: float | None = None
    pearson_ci_low: float | None = None
    pearson_ci_high: float | None = None
    spearman: float | None = None
    spearman_stderr: float | None = None
    spearman_ci_low: float | None = None
    spearman_ci_high: float | None = None
    sign_agreement: float | None = None
    n_tokens: int | None = None
    step: float | None = None
    n_steps: int | None = None
    step_pearson: float | None = None
    step_pearson_ci_low: float | None = None
    step_pearson_ci_high: float | None = None
    step_spearman: float | None = None
