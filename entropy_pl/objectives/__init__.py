"""What GRPO optimizes: rewards of completions, advantages within a group, and the clipped loss over tokens."""

from entropy_pl.objectives.advantages import AdvantageKind, group_advantages, zero_advantage_groups
from entropy_pl.objectives.losses import LossSettings, LossType, PolicyLoss, policy_loss, token_weights
from entropy_pl.objectives.rewards import Reward, RewardSum, available_rewards, get_reward, register_reward

__all__ = [
    "AdvantageKind",
    "LossSettings",
    "LossType",
    "PolicyLoss",
    "Reward",
    "RewardSum",
    "available_rewards",
    "get_reward",
    "group_advantages",
    "policy_loss",
    "register_reward",
    "token_weights",
    "zero_advantage_groups",
]
