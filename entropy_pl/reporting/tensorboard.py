"""Records as TensorBoard sees them: scalars, and the custom-scalars layout that draws them with their margins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.reporting.records import number, taken_point

PREFIX = "entropy_probe/"
ENTROPY, DELTA_H_TRUE, DELTA_H1 = f"{PREFIX}entropy", f"{PREFIX}delta_h_true", f"{PREFIX}delta_h1"


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The scalars of one record, by TensorBoard tag.

    Args:
        record: a probe's record (see :mod:`entropy_pl.reporting.records`).

    Returns:
        ``entropy_probe/entropy``, ``entropy_probe/delta_h_true`` and ``entropy_probe/delta_h1``, each with its
        ``_ci_low`` and ``_ci_high``, in nats; ``entropy_probe/ess_fraction`` (of the sequences, in [0, 1]),
        ``entropy_probe/eta_star`` (a learning rate) and ``entropy_probe/update_norm`` (per unit learning rate). ΔH,
        δH₁ and the ESS are at the step really taken. What is absent or not finite is left out.
    """
    taken = taken_point(record) or {}
    estimates = {
        ENTROPY: record.get("entropy"),
        DELTA_H_TRUE: taken.get("true"),
        DELTA_H1: taken.get("first_order"),
    }
    values = {}
    for tag, estimate in estimates.items():
        values[tag] = number(estimate, "value")
        values[f"{tag}_ci_low"] = number(estimate, "ci_low")
        values[f"{tag}_ci_high"] = number(estimate, "ci_high")
    n_sequences = number(taken.get("true"), "n_sequences")
    if n_sequences:
        values[f"{PREFIX}ess_fraction"] = number(taken.get("true"), "ess") / n_sequences
    values[f"{PREFIX}eta_star"] = number(record, "eta_star")
    values[f"{PREFIX}update_norm"] = number(record, "update_norm")
    return {tag: value for tag, value in values.items() if math.isfinite(value)}


def add_margin_charts(writer: SummaryWriter) -> None:
    """Lay out TensorBoard's *Custom Scalars* page: ΔH and δH₁ with their margins on one chart, H on another.

    Call it once per run folder; a resumed run may call it again (TensorBoard merges equal charts). All curves of
    a run share its colour there and differ by marker only; :func:`.delta_entropy_figure` has a colour for each.

    Args:
        writer: the run's writer; the layout goes to the same event files as its scalars.
    """
    charts = [  # TensorBoard 2.21 shows the last one first
        _margin_chart("Entropy H before the step, nats", ENTROPY),
        _margin_chart("ΔH (true) and δH₁ (first order), nats", DELTA_H_TRUE, DELTA_H1),
    ]
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
