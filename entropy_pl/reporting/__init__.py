"""What was measured, kept and shown: record files, figures, TensorBoard scalars, the terminal's tables, an HTML page.

What is shown is made of *records* (:class:`entropy_pl.records.Record`, or the JSON objects that they are read from and
written as), so that a figure can be redrawn years later from the file alone. The detailed log
of an offline measurement goes down to sequences and tokens (:mod:`entropy_pl.reporting.detailed`). Who moved the
entropy, token by token, is an :class:`AttributedTokens`, which figures and page are drawn from.
"""

from entropy_pl.records import SCHEMA, Record, RecordWriter, latest_per_step, read_records, taken_point
from entropy_pl.reporting.attributed import AttributedTokens
from entropy_pl.reporting.attribution_figures import (
    components_figure,
    exchange_rate_figure,
    influence_matrix_figure,
    influence_scatter_figure,
    influence_share_figure,
    top_tokens_figure,
)
from entropy_pl.reporting.attribution_page import attribution_page
from entropy_pl.reporting.detailed import (
    LoggingSettings,
    MeasuredBatch,
    config_hash,
    raw_tensors,
    sequence_records,
    summary_record,
    token_records,
)
from entropy_pl.reporting.detailed_log import DetailedLog
from entropy_pl.reporting.figures import delta_entropy_figure, eta_sweep_figure
from entropy_pl.reporting.run_figures import calibration_figure, ess_figure, step_size_figure, training_figure
from entropy_pl.reporting.run_folder import RunFolder, read_run
from entropy_pl.reporting.run_page import run_page
from entropy_pl.reporting.table import attribution_table, probe_table, sweep_table
from entropy_pl.reporting.tensorboard import add_margin_charts, scalars
from entropy_pl.reporting.theories import add_step_agreement, step_evidence

__all__ = [
    "SCHEMA",
    "AttributedTokens",
    "DetailedLog",
    "LoggingSettings",
    "MeasuredBatch",
    "Record",
    "RecordWriter",
    "RunFolder",
    "add_margin_charts",
    "add_step_agreement",
    "attribution_page",
    "attribution_table",
    "calibration_figure",
    "components_figure",
    "config_hash",
    "delta_entropy_figure",
    "ess_figure",
    "eta_sweep_figure",
    "exchange_rate_figure",
    "influence_matrix_figure",
    "influence_scatter_figure",
    "influence_share_figure",
    "latest_per_step",
    "probe_table",
    "raw_tensors",
    "read_records",
    "read_run",
    "run_page",
    "scalars",
    "sequence_records",
    "step_evidence",
    "step_size_figure",
    "summary_record",
    "sweep_table",
    "taken_point",
    "token_records",
    "top_tokens_figure",
    "training_figure",
]
