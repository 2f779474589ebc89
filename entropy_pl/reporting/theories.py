"""Theories of entropy collapse over a run: does what each predicts for a step go with what was measured there?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from entropy_pl.reporting.records import Record, latest_per_step, number, taken_point

FEWEST = 4  # steps: a correlation of three has no interval


def add_step_agreement(record: Record, earlier: Sequence[Mapping[str, Any]]) -> None:
    """Add to a record's predictors how they have agreed with ΔH over the run's probes so far, this one included.

    ``step_pearson`` with its interval (Fisher's z, at the record's confidence) and ``step_spearman``, over ``n_steps``:
    between the theory's prediction and ΔH per unit learning rate, so that a schedule, which both would share, does not
    pass for a theory.
    The interval takes steps as independent, which neighbours are not. None before four steps.

    Args:
        record: of the step just probed; changed in place where it has predictors.
        earlier: records of the run's earlier probes.
    """
    run = latest_per_step([*earlier, record])
    for name, predictor in (record.get("predictors") or {}).items():
        pairs = np.array([_pair(other, name) for other in run])
        pairs = pairs[np.isfinite(pairs).all(1)]
        predictor |= {"n_steps": len(pairs), **_correlations(*pairs.T, confidence=record.get("confidence") or 0.95)}


def step_evidence(record: Mapping[str, Any]) -> Record:
    """Of a probe's record what :func:`add_step_agreement` looks at: a run keeps it of every probe, so it is small.

    Args:
        record: one probe's.

    Returns:
        A record with the keys that agreement over steps is made of.
    """
    taken = taken_point(record)
    return {
        "kind": record.get("kind", "probe"),
        "step": record.get("step"),
        "lr": record.get("lr"),
        "predictors": {name: {"step": (of or {}).get("step")} for name, of in (record.get("predictors") or {}).items()},
        "sweep": [] if taken is None else [{"taken": True, "true": {"value": number(taken.get("true"), "value")}}],
    }


def _pair(record: Mapping[str, Any], name: str) -> tuple[float, float]:
    """What was predicted of a step, and what was measured."""
    predicted = number((record.get("predictors") or {}).get(name), "step")
    lr = number(record, "lr")
    return predicted, number((taken_point(record) or {}).get("true"), "value") / lr if lr else math.nan


def _correlations(predicted: Any, measured: Any, *, confidence: float) -> dict[str, float | None]:
    names = ("step_pearson", "step_pearson_ci_low", "step_pearson_ci_high", "step_spearman")
    if len(predicted) < FEWEST:
        return dict.fromkeys(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        pearson = stats.pearsonr(predicted, measured)
        interval = pearson.confidence_interval(confidence)
        spearman = stats.spearmanr(predicted, measured)
    values = (pearson.statistic, interval.low, interval.high, spearman.statistic)
    return {key: float(x) if math.isfinite(x) else None for key, x in zip(names, values, strict=True)}
