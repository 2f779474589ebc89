"""entropy_pl: what one optimizer step does to a language model policy's entropy, measured with error bars.

The public names are imported when first asked for, so that a package which needs arrays alone does not wait for
Lightning and Transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from entropy_pl.version import __version__

if TYPE_CHECKING:
    from entropy_pl.data.datamodule import PromptDataModule
    from entropy_pl.estimators import EntropyChange
    from entropy_pl.grpo import GRPOModule
    from entropy_pl.measurements import EntropyMeasurements
    from entropy_pl.policy import float64_evaluation, load_policy, sample_completions
    from entropy_pl.policy.score import token_stats
    from entropy_pl.policy.tangents import token_stats_jvp
    from entropy_pl.probe import EntropyProbe, ProbeResult
    from entropy_pl.rollout import Rollout, TokenStats
    from entropy_pl.runs import load_run
    from entropy_pl.updates import UpdateVector, record_update

_HOME = {
    "EntropyChange": "estimators",
    "EntropyMeasurements": "measurements",
    "EntropyProbe": "probe",
    "GRPOModule": "grpo",
    "ProbeResult": "probe",
    "PromptDataModule": "data.datamodule",
    "Rollout": "rollout",
    "TokenStats": "rollout",
    "UpdateVector": "updates",
    "float64_evaluation": "policy",
    "load_policy": "policy",
    "load_run": "runs",
    "record_update": "updates",
    "sample_completions": "policy",
    "token_stats": "policy.score",
    "token_stats_jvp": "policy.tangents",
}

__all__ = [
    "EntropyChange",
    "EntropyMeasurements",
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
    "load_run",
    "record_update",
    "sample_completions",
    "token_stats",
    "token_stats_jvp",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'entropy_pl' has no attribute {name!r}")
    return getattr(import_module(f"entropy_pl.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
