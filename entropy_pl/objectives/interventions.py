"""What has been proposed against entropy collapse, by name: each is one change of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from entropy_pl.objectives.losses import LossSettings
from entropy_pl.registry import did_you_mean

WITHOUT_MOMENTUM = "no_momentum"
"""The one that changes the optimizer and not the loss: a step with β₁ = 0, of the gradient alone."""

UNCHANGED = "unchanged"
"""The run's own loss: a control, which shows what the way of computing the others' steps does by itself."""


@dataclass(frozen=True)
class Intervention:
    """One change of the loss.

    Args:
        changes: fields of `LossSettings` and what they become, whatever they were.
        description: one line.
        source: where it was proposed.
    """

    changes: Mapping[str, Any]
    description: str
    source: str

    def __call__(self, settings: LossSettings) -> LossSettings:
        """The settings with the change.

        Raises:
            ValueError: if the changed settings contradict each other, as Clip-Cov in a run with KL-Cov does.
        """
        return replace(settings, **self.changes)


INTERVENTIONS: dict[str, Intervention] = {
    "entropy_bonus": Intervention(
        {"entropy_coefficient": 0.01},
        "α = 0.01 times the entropy of every token is added to the objective",
        "Mnih et al. 2016, arXiv 1602.01783",
    ),
    "clip_higher": Intervention(
        {"clip_high": 0.28},
        "the ratio is clipped at 1.28 from above; acts from a rollout's second update on",
        "DAPO, Yu et al. 2025, arXiv 2503.14476",
    ),
    "clip_cov": Intervention(
        {"clip_cov_fraction": 2e-4, "clip_cov_bounds": (1.0, 5.0)},
        "0.02 % of the tokens, at random among those of covariance 1 to 5, have no policy gradient",
        "Cui et al. 2025, arXiv 2505.22617",
    ),
    "kl_cov": Intervention(
        {"kl_cov_fraction": 2e-3, "kl_cov_coefficient": 1.0},
        "the 0.2 % of tokens with the largest covariance pay for leaving the policy that sampled, and are not clipped; "
        "acts from a rollout's second update on",
        "Cui et al. 2025, arXiv 2505.22617 (the fraction of their 7B runs)",
    ),
    "positive_only": Intervention(
        {"advantage_sign": "positive"},
        "completions with A > 0 alone have a policy gradient",
        "Zhu et al. 2025, arXiv 2506.01347",
    ),
    "negative_only": Intervention(
        {"advantage_sign": "negative"},
        "completions with A < 0 alone have a policy gradient",
        "Zhu et al. 2025, arXiv 2506.01347",
    ),
}
"""What `counterfactuals` may name, besides the two above."""


def counterfactual_names() -> list[str]:
    """All names :func:`intervened` knows.

    Returns:
        The interventions' names, then `no_momentum` and `unchanged`.
    """
    return [*INTERVENTIONS, WITHOUT_MOMENTUM, UNCHANGED]


def intervened(settings: LossSettings, name: str) -> LossSettings:
    """The loss under a named intervention; ``no_momentum``, which is the optimizer's, and ``unchanged`` leave it alone.

    Args:
        settings: the loss without.
        name: one of :func:`counterfactual_names`.

    Raises:
        ValueError: for an unknown name, or a change that contradicts the settings.
    """
    if name in (WITHOUT_MOMENTUM, UNCHANGED):
        return settings
    if name not in INTERVENTIONS:
        names = counterfactual_names()
        raise ValueError(f"expected an intervention out of {names}, got {name!r}{did_you_mean(name, names)}")
    return INTERVENTIONS[name](settings)
