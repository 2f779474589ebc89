"""The Markdown report of a study, and its tables and figures on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from entropy_pl.measurements.results import CONFIG, as_yaml
from entropy_pl.studies.folder import StudyFolder
from entropy_pl.studies.study import StudyOutcome

REPORT = "report.md"


class Report:
    """Collects what a finished study has to show, then writes all of it.

    Args:
        folder: of the study.
        title: first heading.
        question: what was asked, in a sentence or two.
    """

    def __init__(self, folder: StudyFolder, title: str, question: str) -> None:
        self._folder = folder
        self._parts = [f"# {title}", question]
        self._glossary: list[str] = []
        self._tables: list[Path] = []
        self._figures: list[Path] = []

    def tables(self, **tables: tuple[pd.DataFrame, Mapping[str, str]]) -> None:
        """Write ``<name>.csv`` each.

        Args:
            tables: name → the table, and what every column is, with its unit.
        """
        for name, (table, columns) in tables.items():
            self._tables += self._folder.write_tables(**{name: table[list(columns)]})
            meanings = "\n".join(f"* `{column}`: {meaning}" for column, meaning in columns.items())
            self._glossary.append(f"In `{name}.csv`:\n\n{meanings}")

    def show(self, table: pd.DataFrame, heading: str, reading: str) -> None:
        """A table in the report itself, to six digits, with how to read it."""
        self._parts += [f"## {heading}", reading, markdown(table)]

    def figure(self, name: str, figure: Figure, reading: str) -> None:
        """Write ``<name>.png`` and show it, with how to read it."""
        self._figures += self._folder.write_figures(**{name: figure})
        self._parts += [f"![{name}]({name}.png)", reading]

    def say(self, heading: str, text: str) -> None:
        """A section of text."""
        self._parts += [f"## {heading}", text]

    def caveats(self, *sentences: str) -> None:
        """What the numbers do not say."""
        self.say("Caveats", "\n".join(f"* {sentence}" for sentence in sentences))

    def write(self, shown: pd.DataFrame) -> StudyOutcome:
        """Write the report.

        Args:
            shown: a short table for the terminal.
        """
        folder = self._folder
        self.say("Columns", "\n\n".join(self._glossary))
        self.say("Versions", ", ".join(f"{name} {version}" for name, version in folder.versions.items()))
        self.say("Config", f"In `{CONFIG}`:\n\n```yaml\n{as_yaml(folder.config)}```")
        report = folder.path / REPORT
        report.write_text("\n\n".join(self._parts) + "\n")
        text = shown.to_string(index=False, float_format=lambda number: f"{number:.6g}", na_rep="")
        made = {path.name for path in [*self._tables, *self._figures]}
        kept = {path.name for path in folder.path.iterdir()} - made - {REPORT}
        names = " ".join([*(path.name for path in [*self._tables, *self._figures]), *sorted(kept)])
        return StudyOutcome(
            folder.path, self._tables, self._figures, report, f"{text}\n\nreport   {report}\nbeside   {names}"
        )


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, floats to six digits, nothing for NaN."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[_cell(value) for value in row] for row in table.itertuples(index=False, name=None)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: object) -> str:
    if pd.isna(value):  # type: ignore[call-overload]
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", r"\|")
