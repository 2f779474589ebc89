"""Theories of entropy collapse over a run: does what each predicts for a step go with what was measured there?"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from entropy_pl.records import AnyRecord, EstimateRecord, Json, PointRecord, PredictorRecord, Record, number, probes_of

FEWEST = 4  # steps: a correlation of three has no interval


def add_step_agreement(record: Json, earlier: Sequence[AnyRecord]) -> None:
    """Add to a record's predictors how they have agreed with ΔH over the run's probes so far, this one included.

    ``step_pearson`` with its interval (Fisher's z, at the record's confidence) and ``step_spearman``, over ``n_steps``:
    between the theory's prediction and ΔH per unit learning rate, so that a schedule, which both would share, does not
    pass for a theory.
    The interval takes steps as independent, which neighbours are not. None before four steps.

    Args:
        record: of the step just probed, as JSON has it; changed in place where it has predictors.
        earlier: records of the run's earlier probes.
    """
    run = probes_of([*earlier, record])
    confidence = record.get("confidence") or 0.95
    for name, predictor in (record.get("predictors") or {}).items():
        pairs = np.array([_pair(other, name) for other in run])
        pairs = pairs[np.isfinite(pairs).all(1)]
        predictor |= {"n_steps": len(pairs), **_correlations(*pairs.T, confidence=confidence)}


def step_evidence(record: AnyRecord) -> Record:
    """Return what :func:`add_step_agreement` looks at: a run keeps it of every probe, so it is small.

    Args:
        record: one probe's.

    Returns:
        A record with the fields that agreement over steps is made of.
    """
    record = Record.of(record)
    change = EstimateRecord(value=record.taken.true.value)
    return Record(
        kind=record.kind,
        step=record.step,
        lr=record.lr,
        predictors={name: PredictorRecord(step=predictor.step) for name, predictor in record.predictors.items()},
        sweep=(PointRecord(taken=True, true=change),) if record.taken else (),
    )


def _pair(record: Record, name: str) -> tuple[float, float]:
    """Return what was predicted of a step, and what was measured."""
    predicted = record.predictors[name].step if name in record.predictors else None
    return number(predicted), number(record.taken.true.value) / record.lr if record.lr else math.nan


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
