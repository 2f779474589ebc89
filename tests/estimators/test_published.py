"""The published measurements of RL_Practice on Qwen2.5-1.5B, reproduced from their per-sequence data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from entropy_pl.estimators import snis_delta_entropy
from entropy_pl.rollout import TokenStats


def from_sums(log_weight: np.ndarray, h0: np.ndarray, h1: np.ndarray, lengths: np.ndarray) -> list[TokenStats]:
    """Token statistics with the published sums per sequence, all of each put on its first token."""
    mask = torch.arange(int(lengths.max())) < torch.from_numpy(lengths.astype(np.int64))[:, None]

    def on_first_token(x: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.pad(torch.from_numpy(x.astype(np.float64))[:, None], (0, mask.shape[1] - 1))

    zero = np.zeros_like(h0)
    return [TokenStats(on_first_token(s), on_first_token(h), mask) for s, h in ((zero, h0), (log_weight, h1))]


@pytest.mark.parametrize("size", [256, 512])
def test_published_changes_are_reproduced(shared_dir, size):
    """Per token, sequence weighting, from log-weights, entropy sums and lengths: to 1e-9 relative."""
    rows = json.loads((shared_dir / f"reference/published_{size}.json").read_text())
    data = np.load(shared_dir / f"reference/published_{size}.npz", allow_pickle=False)
    assert rows
    for row in rows:
        arrays = [
            data[f"{row['key']}__{name}"] for name in ("log_weights", "entropy_base", "entropy_shifted", "lengths")
        ]
        base, shifted = from_sums(*arrays)
        estimate = snis_delta_entropy(base, shifted, normalize="per_token", weighting="sequence")
        assert estimate.value == pytest.approx(row["delta_h_true"], rel=1e-9)
        assert estimate.ess == pytest.approx(row["ess"], rel=1e-9)
