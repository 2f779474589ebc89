"""Whether a policy has the derivatives that a probe takes: is it smooth along v, and does autograd follow its forward?

Two kinds of policies are not differentiable as a dense one is. The outputs of some jump along v: a mixture of experts
routes a token elsewhere, activations that are quantized on the fly move by a level. Differences across such jumps are
no derivatives, so the first and second order and all that is made of them are withheld; ΔH needs none. In others
autograd is told not to follow a part of the forward pass (the norm of DoRA, stop-gradients, straight-through layers):
differences are right there, and what autograd makes, the attribution, is withheld.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from entropy_pl.attribution import Attribution
from entropy_pl.estimators import EntropyChange, first_order_delta_entropy
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.settings import ProbeSettings
from entropy_pl.rollout import TokenStats

CHECKED_SEQUENCES = 64
"""Sequences whose derivatives are taken again at half the step: enough to tell a spread of 0.1 from one of 0.001."""
ROUGH = 0.1
"""Largest sd(ψ(h) − ψ(h/2))/sd(ψ(h)) of a smooth policy; docs/precision.md has what policies of each kind reach."""
AUTOGRAD_GAP = 0.05
"""Largest gap between the slope by autograd and that by differences, as a share of max(|δH₁|, its standard error)."""
ERRORS_OF_DIFFERENCES = 3.0
"""A gap within so many errors of the differences themselves says nothing of autograd."""


class WithheldError(ValueError):
    """A result is not given, because the policy has not the derivatives that it is made of; the message says why."""


@dataclass(frozen=True, eq=False)
class Derivatives:
    """The first derivatives that a probe reduces, and what is known of them.

    Args:
        tangent: (ṡ, ḣ) per unit η, ``[N, T]``.
        method: what made them, ``forward_mode`` or ``central_difference``.
        roughness: sd(ψ(h) − ψ(h/2))/sd(ψ(h)) of δH₁'s influences, h the difference step; None if not measured.
        difference_error: how far δH₁ at h is from δH₁ at h/2, over the sequences checked, per unit η; 0 of forward
            mode, and None if not measured.
        withheld: why no derivative may be used, a sentence; None where they may be.
        autograd: why what autograd makes may not be used, a sentence, as far as forward mode tells.
    """

    tangent: TokenStats
    method: str
    roughness: float | None = None
    difference_error: float | None = None
    withheld: str | None = None
    autograd: str | None = None


def judge_derivatives(settings: ProbeSettings, scores: ProbeScores) -> Derivatives:
    """Compare derivatives at the difference step h and at h/2, and those of forward mode with both.

    A comparison of the two values would see nothing: their noise is shared, or hides it. That of the influences,
    sequence by sequence, does: those of dense policies differ by a thousandth of their spread, those of a mixture of
    experts by all of it.

    Args:
        settings: which estimate's influences.
        scores: of the whole E-batch.
    """
    halved, differences = scores.halved, scores.tangent if scores.differences is None else scores.differences
    if halved is None or len(halved.first) < 2 or not halved.first.mask.any():
        return Derivatives(scores.tangent, scores.method)
    rows = halved.rows.nonzero().squeeze(1)
    base = scores.base.select(rows)

    def slope(tangent: TokenStats) -> EntropyChange:
        return first_order_delta_entropy(base, tangent, **settings.estimate)

    whole, half = slope(differences.select(rows)), slope(halved.first)
    roughness = _relative_spread(whole.influence - half.influence, whole.influence)
    error = abs(whole.value - half.value)
    if roughness > ROUGH:
        reason = (
            f"The policy is not smooth along v: influences at the difference step and at half of it differ by "
            f"{roughness:.2g} of their spread (a dense policy's by less than {ROUGH:g}), as where a mixture of experts "
            "routes tokens elsewhere or activations are quantized. First and second order, η* and attribution are "
            "withheld; ΔH needs no derivative and stands."
        )
        return Derivatives(scores.tangent, scores.method, roughness, error, withheld=reason)
    if scores.differences is None:
        return Derivatives(scores.tangent, scores.method, roughness, error)
    exact, measured = (
        first_order_delta_entropy(scores.base, tangent, clusters=scores.clusters, **settings.estimate)
        for tangent in (scores.tangent, scores.differences)
    )
    if abs(exact.value - measured.value) <= AUTOGRAD_GAP * max(abs(measured.value), measured.stderr):
        return Derivatives(scores.tangent, scores.method, roughness, 0.0)
    reason = (
        f"Forward mode does not follow the policy's forward pass: its slope is {exact.value:.4g} per unit η, and that "
        f"of differences, which are smooth, {measured.value:.4g} ± {measured.stderr:.2g}. A layer stops gradients (the "
        "norm of DoRA) or passes them straight through. δH₁ is by differences, and the attribution is withheld."
    )
    return Derivatives(scores.differences, "central_difference", roughness, error, autograd=reason)


def checked_attribution(
    settings: ProbeSettings, scores: ProbeScores, baseline: Tensor | None, attribution: Attribution
) -> Attribution:
    """The attribution, if the gradient that it is made of is the derivative of the policy's forward pass.

    Raises:
        WithheldError: if ⟨∇Ĥ, v⟩ is not the slope that differences of the forward pass give.
    """
    found = judge_derivatives(settings, scores)
    differences = found.tangent if scores.differences is None else scores.differences
    slope = first_order_delta_entropy(
        scores.base, differences, baseline=baseline, clusters=scores.clusters, **settings.estimate
    )
    gap = abs(attribution.first_order - slope.value)
    of_differences = ERRORS_OF_DIFFERENCES * (found.difference_error or 0.0)
    if gap > max(AUTOGRAD_GAP * max(abs(slope.value), slope.stderr), of_differences):
        raise WithheldError(
            f"The attribution is withheld: the gradient that autograd gives along v, {attribution.first_order:.4g} per "
            f"unit η, is not the slope of the policy's forward pass, {slope.value:.4g} ± {slope.stderr:.2g}. A layer "
            "stops gradients (the norm of DoRA) or passes them straight through; δH₁ is by differences, and stands."
        )
    return attribution


def _relative_spread(difference: Tensor, reference: Tensor) -> float:
    """sd(difference)/sd(reference); 0 where nothing varies."""
    spread = float(difference.std())
    return spread / scale if (scale := float(reference.std())) else (math.inf if spread else 0.0)
