"""The estimators of docs/theory.md written term by term, as oracles.

They compute in Python's complex numbers. With η = i·h and h = 10⁻³⁰, the imaginary part over h is the derivative at
η = 0 to the last digit: nothing is subtracted, so nothing cancels.
"""

from __future__ import annotations

import cmath
from collections.abc import Sequence
from typing import Any

from entropy_pl.rollout import TokenStats

H = 1e-30
Number = complex


def entropy(
    base: TokenStats,
    change: TokenStats,
    eta: Number,
    *,
    normalize: str,
    weighting: str,
    integrand: str,
    clip: float | None = None,
    copies: Sequence[Number] | None = None,
) -> Number:
    """Ĥ at θ+ηv: Σ_k [Σ_i w_ik m_ik x_ik / Σ_i w_ik], over the same of m_ik where it is per token.

    ``copies``: how often each sequence counts, not in whole numbers alone; None: once.
    """
    N, T = base.mask.shape
    logp, h = base.logp.tolist(), base.entropy.tolist()
    sdot, hdot, mask = change.logp.tolist(), change.entropy.tolist(), base.mask.tolist()
    total: Number = 0.0
    length: Number = 0.0
    for k in range(T):
        up: Number = 0.0
        down: Number = 0.0
        count: Number = 0.0
        weights: Number = 0.0
        for i in range(N):
            ratios = [eta * sdot[i][j] if mask[i][j] else 0.0 for j in range(T)]
            if weighting == "sequence":
                of_count = of_integrand = sum(ratios)
            else:
                of_count = sum(ratios[:k])
                of_integrand = of_count if integrand == "rao_blackwell" else sum(ratios[: k + 1])
            often = 1.0 if copies is None else copies[i]
            w, v = (often * cmath.exp(clipped(of, clip)) for of in (of_integrand, of_count))
            x = h[i][k] + eta * hdot[i][k] if integrand == "rao_blackwell" else -(logp[i][k] + eta * sdot[i][k])
            up, down = up + w * (x if mask[i][k] else 0.0), down + w
            count, weights = count + v * (1.0 if mask[i][k] else 0.0), weights + v
        total, length = total + up / down, length + count / weights
    return total / length if normalize == "per_token" else total


def clipped(log_weight: Number, bound: float | None) -> Number:
    real = complex(log_weight).real
    return log_weight if bound is None or abs(real) <= bound else (bound if real > 0 else -bound)


def change_of_entropy(base: TokenStats, change: TokenStats, clip: float | None = None, **options: Any) -> float:
    there, here = (entropy(base, change, eta, clip=clip, **options) for eta in (1.0, 0.0))
    return complex(there - here).real


def slope(base: TokenStats, change: TokenStats, eta: float = 0.0, **options: Any) -> float:
    """The derivative at a real η."""
    return complex(entropy(base, change, complex(eta, H), **options)).imag / H


def influences(base: TokenStats, change: TokenStats, **options: Any) -> list[float]:
    """N times the derivative of ΔH by how often each sequence counts: what an infinitesimal copy of it would do."""
    N = len(base)
    found = []
    for i in range(N):
        copies = [complex(1, H) if j == i else 1.0 for j in range(N)]
        there, here = (entropy(base, change, eta, copies=copies, **options) for eta in (1.0, 0.0))
        found.append(N * complex(there - here).imag / H)
    return found


def closed_form(base: TokenStats, tangent: TokenStats, normalize: str, weighting: str) -> float:
    """The mean of D_i: what the path moves, and what moving the probability of every token changes of what follows."""
    N, T = base.mask.shape
    h, m = base.entropy.tolist(), [[float(x) for x in row] for row in base.mask.tolist()]
    sdot, hdot = tangent.logp.tolist(), tangent.entropy.tolist()
    tokens = sum(map(sum, m))
    centre = sum(h[i][k] * m[i][k] for i in range(N) for k in range(T)) / tokens if normalize == "per_token" else 0.0
    c = [[m[i][k] * (h[i][k] - centre) for k in range(T)] for i in range(N)]
    total = 0.0
    for i in range(N):
        total += sum(hdot[i][k] * m[i][k] for k in range(T))
        for k in range(T):
            after = k + 1 if weighting == "prefix" else 0  # which part of the completion token k's probability weighs
            ours = sum(c[i][after:])
            batch = sum(sum(row[after:]) for row in c) / N
            total += m[i][k] * sdot[i][k] * (ours - batch)
    return total / (tokens if normalize == "per_token" else N)
