"""What the first order multiplies tangents by, against its own value, finite differences and the closed form."""

from __future__ import annotations

import pytest
import torch
from samples import OPTIONS, N, T, ragged
from torch import Tensor

from entropy_pl.estimators import (
    Measure,
    first_order_coefficients,
    first_order_delta_entropy,
    score_baseline,
    score_return,
)
from entropy_pl.rollout import TokenStats


def baseline_of(kind: str, base: TokenStats, options: dict[str, str]) -> Tensor | None:
    if kind == "random":
        return torch.randn(N, T, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    features = torch.randn(int(base.mask.sum()), 3, generator=torch.Generator().manual_seed(8))
    return score_baseline(kind, base, features=features, **options)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
@pytest.mark.parametrize("kind", ["none", "random", "position", "critic", "gae"])
def test_the_first_order_is_the_tangents_times_the_coefficients(normalize, weighting, integrand, kind):
    base, tangent = ragged()
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    baseline = baseline_of(kind, base, options)
    found = first_order_coefficients(base, baseline=baseline, **options)
    value = first_order_delta_entropy(base, tangent, baseline=baseline, **options).value
    terms = found.logp * tangent.logp + found.entropy * tangent.entropy
    # float64 sums of some 130 terms that partly cancel: 1e-12 of what they add up to in size
    assert float(terms.sum()) == pytest.approx(value, rel=1e-12, abs=1e-12 * float(terms.abs().sum()))
    assert found.logp.dtype == found.entropy.dtype == torch.float64
    assert not found.logp[~base.mask].any()
    assert not found.entropy[~base.mask].any()


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_one_tangent_at_a_time_is_a_finite_difference_of_the_reducer(normalize, weighting, integrand):
    base, _ = ragged()
    measure = Measure(normalize, weighting, integrand)
    found = first_order_coefficients(base, normalize=normalize, weighting=weighting, integrand=integrand)
    step = 1e-5  # symmetric: off by step² of a third derivative, and by 1e-16/step of rounding; both 1e-11
    for i, k in [(0, 0), (3, 1), (N - 1, 0), *base.mask.nonzero()[-3:].tolist(), *(~base.mask).nonzero()[:2].tolist()]:
        bump = torch.zeros(N, T, dtype=torch.float64)
        bump[i, k] = step
        s, h = base.logp, base.entropy
        for coefficient, ds, dh in ((found.logp, bump, 0 * bump), (found.entropy, 0 * bump, bump)):
            up, down = (measure.reduce(s, s + e * ds, h + e * dh, base.mask)[0] for e in (1, -1))
            assert float(coefficient[i, k]) == pytest.approx(float(up - down) / (2 * step), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_with_a_baseline_they_are_the_closed_form(normalize, weighting, integrand):
    """a = (G − baseline)/ΣT, one less in the numerator for a surprisal, whose derivative is −ṡ; b = 1/ΣT or none."""
    base, _ = ragged()
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    baseline = baseline_of("random", base, options)
    found = first_order_coefficients(base, baseline=baseline, **options)
    count = int(base.mask.sum()) if normalize == "per_token" else N
    of_h, of_s = (1.0, 0.0) if integrand == "rao_blackwell" else (0.0, 1.0)
    a = (score_return(base, **options) - baseline - of_s) * base.mask / count
    b = of_h * base.mask.double() / count
    torch.testing.assert_close(found.logp, a, rtol=1e-12, atol=1e-13)  # sums of N·T numbers of size 1, over N
    torch.testing.assert_close(found.entropy, b, rtol=1e-12, atol=1e-13)


def test_they_carry_no_graph_of_the_statistics():
    base, _ = ragged()
    attached = TokenStats(base.logp.clone().requires_grad_(), base.entropy, base.mask)
    assert not first_order_coefficients(attached).logp.requires_grad


def test_a_baseline_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"baseline of shape \[37, 6\], got \[37, 1\]"):
        first_order_coefficients(ragged()[0], baseline=torch.zeros(N, 1))
