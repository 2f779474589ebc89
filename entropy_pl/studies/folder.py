"""A study's folder: which config it belongs to, and the cells that are finished."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from entropy_pl.config import ERROR_LOG
from entropy_pl.measurements.engine import fingerprint_of
from entropy_pl.measurements.results import CONFIG, as_yaml, refuse_another_config, versions, write_whole
from entropy_pl.probe import timed
from entropy_pl.progress import progress
from entropy_pl.records import SCHEMA, Json, RecordWriter, read_records, to_json
from entropy_pl.studies.study import StudySettings

STUDY, CELLS = "study.json", "cells.jsonl"
Row = dict[str, Any]


class StudyFolder:
    """``study.json``, ``config.yaml``, ``cells.jsonl``, and whatever is made of them.

    A cell is the smallest piece of work that a killed study does not do again: its rows are on the disk, in one line of
    ``cells.jsonl``, when :meth:`add` returns. Tables are made of these lines alone, so that a study that was
    interrupted gives the tables of one that was not.

    Args:
        study: its name.
        settings: of the study; the folder is made if it is not there.

    Raises:
        ValueError: if the folder belongs to a study of another config, or holds something else.
    """

    def __init__(self, study: str, settings: StudySettings) -> None:
        assert settings.output_directory is not None
        self.path = Path(settings.output_directory)
        self.study, self.config = study, asdict(settings)
        self.versions = self._claim({"study": study, "config_hash": fingerprint_of(settings), "versions": versions()})
        self._writer = RecordWriter(self.path / CELLS)
        records = read_records(self._writer.path) if self._writer.path.exists() else []
        self._cells: dict[str, Json] = {record["cell"]: record for record in records}

    def __contains__(self, cell: str) -> bool:
        return cell in self._cells

    def add(self, cell: str, *, seconds: float, **tables: Sequence[Row]) -> None:
        """Keep a finished cell.

        Args:
            cell: its name.
            seconds: wall time it took.
            tables: name of a table → the cell's rows in it.
        """
        record = {"schema": SCHEMA, "kind": "cell", "cell": cell, "seconds": seconds, "tables": tables}
        self._writer.write(record)
        self._cells[cell] = json.loads(to_json(record))  # as a later run will read it

    def finish(self, jobs: Mapping[str, Callable[[], Sequence[Row]]], *, progress_bar: bool) -> None:
        """Do what is missing of a study whose cells fill one table, ``rows``.

        Args:
            jobs: cell → makes its rows.
            progress_bar: show one.
        """
        missing = {cell: job for cell, job in jobs.items() if cell not in self}
        with progress(self.study, len(missing), "cell", shown=progress_bar) as bar:
            for cell, job in missing.items():
                bar.set_postfix_str(cell)
                seconds: dict[str, float] = {}
                with timed(seconds, "cell"):
                    rows = job()
                self.add(cell, seconds=seconds["cell"], rows=rows)
                bar.update()

    def table(self, name: str, cells: Iterable[str]) -> pd.DataFrame:
        """The rows of a table from these cells, in their order; what no number could be given for is NaN."""
        rows = [row for cell in cells for row in self._cells[cell]["tables"][name]]
        return pd.DataFrame([{key: math.nan if value is None else value for key, value in row.items()} for row in rows])

    def seconds(self, cells: Iterable[str]) -> float:
        """Wall time that these cells took."""
        return float(sum(self._cells[cell]["seconds"] for cell in cells))

    def write_tables(self, **tables: pd.DataFrame) -> list[Path]:
        """Write ``<name>.csv`` each, numbers in full precision."""
        files = {self.path / f"{name}.csv": table for name, table in tables.items()}
        for file, table in files.items():
            table.to_csv(file, index=False)
        return list(files)

    def write_figures(self, **figures: Figure) -> list[Path]:
        """Write ``<name>.png`` each."""
        files = {self.path / f"{name}.png": figure for name, figure in figures.items()}
        for file, figure in files.items():
            figure.savefig(file)
        return list(files)

    def _claim(self, identity: Mapping[str, Any]) -> dict[str, str]:
        """Take the folder for this study, or find that it is this study's; the versions it was begun with."""
        file = self.path / STUDY
        own = {ERROR_LOG, STUDY, CONFIG} if file.exists() else {ERROR_LOG}
        found = {entry.name for entry in self.path.iterdir() if entry.suffix != ".tmp"} if self.path.exists() else set()
        if not found - own:  # a study that failed before anything was worth keeping leaves its folder to the next
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(file, identity)
            (self.path / CONFIG).write_text(as_yaml(self.config))
            return dict(identity["versions"])
        if not file.exists():
            raise ValueError(
                f"expected an output_directory of this study, or an empty one, got {self.path} with "
                f"{', '.join(sorted(found)[:5])}: give another folder"
            )
        refuse_another_config(file, identity["config_hash"])
        begun: dict[str, str] = json.loads(file.read_text())["versions"]
        if begun != identity["versions"]:
            warnings.warn(
                f"{self.path} was begun with {_changed(begun, identity['versions'])} and goes on with "
                f"{_changed(identity['versions'], begun)}: finished cells stay as they are",
                stacklevel=3,
            )
        return begun


def _changed(some: Mapping[str, str], others: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in some.items() if others.get(name) != version)
