"""What a run left in its folder, read for a report: nothing in it is executed, and what is damaged is named."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from entropy_pl.records import Record
from entropy_pl.runs.folder import find_records, records_in

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and values of what a trainer logged, ``[n]`` each."""

CURVES = ("reward", "entropy")
OURS = "entropy_probe/"  # tags that are the records' own numbers
HELD_OUT = {"eval", "val", "valid", "validation", "test"}  # of tags that are no training batch's
EVENTS, METRICS = "events.out.tfevents.*", "metrics.csv"
LONGEST = 200_000  # characters of a config


@dataclass(frozen=True)
class RunFolder:
    """A run's records, and what lies beside them.

    Args:
        path: the run's folder.
        probe: the folder of its records.
        records: as they were written; of an offline measurement its results alone.
        damaged: a line of text for everything that could not be read.
        config_text: the run's ``config.yaml``, or ``hparams.yaml``; empty where there is none.
        config: the same, as far as it is plain YAML.
        curves: what the trainer logged as reward and entropy, from its TensorBoard event files or ``metrics.csv``.
        token_files: attributed tokens by step, as :meth:`.AttributedTokens.save` writes them; None for an update of no
            step.
        token_pages: pages of them by step.
    """

    path: Path
    probe: Path
    records: list[Record] = field(repr=False)
    damaged: list[str] = field(default_factory=list)
    config_text: str = field(default="", repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    curves: dict[str, Curve] = field(default_factory=dict, repr=False)
    token_files: dict[int | None, Path] = field(default_factory=dict, repr=False)
    token_pages: dict[int | None, Path] = field(default_factory=dict, repr=False)

    @property
    def is_measurement(self) -> bool:
        """Whether it is one offline measurement's rather than a training run's."""
        return any(record.is_measurement for record in self.records)


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Everything a report shows.

    Args:
        path: a run's folder (Lightning's ``version_0``, a Trainer's ``output_dir``), one that holds a single such
            folder, the folder ``entropy_probe`` itself, or the output folder of ``entropy-pl measure``.

    Raises:
        ValueError: if there are no records in it, or those of several runs.
    """
    run, file = find_records(Path(path))
    records, damaged = records_in(file)
    text, config = _config(run, damaged)
    probe = file.parent
    files, pages = _tokens(probe, records, "npz"), _tokens(probe, records, "html")
    return RunFolder(run, probe, records, damaged, text, config, _curves(run, damaged), files, pages)


def _config(run: Path, damaged: list[str]) -> tuple[str, dict[str, Any]]:
    for file in (run / "config.yaml", run / "hparams.yaml"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")[:LONGEST]
            config = yaml.safe_load(text)
        except (OSError, UnicodeDecodeError) as error:
            damaged.append(f"{file} could not be read: {error}")
        # tags of Python's own, which stay text; values that are not of their tag: `!!bool maybe`
        except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
            damaged.append(f"{file} is no plain YAML, and is shown as it is: {type(error).__name__}")
            return text, {}
        else:
            return text, config if isinstance(config, dict) else {}
    return "", {}


def _tokens(probe: Path, records: list[Record], ending: str) -> dict[int | None, Path]:
    """Files of attributed tokens by step: one of a measurement, one of every probe of a run."""
    if (alone := probe / f"attribution.{ending}").is_file():
        return {records[0].step: alone}
    numbered = [(file.stem.removeprefix("step_"), file) for file in sorted(probe.glob(f"attribution/step_*.{ending}"))]
    return {int(step): file for step, file in numbered if step.isdecimal()}


def _curves(run: Path, damaged: list[str]) -> dict[str, Curve]:
    """Reward and entropy as the trainer logged them; a resumed run's as it finally went."""
    points: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CURVES}
    for read, file in [
        *((_from_events, file) for file in sorted(run.rglob(EVENTS))),
        *((_from_csv, file) for file in sorted(run.glob(METRICS))),
    ]:
        try:
            for name, *point in read(file):
                points[name].append((point[0], point[1], point[2]))
        except Exception as error:  # whatever protocol buffers and csv fail with on a damaged file
            damaged.append(f"{file} could not be read: {type(error).__name__}: {error}")
    curves = {}
    for name, found in points.items():
        kept: list[tuple[float, float]] = []
        for _, step, value in sorted(found, key=lambda point: point[0]):  # by the clock
            while kept and kept[-1][0] >= step:
                kept.pop()
            kept.append((step, value))
        if kept:
            steps, values = np.array(kept, dtype=float).T
            curves[name] = (steps, values)
    return curves


def _curve_of(tag: str) -> str | None:
    """Which curve a tag is: ``reward`` of ``train/reward``; of the probe's own tags and of ``eval/reward``, none."""
    *within, name = tag.split("/")
    return name if name in CURVES and not tag.startswith(OURS) and not HELD_OUT & set(within) else None


def _from_events(file: Path) -> Iterator[tuple[str, float, float, float]]:
    """Name, time, step and value of every point of an event file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keep = {"scalars": 0, "images": 1, "tensors": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1}
    events = EventAccumulator(str(file), size_guidance=keep).Reload()
    for tag in events.Tags()["scalars"]:
        if (name := _curve_of(tag)) is not None:
            for event in events.Scalars(tag):
                if math.isfinite(event.value):
                    yield name, event.wall_time, event.step, event.value


def _from_csv(file: Path) -> Iterator[tuple[str, float, float, float]]:
    """The same of Lightning's ``metrics.csv``, in the order of its rows."""
    with open(file, newline="", encoding="utf-8") as lines:
        for row, cells in enumerate(csv.DictReader(lines)):
            for tag, cell in cells.items():
                name = _curve_of(tag or "")
                if name is not None and cell and cells.get("step") and math.isfinite(float(cell)):
                    yield name, float(row), float(cells["step"]), float(cell)
