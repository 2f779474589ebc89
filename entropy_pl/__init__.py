"""entropy_pl: what one optimizer step does to a language model policy's entropy, measured with error bars."""

from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.estimators import EntropyChange
from entropy_pl.grpo import GRPOModule
from entropy_pl.policy import load_policy, sample_completions
from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.probe import EntropyProbe, ProbeResult
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates import UpdateVector, record_update
from entropy_pl.version import __version__

__all__ = [
    "EntropyChange",
    "EntropyProbe",
    "GRPOModule",
    "ProbeResult",
    "PromptDataModule",
    "Rollout",
    "TokenStats",
    "UpdateVector",
    "__version__",
    "float64_evaluation",
    "load_policy",
    "record_update",
    "sample_completions",
    "token_stats",
    "token_stats_jvp",
]
