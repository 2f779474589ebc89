"""``report``: a run's folder as one HTML page."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from entropy_pl.config import UsageError
from entropy_pl.files import written_whole
from entropy_pl.progress import parts_shown
from entropy_pl.reporting import read_run, run_page

PAGE = "report.html"


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"expected entropy-pl report RUN_DIR [--output FILE], got other words: {message}")


def run_report(words: Sequence[str]) -> None:
    """Write the page of a run, finished or not, and say where it lies.

    Args:
        words: the run's folder, and ``--output`` with a file, by default ``report.html`` beside the run's records.

    Raises:
        UsageError: for words that cannot be understood, a folder that is no run's, or a file that cannot be written.
    """
    parser = _Parser(
        prog="entropy-pl report",
        description="Draw a run, finished or still going on, as one HTML page that needs no network.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run",
        metavar="RUN_DIR",
        type=Path,
        help="the run's folder: Lightning's version_0, a Trainer's output_dir, the folder entropy_probe in either, or "
        "the output_directory of entropy-pl measure",
    )
    parser.add_argument("--output", metavar="FILE", type=Path, help=f"the page (default: {PAGE} beside the records)")
    given = parser.parse_args(list(words))
    try:
        run = read_run(given.run)
        file = given.output or run.probe / PAGE
        with parts_shown(True):
            page = run_page(run, folder=file.parent)
        with written_whole(file) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error
    print(f"report   {file}")
