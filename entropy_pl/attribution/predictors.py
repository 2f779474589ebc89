"""Theories of entropy collapse beside what was attributed: how well each predicts it, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from entropy_pl.attribution.batch import UpdateBatch
from entropy_pl.attribution.parts import Attribution
from entropy_pl.estimators import Agreement, agreement, covariance_prediction, steer_prediction
from entropy_pl.estimators.snis import Clusters


@dataclass(frozen=True)
class Predictor:
    """One theory, at one step.

    Args:
        tokens: its agreement with the attributed change over U's tokens, both weighted as the loss weights them.
        step: its prediction for the whole step, the mean over tokens as its authors have it, unweighted; up to a
            positive factor per unit η.
    """

    tokens: Agreement
    step: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**self.tokens.to_dict(), "step": self.step}


def compare_predictors(
    attribution: Attribution, batch: UpdateBatch, *, clusters: Clusters = None
) -> dict[str, Predictor]:
    """Cui et al.'s covariance (arXiv 2505.22617) and STEER's Ω (arXiv 2510.10150) against the attributed change.

    Args:
        attribution: of the step; its confidence is that of the intervals.
        batch: its whole U-batch, with advantages and, where it has them, weights and old log-probs.
        clusters: prompt of each completion of U, ``[N_U]``.

    Returns:
        The comparison by theory, `cui` and `steer`.

    Raises:
        ValueError: if the batch has no advantages.
    """
    if batch.advantages is None:
        raise ValueError("expected a U-batch with advantages, which both predictors are made of, got none")
    stats = attribution.stats
    device = stats.logp.device
    mask = stats.mask

    def here(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.to(device)

    old, advantages = here(batch.old_logp), batch.advantages.to(device)

    def predictions(weights: Tensor | None) -> dict[str, Tensor]:
        return {
            "cui": covariance_prediction(stats.logp, advantages, mask, weights),
            "steer": steer_prediction(stats.logp, stats.entropy, advantages, mask, old, weights),
        }

    plain, weighted = predictions(None), predictions(here(batch.weights))
    return {
        name: Predictor(
            agreement(
                weighted[name], attribution.per_token, mask, clusters=clusters, confidence=attribution.confidence
            ),
            float(plain[name][mask].mean()),
        )
        for name in plain
    }
