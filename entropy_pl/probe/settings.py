"""What a probe measures: its options, and what follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from entropy_pl.estimators import Baseline, Measure
from entropy_pl.estimators.snis import Integrand, Normalize, Weighting
from entropy_pl.policy.tangents import Method
from entropy_pl.rollout import Rollout, checked_temperature

Precision = Literal["float32", "float64"]
"""Number formats of a probe's forward passes, and of its softmax, log-probs and entropies."""

RECORDED_SETTINGS = (
    "normalize",
    "weighting",
    "integrand",
    "baseline",
    "gae_lambda",
    "clip_log_weight",
    "confidence",
    "temperature",
    "precision",
    "entropy_dtype",
)


@dataclass(frozen=True)
class ProbeSettings:
    """The options of an :class:`~entropy_pl.probe.EntropyProbe`.

    Args:
        etas: absolute step sizes to measure at, besides the multiples below.
        eta_multipliers: step sizes as multiples of the update's lr.
        at_lr: measure at the step really taken, η = lr, whatever else is asked for.
        symmetric: measure at −η as well as at every η, for differences that odd and even orders do not share.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` (less variance) or ``sequence`` (classical SNIS).
        integrand: ``rao_blackwell`` or ``surprisal``.
        baseline: what is subtracted from the score term, in δH₁ and in ΔH alike: ``none``, ``position``, ``critic``
            (one more pass over E), or ``gae`` (least variance, biased by the critic's error; its error bars hold the
            noise of the critic's fit, by a jackknife that fits it anew: the influences leave it out).
        gae_lambda: λ of ``gae``; 1 is the critic, unbiased.
        jackknife_groups: of that jackknife; 0 leaves the critic's noise out, and the error bars of ``gae`` too short.
        clip_log_weight: bound on the absolute log weight; None leaves the estimate unbiased to O(1/N).
        confidence: of every interval.
        temperature: of the sampling distribution E was drawn from; None takes the rollout's.
        method: how tangents are made: ``auto``, ``forward_mode`` or ``central_difference``.
        precision: ``float32``, or ``float64`` for the whole forward pass.
        entropy_dtype: of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.
        compile_statistics: make one kernel of softmax, log-prob and entropy by ``torch.compile``.

    Raises:
        ValueError: for an option out of range.

    """

    etas: Sequence[float] = ()
    eta_multipliers: Sequence[float] = (0.5, 1.0, 2.0)
    at_lr: bool = True
    symmetric: bool = False
    normalize: Normalize = "per_token"
    weighting: Weighting = "prefix"
    integrand: Integrand = "rao_blackwell"
    baseline: Baseline = "none"
    gae_lambda: float = 0.95
    jackknife_groups: int = 20
    clip_log_weight: float | None = None
    confidence: float = 0.95
    temperature: float | None = None
    method: Method = "auto"
    precision: Precision = "float32"
    entropy_dtype: Precision = "float64"
    max_batch_tokens: int | None = None
    compile_statistics: bool = False

    def __post_init__(self) -> None:
        Measure(self.normalize, self.weighting, self.integrand, self.clip_log_weight)
        for name in ("etas", "eta_multipliers"):
            for eta in getattr(self, name):
                if not math.isfinite(eta) or eta == 0:
                    raise ValueError(f"expected every number in {name} finite and not 0, got {eta}")
        if self.temperature is not None:
            checked_temperature(self.temperature)
        for name, options in (("precision", Precision), ("entropy_dtype", Precision), ("baseline", Baseline)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"expected {name} to be one of {get_args(options)}, got {getattr(self, name)!r}")
        if not 0 < self.confidence < 1:
            raise ValueError(f"expected a confidence between 0 and 1, such as 0.95, got {self.confidence}")
        if self.baseline != "none" and self.clip_log_weight is not None:
            raise ValueError(
                f"expected clip_log_weight: None with baseline {self.baseline!r}, got {self.clip_log_weight}: a "
                "baseline takes from ΔH and δH₁ the noise they share, and clipped weights do not share it"
            )
        if not 0 <= self.gae_lambda <= 1:
            raise ValueError(f"expected gae_lambda between 0 and 1, got {self.gae_lambda}")
        if self.jackknife_groups < 0 or self.jackknife_groups == 1:
            raise ValueError(f"expected jackknife_groups of at least 2, or 0 for none, got {self.jackknife_groups}")

    def sweep_etas(self, lr: float) -> list[float]:
        """The step sizes of a sweep at this learning rate, ascending."""
        multipliers = [*self.eta_multipliers, *([1.0] if self.at_lr else [])] if lr else []
        etas = {*map(float, self.etas), *(lr * m for m in multipliers)}
        return sorted(etas | {-eta for eta in etas} if self.symmetric else etas)

    @property
    def sampling_temperature(self) -> float:
        """What to draw an E-batch at: 1 where none was given."""
        return 1.0 if self.temperature is None else self.temperature

    def drawn(self, rollout: Rollout) -> Rollout:
        """The E-batch at this probe's temperature.

        Raises:
            ValueError: if it was drawn at another one, so that its completions are not those of the policy measured.
        """
        if self.temperature is not None and rollout.temperature not in (1.0, self.temperature):
            raise ValueError(
                f"expected an E-batch drawn at the probe's temperature, {self.temperature:g}, got one drawn at "
                f"{rollout.temperature:g}: leave the probe's temperature out, or draw E at it"
            )
        return rollout.at_temperature(self.temperature)

    @property
    def needs_features(self) -> bool:
        """Whether the baseline is a critic's, which looks at hidden states."""
        return self.baseline in ("critic", "gae")

    @property
    def estimate(self) -> dict[str, Any]:
        """Which entropy is meant, as every estimator takes it."""
        return {"normalize": self.normalize, "weighting": self.weighting, "integrand": self.integrand}

    @property
    def scoring(self) -> dict[str, Any]:
        """How the policy is asked, as every pass takes it."""
        return {
            "entropy_dtype": getattr(torch, self.entropy_dtype),
            "max_batch_tokens": self.max_batch_tokens,
        }

    @property
    def recorded(self) -> dict[str, Any]:
        """The options that decide what is estimated, for the record."""
        return {name: getattr(self, name) for name in RECORDED_SETTINGS}
