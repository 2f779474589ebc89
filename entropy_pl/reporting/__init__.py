"""What was measured, kept and shown: record files, figures, TensorBoard scalars and the terminal's table.

Everything here takes *records*, the JSON-able dicts that a probe leaves behind (their keys are listed in
:mod:`entropy_pl.reporting.records`), so that a figure can be redrawn years later from the file alone.
"""

from entropy_pl.reporting.figures import delta_entropy_figure, eta_sweep_figure
from entropy_pl.reporting.records import SCHEMA, Record, RecordWriter, latest_per_step, read_records, taken_point
from entropy_pl.reporting.table import probe_table
from entropy_pl.reporting.tensorboard import add_margin_charts, scalars

__all__ = [
    "SCHEMA",
    "Record",
    "RecordWriter",
    "add_margin_charts",
    "delta_entropy_figure",
    "eta_sweep_figure",
    "latest_per_step",
    "probe_table",
    "read_records",
    "scalars",
    "taken_point",
]
