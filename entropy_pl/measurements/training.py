"""Whether a measurement rebuilds the step of the run it looks at, as far as the checkpoint tells how that was run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from entropy_pl.measurements.settings import MeasurementSettings

# Argument of GRPOModule or PromptDataModule → the setting that stands for it here.
SETTING_OF = {
    "num_generations": "batch_config.G",
    "batch_size": "batch_config.B_U",
    "dataset": "batch_config.dataset_name",
    "u_split": "batch_config.U_split",
    "max_new_tokens": "generation.max_new_tokens",
    "temperature": "generation.temperature",
    **{
        name: f"update.{name}"
        for name in (
            "loss_type",
            "advantage",
            "rewards",
            "reward_weights",
            "clip_low",
            "clip_high",
            "kl_coefficient",
            "entropy_coefficient",
            "advantage_sign",
            "clip_cov_fraction",
            "clip_cov_bounds",
            "kl_cov_fraction",
            "kl_cov_coefficient",
            "zero_advantage",
            "top_p",
            "top_k",
            "max_grad_norm",
        )
    },
}


def differences_from_training(
    settings: MeasurementSettings, hyper_parameters: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Settings that the run was trained with otherwise.

    Args:
        settings: of the measurement.
        hyper_parameters: that the checkpoint tells; those it does not tell are taken to agree.

    Returns:
        ``section.key`` → ``{"here": ..., "training": ...}``.
    """
    here = asdict(settings)
    found = {}
    for argument, key in SETTING_OF.items():
        section, name = key.split(".")
        ours = _as_list(here[section][name])
        if argument in hyper_parameters and (theirs := _as_list(hyper_parameters[argument])) != ours:
            found[key] = {"here": ours, "training": theirs}
    return found


def _as_list(value: Any) -> Any:
    """Bounds are a tuple in code and a list in files."""
    return list(value) if isinstance(value, tuple) else value
