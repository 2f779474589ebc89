"""Where a run keeps its records, and what can be read of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from entropy_pl.records import Record, current, read_records

FOLDER, RECORDS, RESULTS = "entropy_probe", "records.jsonl", "results.json"


def find_records(path: Path) -> tuple[Path, Path]:
    """Return the run's folder, and the file of its records or results.

    Args:
        path: a run's folder (Lightning's ``version_0``, a Trainer's ``output_dir``), one that holds a single such
            folder, the folder ``entropy_probe`` itself, another folder with ``records.jsonl`` in it, that file, or the
            output folder of ``entropy-pl measure``.

    Raises:
        ValueError: if there are no records in it, or those of several runs.
    """
    expected = f"expected a run's folder with {FOLDER}/{RECORDS}, got {path}"
    if not path.exists():
        raise ValueError(f"{expected}: there is no such folder")
    if not path.is_dir():
        if path.name not in (RECORDS, RESULTS):
            raise ValueError(f"{expected}, which is a file: give the folder it lies in")
        path = path.parent
    for file in (path / FOLDER / RECORDS, path / RECORDS, path / RESULTS):
        if file.is_file():
            return (path.parent if path.name == FOLDER else path), file
    found = sorted({file.parents[1] for steps in ("*", "*/*") for file in path.glob(f"{steps}/{FOLDER}/{RECORDS}")})
    if not found:
        inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise ValueError(
            f"{expected}, which holds {inside}: give the folder of a run that a probe was attached to, or the "
            "output_directory of entropy-pl measure"
        )
    if len(found) > 1:
        names = ", ".join(str(run) for run in found[:8]) + (", ..." if len(found) > 8 else "")
        raise ValueError(f"expected the folder of one run, got {path}, which holds {len(found)}: give one of {names}")
    return found[0], found[0] / FOLDER / RECORDS


def records_in(file: Path) -> tuple[list[Record], list[str]]:
    """Return the records of a file in the order they were written, and a line of text for everything left out.

    Args:
        file: as :func:`find_records` found it: of a run's probes, or the results of one measurement.

    Raises:
        ValueError: if a file of results does not hold a measurement's.
    """
    return ([_measurement(file)], []) if file.name == RESULTS else _probes(file)


def _measurement(file: Path) -> Record:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {file} to hold the results of a measurement, got no JSON: {error}") from error
    if not isinstance(results, dict) or results.get("kind") != "measurement":
        raise ValueError(f"expected {file} to hold the results of a measurement, got something else")
    try:
        return Record.from_json(current(results))
    except ValueError as error:
        raise ValueError(f"expected {file} to hold the results of a measurement: {error}") from error


def _probes(file: Path) -> tuple[list[Record], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lines = read_records(file)
    left_out = [str(warning.message) for warning in caught]
    probes = [Record.from_json(line) for line in lines if line.get("kind", "probe") == "probe"]
    whole = [record for record in probes if record.step is not None]
    if len(whole) < len(probes):
        count = len(probes) - len(whole)
        left_out.append(f"{file}: records without a whole number as their step were left out: {count}")
    return whole, left_out
