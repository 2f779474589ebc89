"""The options of a probe and of its attribution, and what follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch

from entropy_pl.estimators import Baseline, Measure
from entropy_pl.estimators.snis import Integrand, Normalize, Weighting
from entropy_pl.objectives import counterfactual_names
from entropy_pl.policy.tangents import Method
from entropy_pl.registry import did_you_mean
from entropy_pl.rollout import Rollout, checked_temperature

Precision = Literal["float32", "float64"]
"""Number formats of a probe's forward passes, and of its softmax, log-probs and entropies."""

ATTRIBUTION_PASSES_OVER_U = 5
ATTRIBUTION_PASSES = ATTRIBUTION_PASSES_OVER_U + 6
"""Passes of an attribution, for progress bars: ∇Ĥ over E; θ, two differences and the gradients of two signs over U;
momentum, weight decay, the tokens of two signs and what is left over E."""

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


@dataclass(frozen=True)
class AttributionSettings:
    """Who moved the entropy, and what other losses would have done. Of a pair of checkpoints there is neither.

    Args:
        enabled: attribute the step's first-order change to its momentum, its weight decay and every token of U.
        influence_matrix: measure the influence of each U-completion on each E-completion too, with error bars: a
            forward and a backward pass of every completion by itself.
        token_error_blocks: give every token an error bar over E, from the attribution by each of so many blocks of it
            (8, say: two passes over U each). 0 gives none.
        counterfactuals: losses whose step from the same state and U-batch is measured beside this one:
            `entropy_bonus`, `clip_higher`, `clip_cov`, `kl_cov`, `positive_only`, `negative_only`, `no_momentum`, or
            `unchanged` as a control. Each takes a backward pass over U and a pass over E.

    Raises:
        ValueError: for a single block, a name there is none of or that stands there twice, or parts of an attribution
            without it.
    """

    enabled: bool = False
    influence_matrix: bool = False
    token_error_blocks: int = 0
    counterfactuals: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.token_error_blocks < 0 or self.token_error_blocks == 1:
            raise ValueError(f"expected token_error_blocks of at least 2, or 0 for none, got {self.token_error_blocks}")
        if not self.enabled and (self.influence_matrix or self.token_error_blocks):
            raise ValueError("expected attribution turned on with influence_matrix or token_error_blocks, got it off")
        if len(set(self.counterfactuals)) < len(self.counterfactuals):
            raise ValueError(f"expected every name in counterfactuals once, got {self.counterfactuals}")
        names = counterfactual_names()
        for name in self.counterfactuals:
            if name not in names:
                raise ValueError(
                    f"expected counterfactuals out of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
                )

    @property
    def asked(self) -> bool:
        """Whether anything here is, for which a U-batch is needed."""
        return self.enabled or bool(self.counterfactuals)

    @property
    def with_errors(self) -> bool:
        """Whether every token gets an error bar over E."""
        return self.token_error_blocks > 0

    @property
    def passes(self) -> int:
        """Passes that it adds, by the probe's count; the matrix and the tokens' error bars count as one each."""
        attribution = ATTRIBUTION_PASSES + self.influence_matrix + self.with_errors
        return attribution * self.enabled + len(self.counterfactuals)
