"""The policy: load it, sample from it, score what it sampled."""

from entropy_pl.policy.adapter import reference_policy, trainable_parameters
from entropy_pl.policy.backbones import available_backbones, register_backbone
from entropy_pl.policy.load import Policy, load_policy, load_policy_from
from entropy_pl.policy.precision import evaluation, evaluation_mode, float64_evaluation
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import decode_completions, end_token_ids, sample_completions
from entropy_pl.policy.settings import LoraSettings, PolicySettings

__all__ = [
    "LoraSettings",
    "Policy",
    "PolicySettings",
    "available_backbones",
    "decode_completions",
    "end_token_ids",
    "evaluation",
    "evaluation_mode",
    "float64_evaluation",
    "isolated_rng",
    "load_policy",
    "load_policy_from",
    "reference_policy",
    "register_backbone",
    "sample_completions",
    "trainable_parameters",
]
