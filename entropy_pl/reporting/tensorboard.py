"""Records as TensorBoard sees them: scalars, and the custom-scalars layout that draws them with their margins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.attribution.signs import NEGATIVE, POSITIVE
from entropy_pl.records import AnyRecord, EstimateRecord, PointRecord, Record, number

PREFIX = "entropy_probe/"
ENTROPY, DELTA_H_TRUE, DELTA_H1 = f"{PREFIX}entropy", f"{PREFIX}delta_h_true", f"{PREFIX}delta_h1"
DELTA_J_TRUE, DELTA_J1, EXCHANGE_RATE = f"{PREFIX}delta_j_true", f"{PREFIX}delta_j1", f"{PREFIX}exchange_rate"
WARNINGS = f"{PREFIX}warnings"
ATTRIBUTED = ("momentum", "weight_decay", "tokens", "remainder", "first_order", POSITIVE, NEGATIVE)
AGREEMENTS = ("pearson", "spearman", "sign_agreement", "step_pearson", "step_spearman")


def scalars(record: AnyRecord) -> dict[str, float]:
    """The scalars of one record, by TensorBoard tag.

    Args:
        record: a probe's record.

    Returns:
        ``entropy_probe/entropy``, ``entropy_probe/delta_h_true`` and ``entropy_probe/delta_h1``, each with its
        ``_ci_low`` and ``_ci_high``, in nats; ``entropy_probe/ess_fraction`` (of the sequences, in [0, 1]),
        ``entropy_probe/eta_star`` (a learning rate; with ``_ci_low``, and ``_ci_high`` where that is bounded),
        ``entropy_probe/update_norm`` (per unit learning rate) and ``entropy_probe/overhead`` (seconds of probing over
        those of the run without it). ΔH, δH₁ and the ESS are at the step really taken, as is everything that follows.
        Where the record has it:

        * ``entropy_probe/delta_j_true`` and ``entropy_probe/delta_j1``, the change of the expected reward, and
          ``entropy_probe/exchange_rate``, ΔH/ΔJ, in nats per unit reward, its interval only where that has bounds;
        * ``entropy_probe/attribution/`` with ``momentum``, ``weight_decay``, ``tokens``, ``remainder`` and
          ``first_order``, and ``positive_advantage`` and ``negative_advantage``, the tokens by sign, in nats, each with
          its interval over E;
        * ``entropy_probe/predictors/<name>/`` with ``pearson``, ``spearman``, ``sign_agreement``, ``step_pearson`` and
          ``step_spearman``, and the intervals of those that have one;
        * ``entropy_probe/counterfactuals/<name>/delta_h`` and ``/delta_j``, under another loss.

        What is absent or not finite is left out.
    """
    record = Record.of(record)
    taken = record.taken
    values: dict[str, float] = {}
    for tag, estimate in _estimates(record, taken).items():
        values[tag] = number(estimate.value)
        values[f"{tag}_ci_low"] = number(estimate.ci_low)
        values[f"{tag}_ci_high"] = number(estimate.ci_high)
    values |= {
        f"{PREFIX}ess_fraction": taken.ess_fraction,
        f"{PREFIX}eta_star": number(record.eta_star),
        f"{PREFIX}eta_star_ci_low": number(record.eta_star_ci_low),
        f"{PREFIX}eta_star_ci_high": number(record.eta_star_ci_high),
        f"{PREFIX}update_norm": number(record.update_norm),
        f"{PREFIX}overhead": number(record.overhead),
    }
    for name, predictor in record.predictors.items():
        for key in (f"{measure}{end}" for measure in AGREEMENTS for end in ("", "_ci_low", "_ci_high")):
            values[f"{PREFIX}predictors/{name}/{key}"] = number(getattr(predictor, key, None))
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def _estimates(record: Record, taken: PointRecord) -> dict[str, EstimateRecord]:
    """Return everything with an interval, by tag."""
    rate = record.exchange_rate
    estimates = {
        ENTROPY: record.entropy,
        DELTA_H_TRUE: taken.true,
        DELTA_H1: taken.first_order,
        DELTA_J_TRUE: taken.reward_true,
        DELTA_J1: taken.reward_first_order,
        EXCHANGE_RATE: rate if rate.bounded else EstimateRecord(value=rate.value),
    }
    estimates |= {f"{PREFIX}attribution/{name}": record.attribution.part(name) for name in ATTRIBUTED}
    for name, other in record.counterfactuals.items():
        estimates[_counterfactual(name)] = other.true
        estimates[f"{PREFIX}counterfactuals/{name}/delta_j"] = other.reward_true
    return estimates


def _counterfactual(name: str) -> str:
    return f"{PREFIX}counterfactuals/{name}/delta_h"


def add_margin_charts(writer: SummaryWriter, *, reward: bool = False, counterfactuals: Sequence[str] = ()) -> None:
    """Lay out TensorBoard's *Custom Scalars* page: ΔH and δH₁ with their margins on one chart, H on another.

    Call it once per run folder; a resumed run may call it again (TensorBoard merges equal charts). All curves of
    a run share its colour there and differ by marker only; :func:`.delta_entropy_figure` has a colour for each.

    Args:
        writer: the run's writer; the layout goes to the same event files as its scalars.
        reward: whether ΔJ and δJ₁ have a chart as well.
        counterfactuals: names of the losses whose ΔH has a chart, beside the step taken.
    """
    charts = [  # TensorBoard 2.21 shows the last one first
        _margin_chart("Entropy H before the step, nats", ENTROPY),
        _margin_chart("ΔH (true) and δH₁ (first order), nats", DELTA_H_TRUE, DELTA_H1),
    ]
    if counterfactuals:
        others = [_counterfactual(name) for name in counterfactuals]
        charts.insert(0, _margin_chart("ΔH of the step taken and under other losses, nats", DELTA_H_TRUE, *others))
    if reward:
        charts.insert(0, _margin_chart("ΔJ (true) and δJ₁ (first order), reward", DELTA_J_TRUE, DELTA_J1))
    layout = layout_pb2.Layout(category=[layout_pb2.Category(title="Entropy probe", chart=charts)])
    # Written by hand because `writer.add_custom_scalars` takes one series per margin chart only, and the plugin's own
    # `summary.pb` imports TensorFlow.
    tensor = TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()], tensor_shape=TensorShapeProto())
    value = Summary.Value(tag=metadata.CONFIG_SUMMARY_TAG, tensor=tensor, metadata=metadata.create_summary_metadata())
    writer._get_file_writer().add_summary(Summary(value=[value]))


def _margin_chart(title: str, *tags: str) -> Any:
    series = [
        layout_pb2.MarginChartContent.Series(value=tag, lower=f"{tag}_ci_low", upper=f"{tag}_ci_high") for tag in tags
    ]
    return layout_pb2.Chart(title=title, margin=layout_pb2.MarginChartContent(series=series))
