"""Files of records: one JSON line each, written so that a killed run loses nothing it had measured.

Files are strict JSON: a number that is not finite is written as null, since ``NaN`` is not JSON and most readers
refuse it. A file whose name ends in ``.gz`` is compressed, every record a gzip member of its own: ``zcat`` reads it,
and a file cut short still yields every member that is whole.
"""

from __future__ import annotations

import errno
import gzip
import json
import os
import warnings
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from entropy_pl.records.older import from_schema_1
from entropy_pl.records.record import SCHEMA, Json, Record
from entropy_pl.records.strict_json import to_json

GZIP_MAGIC = b"\x1f\x8b\x08"  # how every gzip member begins
CHUNK = 1 << 16  # bytes decompressed at a time: what lies behind a member's end is copied once per member


class RecordWriter:
    """Appends records to a file of JSON lines.

    Each record is one write of a full line, on disk (fsync) when :meth:`write` returns. A write that fails leaves the
    file as it was, so that it can be tried again. What a killed run left unfinished stays as it is, and the next record
    starts on a line, or a gzip member, of its own: :func:`read_records` goes on behind the gap, where ``zcat`` stops.
    Nothing is kept open in between.

    Args:
        path: the file to append to, compressed if its name ends in ``.gz``; it and its folders are made when first
            written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, record: Record | Mapping[str, Any]) -> None:
        """Append one record.

        Args:
            record: what to write, in either form; NumPy and torch numbers and arrays become plain ones, numbers that
                are not finite become null.

        Raises:
            TypeError: if the record is not a mapping, or holds something that JSON has no form for.
            OSError: if the line could not be written in full; what was written of it is taken back.
        """
        if isinstance(record, Record):
            record = record.to_json()
        if not isinstance(record, Mapping):
            raise TypeError(f"expected a record (a mapping), got {type(record).__name__}")
        line = to_json(record).encode() + b"\n"
        if _compressed(self.path):
            line = gzip.compress(line, compresslevel=6, mtime=0)  # no clock: the same records give the same file
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", buffering=0) as file:  # unbuffered: one system call per line
            end = file.seek(0, os.SEEK_END)
            if not _compressed(self.path) and end:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            try:
                written = file.write(line)
                os.fsync(file.fileno())
                if written != len(line):
                    raise OSError(errno.ENOSPC, f"expected to write {len(line)} bytes, wrote {written}: disk full?")
            except BaseException as error:  # an interrupt as well: it is tried again, and would then stand there twice
                with suppress(OSError):
                    file.truncate(end)
                if isinstance(error, OSError):  # which, of an open file, does not say its name
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                raise


def read_records(path: str | os.PathLike[str]) -> list[Json]:
    """Return the records of a file as JSON has them, in the order they were written.

    Lines that are no record (unfinished, not JSON, of a schema that this version does not know, with something else
    under a record's keys) are left out, with a warning that names them; so are the bytes of a ``.gz`` file that belong
    to no whole gzip member. Records of schema 1 are converted to this version's
    (:mod:`entropy_pl.records.older`).

    Args:
        path: a file written by :class:`RecordWriter`.

    Returns:
        One dict per good line; empty for an empty file.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of records (JSON lines), got {path}, which is not a file")
    data = path.read_bytes()
    if _compressed(path):
        size, (data, lost) = len(data), _whole_members(data)
        if lost:
            warnings.warn(f"{path}: {lost} of {size} bytes are in no whole gzip member and were left out", stacklevel=2)
    records = []
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_parse(line))
        except ValueError as error:
            warnings.warn(f"{path}, line {number} is not a record and was left out: {error}", stacklevel=2)
    return records


def _compressed(path: Path) -> bool:
    return path.suffix == ".gz"


def _whole_members(data: bytes) -> tuple[bytes, int]:
    """The text of every whole gzip member, and how many bytes are in none."""
    view = memoryview(data)
    texts: list[bytes] = []
    start = lost = 0
    while start < len(data):
        end, text = _member(view, start)
        if not end:  # cut short by a killed run; a later run may have gone on behind it
            end = data.find(GZIP_MAGIC, start + 1)
            end = len(data) if end < 0 else end
            lost += end - start
            text = b"\n"
        texts.append(text)
        start = end
    return b"".join(texts), lost


def _member(view: memoryview, start: int) -> tuple[int, bytes]:
    """Where the whole gzip member that begins at ``start`` ends, and its text; 0 where there is none."""
    reader = zlib.decompressobj(wbits=31)  # with gzip's header, and its checksum verified
    parts = []
    for at in range(start, len(view), CHUNK):
        chunk = view[at : at + CHUNK]
        try:
            parts.append(reader.decompress(chunk))
        except zlib.error:
            break
        if reader.eof:
            return at + len(chunk) - len(reader.unused_data), b"".join(parts)
    return 0, b""


def _parse(line: bytes) -> Json:
    try:
        record = json.loads(line.decode(), parse_constant=lambda token: None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if b"\\ud" in line.lower():  # escapes of half a character, which no file or terminal takes: � in their place
        text = json.dumps(record, ensure_ascii=False).encode("utf-16", "surrogatepass")
        record = json.loads(text.decode("utf-16", "replace"))
    return current(record)


def current(record: Json) -> Json:
    """Return a record that was read as this version writes it: one of schema 1 converted, one of another refused.

    Args:
        record: as JSON has it.

    Returns:
        The record, or its conversion.

    Raises:
        ValueError: if it is of another schema, or has something else under a record's keys.
    """
    schema = record.get("schema", SCHEMA)
    if schema not in (1, SCHEMA):
        raise ValueError(f"expected schema {SCHEMA} or 1, got {schema!r}")
    if schema == 1:
        record = from_schema_1(record)
    if record.get("kind", "probe") in ("probe", "measurement"):
        Record.from_json(record)  # refuses what only looks like one
    return record
