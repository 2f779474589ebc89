"""The reducer: what the policy says of one batch at θ and at θ+ηv, turned into an entropy and its influences.

Everything this package reports is this reducer or a derivative of it, so that ΔH and δH₁ of one batch share
their noise and differ by curvature alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from entropy_pl.estimators.estimate import EntropyChange, Weights, make_estimate, standard_error
from entropy_pl.rollout import TokenStats

Normalize = Literal["per_token", "per_sequence"]
Weighting = Literal["prefix", "sequence"]
Integrand = Literal["rao_blackwell", "surprisal"]
Clusters = Tensor | Sequence[int] | None


@dataclass(frozen=True)
class Measure:
    """Which entropy is meant, and how importance weights carry it from θ to θ+ηv.

    Args:
        normalize: ``per_token``, E[H_i]/E[T_i], or ``per_sequence``, E[H_i].
        weighting: ``prefix`` (per-decision weights, less variance) or ``sequence`` (classical SNIS).
        integrand: ``rao_blackwell``, the entropy h_ik at each prefix, or ``surprisal``, −s_ik.
        clip_log_weight: bound on the absolute log weight; None leaves the weights, and the estimate, alone.

    Raises:
        ValueError: if an option is none of these.
    """

    normalize: Normalize = "per_token"
    weighting: Weighting = "prefix"
    integrand: Integrand = "rao_blackwell"
    clip_log_weight: float | None = None

    def __post_init__(self) -> None:
        for name, options in (("normalize", Normalize), ("weighting", Weighting), ("integrand", Integrand)):
            if getattr(self, name) not in get_args(options):
                raise ValueError(f"expected {name} to be one of {get_args(options)}, got {getattr(self, name)!r}")
        if self.clip_log_weight is not None and not self.clip_log_weight > 0:
            raise ValueError(f"expected clip_log_weight > 0 or None, got {self.clip_log_weight}")

    def log_weights(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Log importance weights of the integrand and of the token count at every position, ``[N, T]`` each.

        ``sequence``: Σ_k r_ik everywhere. ``prefix``: Σ_{j<k} r_ij, for a surprisal Σ_{j≤k} r_ij, because −s_ik
        depends on token k itself while h_ik and m_ik depend on the prefix alone. Zeros after the end freeze both.
        """
        including = log_ratio.cumsum(1)
        if self.weighting == "sequence":
            integrand = count = including[:, -1:].expand_as(log_ratio)
        else:
            count = torch.cat([torch.zeros_like(including[:, :1]), including[:, :-1]], dim=1)
            integrand = count if self.integrand == "rao_blackwell" else including
        if self.clip_log_weight is None:
            return integrand, count
        bound = self.clip_log_weight
        return integrand.clamp(-bound, bound), count.clamp(-bound, bound)

    def reduce(self, base_logp: Tensor, logp: Tensor, entropy: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy at θ+ηv from completions drawn at θ, with the influence of every sequence.

        Ĥ = Σ_k [Σ_i w_ik m_ik h_ik(η) / Σ_i w_ik], T̂ likewise of m_ik, ψ_i by the quotient rule: the
        per-decision and the classical self-normalized estimators are one formula under two weightings. Pure and
        differentiable in ``logp`` and ``entropy``.

        Args:
            base_logp: s_ik(0), ``[N, T]``.
            logp: s_ik(η), ``[N, T]``.
            entropy: h_ik(η), ``[N, T]``.
            mask: m_ik, ``[N, T]``.

        Returns:
            The value (scalar, nats per token or per sequence) and ψ, ``[N]``.
        """
        log_weight, log_weight_count = self.log_weights(torch.where(mask, logp - base_logp, 0.0))
        integrand = entropy if self.integrand == "rao_blackwell" else -logp
        total, total_influence = _self_normalized_total(log_weight, torch.where(mask, integrand, 0.0))
        if self.normalize == "per_sequence":
            return total, total_influence
        length, length_influence = _self_normalized_total(log_weight_count, mask.to(total.dtype))
        value = total / length
        return value, (total_influence - value * length_influence) / length


def snis_delta_entropy(
    base: TokenStats,
    shifted: TokenStats,
    *,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clip_log_weight: float | None = None,
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """True entropy change ΔH(η) = H(π_{θ+ηv}) − H(π_θ) by self-normalized importance sampling.

    Args:
        base: statistics of completions drawn at θ, at θ; ``[N, T]``.
        shifted: of the same tokens, at θ+ηv.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clip_log_weight: bound on the absolute log weight; None is unbiased to O(1/N).
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The change in nats, with standard error and influences (base's own subtracted).

    Source:
        docs/theory.md, §2; the error bar, §3.

    Raises:
        ValueError: for shapes or masks that disagree, fewer than two sequences, statistics that are not finite,
            or an unknown option.

    Example:
        >>> mask = torch.ones(4, 1, dtype=torch.bool)
        >>> logp = torch.tensor([0.75, 0.75, 0.75, 0.25]).log()[:, None]  # a coin with P(heads) = 3/4
        >>> base = TokenStats(logp, torch.full((4, 1), 0.5623351446), mask)
        >>> fair = TokenStats(torch.full((4, 1), 0.5).log(), torch.full((4, 1), 0.6931471806), mask)
        >>> round(snis_delta_entropy(base, fair, normalize="per_sequence").value, 4)  # ln 2 − 0.5623
        0.1308
    """
    measure = Measure(normalize, weighting, integrand, clip_log_weight)
    check_stats(base, base=base, shifted=shifted)
    s0, h0, mask = _arrays(base)
    s1, h1, _ = _arrays(shifted)
    value, influence = measure.reduce(s0, s1, h1, mask)
    base_value, base_influence = measure.reduce(s0, s0, h0, mask)
    return make_estimate(
        value - base_value,
        influence - base_influence,
        clusters=clusters,
        confidence=confidence,
        mask=mask,
        weights=_weights(torch.where(mask, s1 - s0, 0.0), mask, measure, clusters),
    )


def entropy_estimate(
    base: TokenStats,
    *,
    normalize: Normalize = "per_token",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """The entropy H(π_θ) itself, from completions drawn at θ: the reducer with every weight one.

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The entropy in nats, with standard error and influences.

    Source:
        docs/theory.md, §1; the error bar, §3.

    Raises:
        ValueError: as :func:`snis_delta_entropy`.
    """
    measure = Measure(normalize, "prefix", integrand)
    check_stats(base, base=base)
    s0, h0, mask = _arrays(base)
    value, influence = measure.reduce(s0, s0, h0, mask)
    return make_estimate(value, influence, clusters=clusters, confidence=confidence, mask=mask)


def check_stats(reference: TokenStats, **stats: TokenStats) -> None:
    """Refuse what no estimate can be made of, naming the offender.

    Raises:
        ValueError: for fewer than two sequences, no token at all, another shape or mask than ``reference``'s,
            or numbers that are not finite where the mask is True.
    """
    if len(reference) < 2:
        raise ValueError(
            f"expected at least 2 sequences, for an error bar, got {len(reference)}: draw more completions"
        )
    if not reference.mask.any():
        raise ValueError(
            "expected at least one completion token, got an empty mask, every completion is empty: a mask is True "
            "wherever a token was drawn, the first EOS included"
        )
    for name, stat in stats.items():
        if stat.mask.shape != reference.mask.shape or not torch.equal(stat.mask, reference.mask):
            raise ValueError(
                f"expected the statistics of the same tokens, got {name} with another mask: "
                f"{list(stat.mask.shape)}, {int(stat.mask.sum())} tokens against "
                f"{list(reference.mask.shape)}, {int(reference.mask.sum())}"
            )
        for field in ("logp", "entropy"):
            bad = ~torch.isfinite(getattr(stat, field)) & stat.mask
            if bad.any():
                raise ValueError(
                    f"expected finite numbers in {name}.{field}, got {int(bad.sum())} that are not, "
                    f"the first in sequence {int(bad.nonzero()[0, 0])}"
                )


def _arrays(stats: TokenStats) -> tuple[Tensor, Tensor, Tensor]:
    return stats.logp.detach().double(), stats.entropy.detach().double(), stats.mask


def _self_normalized_total(log_weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_k [Σ_i w_ik x_ik / Σ_i w_ik] and its influences Σ_k w_ik (x_ik − mean_k) / w̄_k."""
    # A common factor per position cancels; taking the largest out keeps exp from overflowing.
    weight = (log_weight - log_weight.amax(0).detach()).exp()
    weight = weight / weight.mean(0)
    mean = (weight * x).mean(0)
    return mean.sum(), (weight * (x - mean)).sum(1)


def _weights(log_ratio: Tensor, mask: Tensor, measure: Measure, clusters: Clusters) -> Weights:
    """Effective sample sizes, the mean weight, the largest log weight and the clipped share of those in use."""
    bound = measure.clip_log_weight
    log_weight, _ = replace(measure, clip_log_weight=None).log_weights(log_ratio)
    magnitude = (log_weight[mask] if measure.weighting == "prefix" else log_weight[:, 0]).abs()
    cumulative = log_ratio.cumsum(1)
    of_sequences = cumulative[:, -1].exp()
    mean = float(of_sequences.mean())
    if bound is not None:
        cumulative = cumulative.clamp(-bound, bound)
    weight = (cumulative - cumulative.amax(0)).exp()
    ess = weight.sum(0).square() / weight.square().sum(0)
    return Weights(
        ess=float(ess[-1]),
        ess_min=float(ess.min() if measure.weighting == "prefix" else ess[-1]),
        mean=mean,
        mean_stderr=standard_error(of_sequences - mean, clusters)[0] if math.isfinite(mean) else 0.0,
        max_abs_log=float(magnitude.max()),
        clip_fraction=0.0 if bound is None else float((magnitude > bound).double().mean()),
    )
