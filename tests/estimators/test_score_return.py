"""What ṡ_ik is multiplied by, against its definition in loops."""

from __future__ import annotations

import pytest
import torch
from samples import OPTIONS, N, T, ragged

from entropy_pl.estimators import first_order_delta_entropy, score_return


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_score_return_is_its_definition_in_loops(normalize, weighting, integrand):
    base, _ = ragged()
    x = (base.entropy if integrand == "rao_blackwell" else -base.logp).numpy()
    m = base.mask.double().numpy()
    centre = (x * m).sum() / m.sum() if normalize == "per_token" else 0.0
    expected = torch.zeros(N, T, dtype=torch.float64)
    for i in range(N):
        for k in range(T):
            for j in range(T):
                counts = j > k or weighting == "sequence"
                adds = counts or (j == k and integrand == "surprisal")
                expected[i, k] += m[i, k] * m[i, j] * (adds * x[i, j] - counts * centre)
    found = score_return(base, normalize=normalize, weighting=weighting, integrand=integrand)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("normalize", "weighting", "integrand"), OPTIONS)
def test_the_return_itself_as_a_baseline_leaves_the_pathwise_term(normalize, weighting, integrand):
    """Nothing is left to multiply ṡ_ik by: the first order is Σ ẋ_ik / ΣT (x = h, or −s whose derivative is −ṡ)."""
    base, tangent = ragged()
    options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    estimate = first_order_delta_entropy(base, tangent, baseline=score_return(base, **options), **options)
    xdot = tangent.entropy if integrand == "rao_blackwell" else -tangent.logp
    count = base.mask.sum() if normalize == "per_token" else N
    assert estimate.value == pytest.approx(float(xdot.sum() / count), rel=1e-11)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match=r"weighting .*prefix.* got 'token'"):
        score_return(ragged()[0], weighting="token")
