"""Offline measurements: a checkpoint and its optimizer state, or a pair of checkpoints, from one config file."""

from entropy_pl.measurements.engine import Drawn, EntropyMeasurements
from entropy_pl.measurements.settings import MeasurementSettings

__all__ = ["Drawn", "EntropyMeasurements", "MeasurementSettings"]
