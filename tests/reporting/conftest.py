"""Records like those a probe leaves behind, from a step and a few numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from entropy_pl.reporting import AttributedTokens


def estimate(value: float, stderr: float, ess: float = 200.0) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "ci_low": value - 2.5 * stderr,
        "ci_high": value + 2.5 * stderr,
        "ess": ess,
        "n_sequences": 256,
        "n_tokens": 9000,
    }


def probe_record(step: int = 0, *, multipliers: tuple[float, ...] = (0.5, 1, 2), **others: Any) -> dict[str, Any]:
    """ΔH(η) = −(12 + step) η + ½·30000 η², measured at multiples of lr = 1e-4."""
    lr, slope, curvature = 1e-4, -12.0 - step, 3e4
    sweep = [
        {
            "eta": m * lr,
            "taken": m == 1,
            "true": estimate(slope * m * lr + 0.5 * curvature * (m * lr) ** 2, 2 * m * lr, ess=200 / m),
            "first_order": estimate(slope * m * lr, 1.5 * m * lr),
        }
        for m in multipliers
    ]
    record = {
        "schema": 2,
        "kind": "probe",
        "status": "ok",
        "message": None,
        "step": step,
        "lr": lr,
        "reward": 0.25 + 0.01 * step,
        "entropy": estimate(0.9, 0.02),
        "first_order": estimate(slope, 1.5),
        "second_order": estimate(curvature, 4e3),
        "eta_star": 8e-4,
        "eta_star_ci_low": 5e-4,
        "eta_star_ci_high": 2e-3,
        "sweep": sweep,
        "update_norm": 3.2,
        "normalize": "per_token",
    }
    return {**record, **others}


def failed_record(step: int, status: str = "failed", message: str = "got NaN in [256, 48]") -> dict[str, Any]:
    return {"schema": 2, "kind": "probe", "status": status, "message": message, "step": step, "lr": 1e-4}


def attributed_tokens(
    prompts: int = 2, completions: int = 3, length: int = 20, n_eval: int = 8, seed: int = 0, **others: Any
) -> AttributedTokens:
    """Made-up tokens: −(log π + h)·A times a heavy-tailed factor, one token in four with π near 1."""
    generator = np.random.default_rng(seed)
    N = prompts * completions
    lengths = np.maximum(1, generator.integers(length // 2, length + 1, N))
    sequence = np.repeat(np.arange(N), lengths)
    n = len(sequence)
    logp = -generator.exponential(0.6, n) * np.where(generator.random(n) < 0.25, 1e-4, 1.0)
    entropy = np.abs(-0.8 * logp + 0.1 * generator.random(n))
    advantages = generator.normal(size=N).round(2)
    advantages[0] = 0.0
    values = -1e-6 * (logp + entropy + 0.2) * advantages[sequence] * generator.standard_t(3, n) ** 2
    sequence_values = np.bincount(sequence, weights=values, minlength=N)
    noise = generator.normal(size=(n_eval, N)) * np.abs(sequence_values).max()
    words = [" the", " eggs", " 16", "\n", " so", ".", " $", "####", " =", " she", "\u202e", "ß", " sold"]
    fields: dict[str, Any] = {
        "step": 40,
        "eta": 1e-5,
        "unit": "per_token",
        "values": values,
        "logp": logp,
        "entropy": entropy,
        "advantages": advantages[sequence],
        "sequence": sequence,
        "position": np.concatenate([np.arange(count) for count in lengths]),
        "text": [words[i] for i in generator.integers(0, len(words), n)],
        "prompts": [f"Question {i // completions}: how much is $x$ <eggs>?\nAnswer:" for i in range(N)],
        "sequence_values": sequence_values,
        "sequence_stderr": 0.3 * np.abs(sequence_values),
        "matrix": sequence_values + noise - noise.mean(0),
        "totals": {
            "momentum": -4e-4,
            "weight_decay": 1e-6,
            "tokens": float(values.sum()),
            "remainder": 2e-7,
            "first_order": -4e-4 + 1.2e-6 + float(values.sum()),
        },
        "errors": {
            "momentum": {"stderr": 3e-5, "stderr_u": None},
            "tokens": {"stderr": 2e-6, "stderr_u": 4e-6},
            "positive_advantage": {"stderr": 1.5e-6, "stderr_u": 2.5e-6},
        },
        "reach": 2.5,
    }
    return AttributedTokens(**{**fields, **others})


def attribution_of_record(scale: float = 1.0) -> dict[str, Any]:
    """What a record keeps of an attribution, in nats of the step taken; its intervals are 2.5 standard errors wide."""

    def measured(value: float, stderr: float, stderr_u: float | None = None) -> dict[str, float]:
        value, stderr = 1e-4 * scale * value, 1e-4 * stderr
        found = {"value": value, "stderr": stderr, "stderr_jackknife": 1.1 * stderr}
        found |= {"ci_low": value - 2.5 * stderr, "ci_high": value + 2.5 * stderr}
        return found if stderr_u is None else found | {"stderr_u": 1e-4 * stderr_u}

    remainder = {"entropy_term": -0.5, "gradient": 0.125, "update": 0.0625, "differences": 0.0625}
    return {
        "first_order": measured(-12.0, 1.5),
        "momentum": measured(-9.0, 1.2),
        "weight_decay": measured(0.5, 0.1),
        "gradient": measured(-3.5, 0.6),
        "tokens": measured(-3.25, 0.5, 0.8),
        "remainder": {name: 1e-4 * scale * value for name, value in remainder.items()},
        "remainder_sum": measured(-0.25, 0.05),
        "total": -11.75e-4 * scale,
        "by_sign": {
            "positive_advantage": measured(-4.0, 0.6, 0.9),
            "negative_advantage": measured(0.75, 0.2, 0.3),
            "zero_advantage": measured(0.0, 0.0, 0.0),
        },
        "over_u": {"prompts": 16, "absent": None},
    }


def rewarded_record(step: int = 0, **others: Any) -> dict[str, Any]:
    """A record with everything of attribution, reward, predictors and counterfactuals."""
    record = probe_record(step)
    for point in record["sweep"]:
        point["reward_true"] = estimate(20 * point["eta"] * (1 + step / 50), 4 * point["eta"])
        point["reward_first_order"] = estimate(21 * point["eta"] * (1 + step / 50), 4 * point["eta"])
    more = {
        "attribution": attribution_of_record(1 + step / 20),
        "reward_change": estimate(21.0, 4.0),
        "exchange_rate": {"value": -0.5, "stderr": 0.1, "ci_low": -0.75, "ci_high": -0.25, "bounded": True},
        "predictors": {
            "covariance": {
                "pearson": 0.5,
                "pearson_ci_low": 0.25,
                "pearson_ci_high": None,
                "spearman": 0.4,
                "step_pearson": None,
            },
            "steer": {"sign_agreement": 0.75, "step_spearman": math.nan, "note": "text"},
        },
        "counterfactuals": {
            "entropy_bonus": {
                "true": estimate(3e-4, 2e-5),
                "reward_true": estimate(1.5e-3, 3e-4),
                "difference": estimate(1.35e-3, 3e-5),
            },
            "no [momentum]": {"true": estimate(-3e-4, 2e-5), "difference": estimate(7.5e-4, 2e-5)},
        },
    }
    return {**record, **more, **others}


@pytest.fixture
def tokens():
    """Factory of made-up attributed tokens."""
    return attributed_tokens


@pytest.fixture
def make_rewarded():
    """Factory of a record with attribution and reward."""
    return rewarded_record


@pytest.fixture
def make():
    """Factory of a measured probe's record."""
    return probe_record


@pytest.fixture
def make_failed():
    """Factory of a record without a measurement."""
    return failed_record
