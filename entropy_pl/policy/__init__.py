"""The policy: load it, sample from it, score what it sampled."""

from entropy_pl.policy.adapter import reference_policy, trainable_parameters
from entropy_pl.policy.backbones import available_backbones, register_backbone
from entropy_pl.policy.checkpoint import Checkpoint, checkpoint_weights, load_checkpoint
from entropy_pl.policy.generated import GeneratedLogProbs
from entropy_pl.policy.load import Policy, load_policy, load_policy_from
from entropy_pl.policy.precision import evaluation, evaluation_mode, float64_evaluation
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.policy.sample import decode_completions, end_token_ids, sample_completions
from entropy_pl.policy.score import head_inputs
from entropy_pl.policy.settings import LoraSettings, PolicySettings
from entropy_pl.policy.weights import match_weights

__all__ = [
    "Checkpoint",
    "GeneratedLogProbs",
    "LoraSettings",
    "Policy",
    "PolicySettings",
    "available_backbones",
    "checkpoint_weights",
    "decode_completions",
    "derived_seed",
    "end_token_ids",
    "evaluation",
    "evaluation_mode",
    "float64_evaluation",
    "head_inputs",
    "isolated_rng",
    "load_checkpoint",
    "load_policy",
    "load_policy_from",
    "match_weights",
    "reference_policy",
    "register_backbone",
    "sample_completions",
    "trainable_parameters",
]
