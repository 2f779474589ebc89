"""A run's folder read back: its records, and one row per probe."""

from entropy_pl.runs.run import Run, load_run

__all__ = ["Run", "load_run"]
