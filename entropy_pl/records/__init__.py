"""The typed record of a probe, and the files that records are kept in.

A record is a :class:`Record`, or the JSON object that it is read from and written as: :func:`read_records` gives JSON
objects, which hold logs of other kinds as well, and :meth:`Record.from_json` makes one of them a record.
"""

from entropy_pl.records.attribution import AttributionRecord, DecileRecord, OverURecord, TokenRecord
from entropy_pl.records.estimates import (
    CounterfactualRecord,
    EstimateRecord,
    PointRecord,
    PowerLawRecord,
    PredictorRecord,
    SymmetricRecord,
)
from entropy_pl.records.files import RecordWriter, current, read_records
from entropy_pl.records.record import (
    SCHEMA,
    AnyRecord,
    Json,
    LeftOutRecord,
    MemoryRecord,
    PromptsRecord,
    Record,
)
from entropy_pl.records.selection import latest_per_step, probes_of, taken_point
from entropy_pl.records.stored import Stored, number
from entropy_pl.records.strict_json import plain, to_json

__all__ = [
    "SCHEMA",
    "AnyRecord",
    "AttributionRecord",
    "CounterfactualRecord",
    "DecileRecord",
    "EstimateRecord",
    "Json",
    "LeftOutRecord",
    "MemoryRecord",
    "OverURecord",
    "PointRecord",
    "PowerLawRecord",
    "PredictorRecord",
    "PromptsRecord",
    "Record",
    "RecordWriter",
    "Stored",
    "SymmetricRecord",
    "TokenRecord",
    "current",
    "latest_per_step",
    "number",
    "plain",
    "probes_of",
    "read_records",
    "taken_point",
    "to_json",
]
