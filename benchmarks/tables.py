"""A table of results: on the terminal, and as Markdown in a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Rows of text under headings; the first column names the row.

    Args:
        name: of its place in the document, between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->``.
        title: what is measured, on what.
        columns: headings.
        rows: as many cells each as there are columns.
        notes: sentences below the table.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"expected {len(self.columns)} cells in a row of {self.name!r}, got {row}")

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=escape(self.title), caption=escape("\n".join(self.notes)) or None)
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """For a document: title, table, notes."""
        lines = [f"*{self.title}*", "", _line(self.columns)]
        lines.append(_line(("---", *("---:" for _ in self.columns[1:]))))
        lines += map(_line, self.rows)
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines)


def write_tables(document: Path, tables: list[Table]) -> list[str]:
    """Put tables between their markers; what else the document says stays.

    Returns:
        Names of the tables that the document has no place for.
    """
    text, absent = document.read_text(), []
    for table in tables:
        start, end = f"<!-- bench:{table.name} -->", f"<!-- /bench:{table.name} -->"
        before, opened, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            absent.append(table.name)
            continue
        text = f"{before}{start}\n{table.markdown()}\n{end}{after}"
    document.write_text(text)
    return absent


def _line(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
