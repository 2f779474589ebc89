"""First and second order: the reducer's directional derivatives at η = 0, error bars included.

No formula is written a second time here. The path η ↦ reduce(s + ηṡ + ½η²s̈, h + ηḣ + ½η²ḧ) is differentiated by
forward mode, its value and its influences together; the closed forms live in the tests as oracles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, jvp

from entropy_pl.estimators.estimate import EntropyChange, make_estimate
from entropy_pl.estimators.snis import Clusters, Integrand, Measure, Normalize, Weighting, check_stats
from entropy_pl.rollout import TokenStats

Path = Callable[[Tensor], tuple[Tensor, Tensor]]


def first_order_delta_entropy(
    base: TokenStats,
    tangent: TokenStats,
    *,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    baseline: Tensor | None = None,
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """First-order change per unit η, δH₁/η = ⟨∇H, v⟩, from the tangents ṡ and ḣ along v.

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        tangent: their derivatives per unit η (:func:`entropy_pl.token_stats_jvp`), ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        baseline: ``[N, T]``, a prediction, from the prefix of token k alone, of what ṡ_ik is multiplied by
            (:func:`score_return`); :func:`entropy_pl.estimators.score_baseline` makes some. It replaces the batch
            mean that self-normalization subtracts; unbiased to O(1/N) whatever it predicts.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The slope in nats per unit η, with standard error and influences.

    Source:
        docs/theory.md, §4; with a baseline, §9.

    Raises:
        ValueError: as :func:`entropy_pl.estimators.snis_delta_entropy`, or for a baseline of another shape.
    """
    measure = Measure(normalize, weighting, integrand)
    check_stats(base, base=base, tangent=tangent)
    value, influence = _first_order(measure, base, tangent, baseline)
    return make_estimate(value, influence, clusters=clusters, confidence=confidence, mask=base.mask)


def first_order_coefficients(
    base: TokenStats,
    *,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    baseline: Tensor | None = None,
) -> TokenStats:
    """What :func:`first_order_delta_entropy` multiplies every token's tangents by: δH₁ = Σ_ik a_ik ṡ_ik + b_ik ḣ_ik.

    The reported value is linear in the tangents; this is its gradient, by reverse mode through the same calculation,
    the baseline's control variate included. Σ a ∂s/∂θ + b ∂h/∂θ is then ∇Ĥ itself, from one backward pass.

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        baseline: ``[N, T]``, as for :func:`first_order_delta_entropy`.

    Returns:
        a (``logp``, nats) and b (``entropy``, a number), ``[N, T]``, float64, zero where the mask is False.

    Source:
        docs/theory.md, §11.

    Raises:
        ValueError: as :func:`first_order_delta_entropy`.
    """
    measure = Measure(normalize, weighting, integrand)
    check_stats(base, base=base)
    base = base.detach()

    def value_along(sdot: Tensor, hdot: Tensor) -> Tensor:
        return _first_order(measure, base, TokenStats(sdot, hdot, base.mask), baseline)[0]

    standstill = torch.zeros(base.mask.shape, dtype=torch.float64, device=base.logp.device)
    a, b = grad(value_along, argnums=(0, 1))(standstill, standstill)
    return TokenStats(a, b, base.mask)


def second_order_delta_entropy(
    base: TokenStats,
    tangent: TokenStats,
    curvature: TokenStats,
    *,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    confidence: float = 0.95,
) -> EntropyChange:
    """Second derivative of the entropy along v, v'∇²H v, per unit η².

    Args:
        base: statistics at θ, ``[N, T]``.
        tangent: first derivatives (ṡ, ḣ), ``[N, T]``.
        curvature: second derivatives (s̈, ḧ), ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clusters: prompt of each sequence, ``[N]``, where prompts repeat.
        confidence: of the interval.

    Returns:
        The curvature in nats per unit η², with standard error and influences.

    Source:
        docs/theory.md, §5.

    Raises:
        ValueError: as :func:`first_order_delta_entropy`.
    """
    measure = Measure(normalize, weighting, integrand)
    check_stats(base, base=base, tangent=tangent, curvature=curvature)
    value, influence = _derivative(_derivative(_path(measure, base, tangent, curvature)))(_origin(base))
    return make_estimate(value, influence, clusters=clusters, confidence=confidence, mask=base.mask)


def score_return(
    base: TokenStats,
    *,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
) -> Tensor:
    """What the first order multiplies ṡ_ik by, before any baseline: all that token k's probability can change.

    With ĥ = ΣH/ΣT for ``per_token`` and ĥ = 0 for ``per_sequence``:

        prefix, rao_blackwell:  Σ_{j>k} m_ij (h_ij − ĥ)
        prefix, surprisal:      Σ_{j≥k} m_ij (−s_ij) − ĥ Σ_{j>k} m_ij
        sequence:               the whole Σ_j m_ij (x_ij − ĥ), x_ij = h_ij or −s_ij

    Args:
        base: statistics at θ of completions drawn at θ, ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.

    Returns:
        ``[N, T]`` in nats, float64, zero where the mask is False.

    Source:
        docs/theory.md, §4, C_{i,k+1} and the surprisal's variant of it.

    Raises:
        ValueError: for an unknown option, or statistics no estimate can be made of.
    """
    measure = Measure(normalize, weighting, integrand)
    check_stats(base, base=base)
    rao_blackwell = measure.integrand == "rao_blackwell"
    mask = base.mask.double()
    x = torch.where(base.mask, (base.entropy if rao_blackwell else -base.logp).detach().double(), 0.0)
    centre = x.sum() / mask.sum() if measure.normalize == "per_token" else mask.new_zeros(())
    if measure.weighting == "sequence":
        return mask * (x - centre * mask).sum(1, keepdim=True)
    # m_ij, and h_ij with it, is settled before token k = j is drawn; −s_ij is that token's own doing.
    to_go = _from_here_on(x) - x if rao_blackwell else _from_here_on(x)
    return mask * (to_go - centre * (_from_here_on(mask) - mask))


def _first_order(
    measure: Measure, base: TokenStats, tangent: TokenStats, baseline: Tensor | None
) -> tuple[Tensor, Tensor]:
    """δH₁ per unit η and its influences, ``[N]``; differentiable in the tangents."""
    value, influence = _derivative(_path(measure, base, tangent, None))(_origin(base))
    if baseline is None:
        return value, influence
    if baseline.shape != base.mask.shape:
        raise ValueError(f"expected a baseline of shape {list(base.mask.shape)}, got {list(baseline.shape)}")
    gain = _control_variate(measure, base, tangent, baseline.to(value))
    return value - gain.mean(), influence - (gain - gain.mean())


def _path(measure: Measure, base: TokenStats, tangent: TokenStats, curvature: TokenStats | None) -> Path:
    s, h = base.logp.double(), base.entropy.double()
    s1, h1 = tangent.logp.double(), tangent.entropy.double()
    s2, h2 = (curvature.logp.double(), curvature.entropy.double()) if curvature else (0.0, 0.0)

    def reduce_at(eta: Tensor) -> tuple[Tensor, Tensor]:
        half_square = eta * eta / 2
        return measure.reduce(s, s + eta * s1 + half_square * s2, h + eta * h1 + half_square * h2, base.mask)

    return reduce_at


def _derivative(path: Path) -> Path:
    def derivative_at(eta: Tensor) -> tuple[Tensor, Tensor]:
        return jvp(path, (eta,), (torch.ones_like(eta),))[1]

    return derivative_at


def _origin(base: TokenStats) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=base.logp.device)


def _from_here_on(x: Tensor) -> Tensor:
    """Σ_{j≥k} x_ij, ``[N, T]``."""
    return x.flip(1).cumsum(1).flip(1)


def _control_variate(measure: Measure, base: TokenStats, tangent: TokenStats, baseline: Tensor) -> Tensor:
    """Σ_k ṡ_ik (baseline_ik − the batch mean it replaces) / T̄ per sequence, ``[N]``; zero in expectation."""
    mask = base.mask.double()
    batch_mean = score_return(
        base, normalize=measure.normalize, weighting=measure.weighting, integrand=measure.integrand
    ).mean(0)  # over all N, ended ones counted as zero
    if measure.weighting == "sequence":
        batch_mean = batch_mean[:1]  # one weight for the whole sequence: at its end, too, all N are averaged
    length = mask.sum(1).mean() if measure.normalize == "per_token" else mask.new_ones(())
    sdot = torch.where(base.mask, tangent.logp.double(), 0.0)
    return (sdot * (baseline - batch_mean)).sum(1) / length
