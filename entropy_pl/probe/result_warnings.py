"""What a reader must know before believing the numbers of one probe, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from entropy_pl.estimators import EntropyChange
from entropy_pl.estimators.estimate import TRUSTED_ESS
from entropy_pl.probe.result import SweepPoint
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.smoothness import Derivatives

LARGE_ERROR = 0.1  # of a difference, as a share of max(|δH₁|, its standard error)


def warnings_of(
    sweep: Sequence[SweepPoint], first: EntropyChange, derivatives: Derivatives, scores: ProbeScores, lr: float
) -> tuple[str, ...]:
    """Why some of the probe's numbers must not be believed, or are withheld; the gravest first.

    Args:
        sweep: with ΔH and δH₁ at every η.
        first: δH₁ per unit η, as it is reported.
        derivatives: what is known of them.
        scores: of the whole E-batch.
        lr: η of the step really taken.
    """
    return tuple(dict.fromkeys(_doubts(sweep, first, derivatives, scores, lr)))


def _doubts(
    sweep: Sequence[SweepPoint], first: EntropyChange, derivatives: Derivatives, scores: ProbeScores, lr: float
) -> Iterator[str]:
    if first.too_few:
        yield first.too_few
    yield from (reason for reason in (derivatives.withheld, derivatives.autograd) if reason)
    for name in ("true", "reward_true"):
        yield from _of_weights(name, sweep, scores, lr)
    error = derivatives.difference_error or 0.0
    scale = max(abs(first.value), first.stderr)
    if error > LARGE_ERROR * scale:  # never of a withheld one, whose scale is NaN
        yield (
            f"The first order is off by about {error / scale:.0%}, because it is a difference of forward passes that "
            "round: probe in float64 (precision='float64') to know it better."
        )


def _of_weights(name: str, sweep: Sequence[SweepPoint], scores: ProbeScores, lr: float) -> Iterator[str]:
    """The point nearest to θ at which the importance weights speak against ΔH, or against ΔJ."""
    shown = {"true": "ΔH", "reward_true": "ΔJ"}[name]
    changes: list[tuple[float, EntropyChange | None]] = [(abs(point.eta), getattr(point, name)) for point in sweep]
    spoilt = [(eta, change) for eta, change in changes if change and (change.collapsed or change.off_balance)]
    if not spoilt:
        return
    eta, change = min(spoilt, key=lambda pair: pair[0])
    words = f"{shown} must not be used at η = {eta:.3g} and further from zero."
    if change.collapsed:
        limit = _trusted_until(scores, eta)
        multiple = f" ({limit / lr:.2g} times the learning rate)" if lr else ""
        words += (
            f" {change.collapsed} Below η = {limit:.2g}{multiple} about half the sequences would count; or compare the "
            "entropies of completions drawn before the step and after it."
        )
    if change.off_balance:
        words += f" {change.off_balance}"
    yield words


def _trusted_until(scores: ProbeScores, eta: float) -> float:
    """About where the effective sample size falls below half: log-normal weights have ESS/N = exp(−η² Var Ṡ).

    From the spread of Ṡ_i = Σ_k ṡ_ik, since an effective sample size far below half has forgotten how large the weights
    are; below the η that was seen to be too large in any case.
    """
    spread = float(scores.tangent.logp.sum(1).std())
    limit = math.sqrt(-math.log(TRUSTED_ESS)) / spread if spread else math.inf
    return min(limit, eta / 2)
