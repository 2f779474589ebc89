"""Records like those a probe leaves behind, from a step and a few numbers."""

from __future__ import annotations

from typing import Any

import pytest


def estimate(value: float, stderr: float, ess: float = 200.0) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "ci_low": value - 1.96 * stderr,
        "ci_high": value + 1.96 * stderr,
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
        "schema": 1,
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
        "sweep": sweep,
        "update_norm": 3.2,
        "normalize": "per_token",
    }
    return {**record, **others}


def failed_record(step: int, status: str = "failed", message: str = "got NaN in [256, 48]") -> dict[str, Any]:
    return {"schema": 1, "kind": "probe", "status": status, "message": message, "step": step, "lr": 1e-4}


@pytest.fixture
def make():
    """Factory of a measured probe's record."""
    return probe_record


@pytest.fixture
def make_failed():
    """Factory of a record without a measurement."""
    return failed_record
