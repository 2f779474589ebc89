"""The enumerated policy, scored once, for every test of the estimators."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from enumeration import Enumeration
from samples import ETA, N_LARGE
from torch import Tensor

from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import tangents, token_stats_jvp
from entropy_pl.rollout import TokenStats


@pytest.fixture(scope="session")
def enumeration() -> Enumeration:
    return Enumeration.make(seed=1)


@pytest.fixture(scope="session")
def scored(enumeration: Enumeration) -> dict[str, TokenStats]:
    """Every completion scored once: at θ, at θ+ηv, and its derivatives."""
    with float64_evaluation(enumeration.model):
        base, first = token_stats_jvp(enumeration.model, enumeration.rollout, enumeration.update)
        return {
            "base": base,
            "first": first,
            "second": tangents(
                enumeration.model, enumeration.rollout, enumeration.update, method="central_difference"
            ).second,
            "shifted": token_stats(enumeration.model, enumeration.rollout, update=enumeration.update, eta=ETA),
        }


@pytest.fixture(scope="session")
def drawn(enumeration: Enumeration) -> Tensor:
    """N_LARGE completions drawn by their exact probabilities, as row numbers."""
    p = enumeration.probabilities()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)  # nothing was left out of the enumeration
    return torch.from_numpy(np.random.default_rng(1).choice(len(p), N_LARGE, p=p.numpy() / float(p.sum())))
