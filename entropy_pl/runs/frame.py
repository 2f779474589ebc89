"""Records as a table: one row per probe, with flat columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from entropy_pl.records import AttributionRecord, EstimateRecord, PredictorRecord, Record, number

SIGNS = ("positive_advantage", "negative_advantage", "zero_advantage")
PARTS = ("momentum", "weight_decay", "gradient", "tokens", "remainder", *SIGNS)
OVER_U = ("tokens", *SIGNS)  # parts with an error bar over the prompts of the U-batch as well


def probes_frame(records: Sequence[Record]) -> pd.DataFrame:
    """Return the table that :attr:`entropy_pl.runs.Run.probes` documents.

    Args:
        records: one per row.
    """
    rows = [_row(record) for record in records]
    return pd.DataFrame(rows, columns=list(dict.fromkeys(name for row in [*rows, _row(Record())] for name in row)))


def _row(record: Record) -> dict[str, Any]:
    taken = record.taken
    return {
        "step": math.nan if record.step is None else record.step,
        "status": record.status,
        "message": record.message or "",
        "lr": number(record.lr),
        "normalize": record.normalize or "",
        **_estimate("entropy", record.entropy),
        **_estimate("delta_h", taken.true),
        **_estimate("delta_h1", taken.first_order),
        **_estimate("first_order", record.first_order),
        **_estimate("second_order", record.second_order),
        "eta_star": number(record.eta_star),
        "eta_star_ci_low": number(record.eta_star_ci_low),
        "eta_star_ci_high": number(record.eta_star_ci_high),
        "ess": number(taken.true.ess),
        "ess_min": number(taken.true.ess_min),
        "mean_weight": number(taken.true.mean_weight),
        "n_sequences": number(record.entropy.n_sequences),
        "n_tokens": number(record.entropy.n_tokens),
        "trustworthy": taken.true.value is not None and not taken.true.untrustworthy,
        "warnings": "\n".join(record.warnings),
        "update_norm": number(record.update_norm),
        "reward": number(record.reward),
        **_estimate("expected_reward", record.expected_reward),
        **_estimate("delta_j", taken.reward_true),
        **_estimate("delta_j1", taken.reward_first_order),
        **_estimate("exchange_rate", record.exchange_rate),
        **_attribution(record.attribution),
        "sampler_gap": number(record.sampler_gap),
        "seconds": number((record.timing if record.is_measurement else record.seconds).get("total")),
        "overhead": number(record.overhead),
        **_predictors(record),
        **_counterfactuals(record),
    }


def _estimate(name: str, estimate: EstimateRecord) -> dict[str, float]:
    return {
        name: number(estimate.value),
        f"{name}_stderr": number(estimate.stderr),
        f"{name}_ci_low": number(estimate.ci_low),
        f"{name}_ci_high": number(estimate.ci_high),
    }


def _attribution(attribution: AttributionRecord) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name in PARTS:
        columns |= _estimate(f"attribution_{name}", attribution.part(name))
        if name in OVER_U:
            columns[f"attribution_{name}_stderr_u"] = number(attribution.part(name).stderr_u)
    return columns


def _predictors(record: Record) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, predictor in record.predictors.items():
        columns |= {f"predictor_{name}_{key}": value for key, value in _agreement(predictor).items()}
    return columns


def _agreement(predictor: PredictorRecord) -> dict[str, float]:
    return {
        "pearson": number(predictor.pearson),
        "spearman": number(predictor.spearman),
        "sign_agreement": number(predictor.sign_agreement),
        "step": number(predictor.step),
    }


def _counterfactuals(record: Record) -> dict[str, float]:
    columns: dict[str, float] = {}
    for name, other in record.counterfactuals.items():
        columns |= _estimate(f"counterfactual_{name}_delta_h", other.true)
        columns |= _estimate(f"counterfactual_{name}_delta_j", other.reward_true)
    return columns
