"""What every study is: settings, a run that can be interrupted, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from entropy_pl.measurements import MeasurementSettings


@dataclass(frozen=True)
class StudySettings(MeasurementSettings):
    """A measurement's settings, for a study of many; `output_directory` is the study's own folder.

    Raises:
        ValueError: as :class:`~entropy_pl.measurements.MeasurementSettings`, without an output directory, or for what
            only a single measurement can do.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_directory is None:
            raise ValueError(
                "expected output_directory, a folder for the study's table, figures and report, and for what it needs "
                "to go on after an interruption, got none"
            )
        if self.detailed_logging.enabled:
            raise ValueError(
                "expected detailed_logging.enabled: false, got true: a study keeps a record of every cell; "
                "`entropy-pl measure` writes the detailed log of a single measurement"
            )
        if self.attribution.asked:
            raise ValueError(
                "expected attribution.enabled: false and no counterfactuals, got some: a study repeats the measurement "
                "of ΔH and δH₁; `entropy-pl measure` attributes a single one"
            )


@dataclass(frozen=True)
class StudyOutcome:
    """What a finished study left behind.

    Args:
        folder: with everything else in it.
        tables: CSV files, the main one first.
        figures: PNG files.
        report: the Markdown report.
        text: a short table for the terminal, and where the rest is.
    """

    folder: Path
    tables: list[Path]
    figures: list[Path]
    report: Path
    text: str


@dataclass(frozen=True)
class Study:
    """A study by its name.

    Args:
        name: as on the command line.
        description: in one line.
        settings: its dataclass, for :class:`entropy_pl.config.SettingsParser`.
        run: ``run(settings, *, progress_bar=True)`` does what is not done yet and returns a :class:`StudyOutcome`.
    """

    name: str
    description: str
    settings: type[StudySettings]
    run: Callable[..., StudyOutcome]


def advance_by_phase(bar: tqdm[Any]) -> Callable[[str], None]:
    """What a measurement calls after every pass, to move a bar."""

    def advance(phase: str) -> None:
        bar.set_postfix_str(phase, refresh=False)
        bar.update()

    return advance
