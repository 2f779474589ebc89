"""What GRPO optimizes: rewards of completions, advantages within a group, and the clipped loss over tokens."""

from entropy_pl.objectives.advantages import AdvantageKind, group_advantages, zero_advantage_groups
from entropy_pl.objectives.covariance import select_tokens, token_covariance
from entropy_pl.objectives.interventions import (
    INTERVENTIONS,
    UNCHANGED,
    WITHOUT_MOMENTUM,
    Intervention,
    counterfactual_names,
    intervened,
)
from entropy_pl.objectives.losses import (
    AdvantageSign,
    LossSettings,
    LossType,
    PolicyLoss,
    policy_loss,
    token_weights,
)
from entropy_pl.objectives.rewards import Reward, RewardSum, available_rewards, get_reward, register_reward

__all__ = [
    "INTERVENTIONS",
    "UNCHANGED",
    "WITHOUT_MOMENTUM",
    "AdvantageKind",
    "AdvantageSign",
    "Intervention",
    "LossSettings",
    "LossType",
    "PolicyLoss",
    "Reward",
    "RewardSum",
    "available_rewards",
    "counterfactual_names",
    "get_reward",
    "group_advantages",
    "intervened",
    "policy_loss",
    "register_reward",
    "select_tokens",
    "token_covariance",
    "token_weights",
    "zero_advantage_groups",
]
