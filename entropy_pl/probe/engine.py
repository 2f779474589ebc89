"""The engine itself: which passes a probe takes over its E-batch, and which estimates it makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from entropy_pl.estimators import (
    Baseline,
    EntropyChange,
    Measure,
    entropy_estimate,
    first_order_delta_entropy,
    fit_power_law,
    jackknife_standard_error,
    low_variance_delta_entropy,
    score_baseline,
    second_order_delta_entropy,
    snis_delta_entropy,
    symmetric_difference,
)
from entropy_pl.estimators.estimate import standard_error
from entropy_pl.estimators.snis import Integrand, Normalize, Weighting
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.precision import evaluation, float64_evaluation, refuse_quantized
from entropy_pl.policy.score import head_inputs, token_stats
from entropy_pl.policy.tangents import Method, Tangents, resolve_method, tangents
from entropy_pl.probe.result import ProbeResult, SweepPoint, SymmetricPoint
from entropy_pl.probe.scores import ProbeScores, prompt_clusters
from entropy_pl.probe.timing import timed
from entropy_pl.rollout import Rollout
from entropy_pl.updates.vector import UpdateVector

Precision = Literal["float32", "float64"]
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
class EntropyProbe:
    """Measures ΔH(η) and its first and second order on one E-batch.

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
        temperature: of the sampling distribution E was drawn from.
        method: how tangents are made: ``auto``, ``forward_mode`` or ``central_difference``.
        precision: ``float32``, or ``float64`` for the whole forward pass.
        entropy_dtype: of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch; None bounds the logits' memory.

    Raises:
        ValueError: for an option out of range.

    Example:
        probe = EntropyProbe(eta_multipliers=(0.5, 1, 2))
        result = probe.measure(model, rollout, recorder.update)   # model at θ, rollout drawn from it
        print(result.taken.true, result.taken.first_order)
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
    temperature: float = 1.0
    method: Method = "auto"
    precision: Precision = "float32"
    entropy_dtype: Precision = "float64"
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        Measure(self.normalize, self.weighting, self.integrand, self.clip_log_weight)
        for name in ("etas", "eta_multipliers"):
            for eta in getattr(self, name):
                if not math.isfinite(eta) or eta == 0:
                    raise ValueError(f"expected every number in {name} finite and not 0, got {eta}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature > 0, got {self.temperature}")
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

    def evaluation(self, model: nn.Module) -> AbstractContextManager[None]:
        """The precision a probe works in; draw the E-batch inside it, so that sampler and scorer agree."""
        return float64_evaluation(model) if self.precision == "float64" else evaluation(model)

    def check(self, model: nn.Module) -> None:
        """Refuse a policy of which this probe could not be taken, before anything is drawn.

        Raises:
            ValueError: for forward mode or float64 with quantized layers.
        """
        resolve_method(model, self.method)
        if self.precision == "float64":
            refuse_quantized(model, "float64", "load it unquantized, or probe in float32")

    @property
    def needs_features(self) -> bool:
        """Whether the baseline is a critic's, which looks at hidden states."""
        return self.baseline in ("critic", "gae")

    def passes(self, lr: float) -> int:
        """Passes over E that :meth:`measure` takes: one for θ or forward mode, two for differences, one per η."""
        return 3 + len(self.sweep_etas(lr)) + self.needs_features

    def measure(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        *,
        clusters: Tensor | None = None,
        peers: Peers = ALONE,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> ProbeResult:
        """Measure the entropy at θ and its change along the update.

        Args:
            model: the policy at θ, the parameters the E-batch was drawn from.
            rollout: the E-batch, ``[N, T]``, drawn at this probe's temperature with top_p = 1 and no top-k.
            update: v.
            clusters: prompt of each sequence, ``[N]``; None groups equal prompts by themselves.
            peers: the run's processes, each with a share of the E-batch as its ``rollout`` (rows of ``clusters``
                likewise): all of them call this, and all get the result of the whole batch. A share may be empty.
            on_pass: called with a phase's name after every pass over E, for progress bars.

        Raises:
            ValueError: for an E-batch no estimate can be made of.
            NonFiniteError: if the policy's logits are not finite, at θ or at a θ+ηv of the sweep.
            PeerError: if another process failed.
        """
        scores = self.collect(model, rollout, update, clusters=clusters, peers=peers, on_pass=on_pass)
        return self.reduce(scores, update)

    def collect(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        *,
        clusters: Tensor | None = None,
        peers: Peers = ALONE,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> ProbeScores:
        """The model passes of :meth:`measure`, with its arguments and errors."""
        with peers.together():
            scores = self._score(model, rollout, update, clusters, peers, on_pass)
            if peers.size > 1:
                scores, rollout = scores.to("cpu"), rollout.to("cpu")
            shares = peers.exchange((scores, rollout))
        scores = ProbeScores.concatenate([share for share, _ in shares])
        if clusters is None:
            clusters = prompt_clusters(Rollout.concatenate([share for _, share in shares]))
            scores = replace(scores, clusters=clusters)
        return scores

    def _score(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        clusters: Tensor | None,
        peers: Peers,
        on_pass: Callable[[str], None],
    ) -> ProbeScores:
        """The passes over this process's share."""
        seconds: dict[str, float] = {}
        features = None
        shifted = {}
        with self.evaluation(model):
            with timed(seconds, "tangents", model):
                tangent = self._tangents(model, rollout, update, peers, on_pass)
            if self.needs_features:
                with timed(seconds, "features", model):
                    features = head_inputs(model, rollout, max_batch_tokens=self.max_batch_tokens)
                on_pass("features")
            with timed(seconds, "sweep", model):
                for eta in self.sweep_etas(update.lr):
                    shifted[eta] = token_stats(model, rollout, update=update, eta=eta, **self._scoring)
                    on_pass("sweep")
        assert tangent.second is not None
        return ProbeScores(
            tangent.base,
            tangent.first,
            tangent.second,
            shifted,
            clusters,
            features,
            tangent.method,
            tangent.step,
            seconds,
        )

    def reduce(self, scores: ProbeScores, update: UpdateVector) -> ProbeResult:
        """The estimates of :meth:`measure`, from scores at hand; no model is needed.

        Args:
            scores: of the whole E-batch, or of some of its sequences.
            update: v, for its norms and its learning rate.

        Raises:
            ValueError: for scores no estimate can be made of, or a critic without features.
        """
        error_bar: dict[str, Any] = {"clusters": scores.clusters, "confidence": self.confidence}
        shared = {"normalize": self.normalize, "integrand": self.integrand, **error_bar}
        options = {**shared, "weighting": self.weighting}
        matched = first = first_order_delta_entropy(scores.base, scores.tangent, **options)
        baseline = self._baseline_of(scores)
        fit_variance = self._fit_variance(scores, baseline, options)
        if baseline is not None:
            first = first_order_delta_entropy(scores.base, scores.tangent, baseline=baseline, **options)
            first = _less_certain(first, fit_variance)
        sweep = []
        for eta, shifted in scores.shifted.items():
            true = snis_delta_entropy(scores.base, shifted, clip_log_weight=self.clip_log_weight, **options)
            if baseline is not None:
                true = low_variance_delta_entropy(true, matched, first, eta, **error_bar)
            true = _less_certain(true, eta**2 * fit_variance)
            sweep.append(SweepPoint(eta, eta == update.lr, true, first.scaled(eta)))
        forward = [point for point in sweep if point.eta > 0]
        second = second_order_delta_entropy(scores.base, scores.tangent, scores.curvature, **options)
        eta_star, eta_star_stderr = _eta_star(first, second, scores.clusters)
        return ProbeResult(
            entropy=entropy_estimate(scores.base, **shared),
            first_order=first,
            second_order=second,
            eta_star=eta_star,
            eta_star_stderr=eta_star_stderr,
            sweep=sweep,
            symmetric=[
                SymmetricPoint(eta, _less_certain(odd, fit_variance), even)
                for eta, plus, minus in _pairs(sweep)
                for odd, even in [symmetric_difference(plus, minus, eta, **error_bar)]
            ],
            power_law=fit_power_law([p.eta for p in forward], [p.true.value for p in forward]),
            lr=update.lr,
            update_norm=update.norm(),
            update_components=update.component_norms(),
            update_gap=update.gap(),
            update_split_absent=update.split_absent,
            method=scores.method,
            difference_step=scores.difference_step,
            seconds=dict(scores.seconds),
            settings={name: getattr(self, name) for name in RECORDED_SETTINGS},
        )

    @property
    def _scoring(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "entropy_dtype": getattr(torch, self.entropy_dtype),
            "max_batch_tokens": self.max_batch_tokens,
        }

    def _tangents(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        peers: Peers,
        on_pass: Callable[[str], None],
    ) -> Tangents:
        """First and second derivatives: forward mode has no cheap second order, so differences supply it."""
        options = {**self._scoring, "peers": peers, "on_pass": on_pass}
        tangent = tangents(model, rollout, update, method=self.method, **options)
        if tangent.second is None:
            differences = tangents(model, rollout, update, method="central_difference", base=tangent.base, **options)
            tangent = replace(tangent, second=differences.second, step=differences.step)
        return tangent

    def _baseline_of(self, scores: ProbeScores) -> Tensor | None:
        return score_baseline(
            self.baseline,
            scores.base,
            features=scores.features,
            gae_lambda=self.gae_lambda,
            normalize=self.normalize,
            weighting=self.weighting,
            integrand=self.integrand,
            clusters=scores.clusters,
        )

    def _fit_variance(self, scores: ProbeScores, baseline: Tensor | None, options: dict[str, Any]) -> float:
        """Variance of δH₁ per unit η that its influences leave out: the noise of gae's critic, which moves it.

        Two jackknives over the same groups, with the critic fitted anew and with its baseline as it is: their own
        noise, which a comparison with the influences would take for the critic's, cancels.
        """
        if baseline is None or self.baseline != "gae" or self.gae_lambda == 1 or not self.jackknife_groups:
            return 0.0

        def variance(anew: bool) -> float:
            def estimate(rows: Tensor) -> float:
                part = scores.select(rows)
                subtracted = self._baseline_of(part) if anew else baseline[rows]
                of_part = {**options, "clusters": part.clusters, "baseline": subtracted}
                return first_order_delta_entropy(part.base, part.tangent, **of_part).value

            groups = self.jackknife_groups
            return jackknife_standard_error(estimate, len(scores), clusters=scores.clusters, groups=groups) ** 2

        return max(variance(anew=True) - variance(anew=False), 0.0)


def _less_certain(estimate: EntropyChange, variance: float) -> EntropyChange:
    """The estimate with a variance its influences do not hold."""
    return estimate.with_stderr(math.hypot(estimate.stderr, math.sqrt(variance))) if variance else estimate


def _pairs(sweep: list[SweepPoint]) -> list[tuple[float, EntropyChange, EntropyChange]]:
    """Every η > 0 with the changes at η and at −η, where the sweep holds both."""
    at = {point.eta: point.true for point in sweep}
    return [(eta, at[eta], at[-eta]) for eta in at if eta > 0 and -eta in at]


def _eta_star(
    first: EntropyChange, second: EntropyChange, clusters: Tensor | None
) -> tuple[float | None, float | None]:
    """η* = 2|a|/|b| and its standard error, from the influences of a and b (delta method)."""
    if not first.value or not second.value:
        return (0.0 if second.value else None), None
    eta_star = 2 * abs(first.value) / abs(second.value)
    influence = eta_star * (first.influence / first.value - second.influence / second.value)
    return eta_star, standard_error(influence, clusters)[0]
