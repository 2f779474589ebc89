import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from entropy_pl.reporting import RecordWriter, latest_per_step, read_records, taken_point


def test_what_is_written_is_read_in_order(tmp_path, make, make_failed):
    records = [make(0), make_failed(5, message="Δθ = 0\nat U+2028:\u2028"), make(10)]
    writer = RecordWriter(tmp_path / "new" / "folder" / "probes.jsonl")
    for record in records:
        writer.write(record)
    assert read_records(writer.path) == records
    assert writer.path.read_bytes().count(b"\n") == 3


def test_a_compressed_file_is_read_by_pythons_gzip_and_by_zcat(tmp_path, make):
    path, records = tmp_path / "probes.jsonl.gz", [make(0), make(5, reward=math.nan, note="\u2028é")]
    for record in records:
        RecordWriter(path).write(record)
    records[1]["reward"] = None
    assert read_records(path) == records
    with gzip.open(path, "rt") as file:
        assert [json.loads(line) for line in file] == records
    if shutil.which("zcat"):
        lines = subprocess.run(["zcat", path], stdout=subprocess.PIPE, check=True).stdout.splitlines()
        assert [json.loads(line) for line in lines] == records


def test_a_log_compressed_afterwards_is_read_too(tmp_path, make):
    RecordWriter(tmp_path / "p").write(make(0))
    RecordWriter(tmp_path / "p").write(make(5))
    (tmp_path / "p.gz").write_bytes(gzip.compress((tmp_path / "p").read_bytes()))  # both lines in one member
    RecordWriter(tmp_path / "p.gz").write(make(10))
    assert [record["step"] for record in read_records(tmp_path / "p.gz")] == [0, 5, 10]


def test_numbers_of_other_libraries_become_plain_and_non_finite_ones_null(tmp_path):
    RecordWriter(tmp_path / "p").write(
        {
            "step": np.int64(3),
            "ok": np.bool_(True),
            "nan": math.nan,
            "inf": np.float32(-np.inf),
            "values": torch.tensor([[1.0, float("nan")]], dtype=torch.float64),
            "etas": (1e-5, math.inf),
            "path": tmp_path,
        }
    )

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    assert json.loads((tmp_path / "p").read_text(), parse_constant=refuse) == {
        "step": 3,
        "ok": True,
        "nan": None,
        "inf": None,
        "values": [[1.0, None]],
        "etas": [1e-5, None],
        "path": str(tmp_path),
    }


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_line_cut_short_by_a_killed_run_costs_that_line_only(tmp_path, make, cut):
    path = tmp_path / "probes.jsonl"
    for step in (0, 5):
        RecordWriter(path).write(make(step))
    path.write_bytes(path.read_bytes()[: -1 - cut])
    RecordWriter(path).write(make(10))
    with pytest.warns(UserWarning, match="line 2 is not a record"):
        records = read_records(path)
    assert [record["step"] for record in records] == [0, 10]


def test_a_line_whole_but_for_its_newline_is_kept(tmp_path, make):
    path = tmp_path / "probes.jsonl"
    RecordWriter(path).write(make(0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    RecordWriter(path).write(make(5))
    assert [record["step"] for record in read_records(path)] == [0, 5]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_file_cut_anywhere_gives_the_records_whose_bytes_are_whole(tmp_path, name):
    path, ends = tmp_path / name, []
    for step in range(3):
        RecordWriter(path).write({"step": step, "text": "µ" * step})
        ends.append(path.stat().st_size)
    newline = 0 if path.suffix == ".gz" else 1  # is no byte of the record
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        whole = [step for step, end in enumerate(ends) if end - newline <= cut]
        path.write_bytes(data[:cut])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert [record["step"] for record in read_records(path)] == whole
        torn = cut not in (0, *ends, *(end - newline for end in ends))
        assert len(caught) == torn
        RecordWriter(path).write({"step": 9})  # the run resumed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert [record["step"] for record in read_records(path)] == [*whole, 9]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_every_record_that_was_finished_survives_kill_9(tmp_path, name):
    text = random.Random(0).randbytes(300_000).hex()  # large, and hardly compressible: the kill falls within a write
    for attempt in range(8):
        path, (reader, writer) = tmp_path / f"{attempt}-{name}", os.pipe()
        child = os.fork()
        if not child:
            try:
                for index in range(10_000):
                    RecordWriter(path).write({"index": index, "text": text})
                    os.write(writer, b".")
            finally:
                os._exit(1)
        os.close(writer)
        os.read(reader, 1)
        time.sleep(random.Random(attempt).uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with open(reader, "rb") as pipe:
            reported = 1 + len(pipe.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the record that was being written
            records = read_records(path)
        assert len(records) in (reported, reported + 1)  # killed between writing and reporting
        assert records == [{"index": index, "text": text} for index in range(len(records))]


@contextmanager
def file_size_limit(size):
    """A disk that is full as soon as a file has this many bytes: the kernel writes up to there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_short_write_is_an_error_that_names_the_file_and_leaves_it_as_it_was(tmp_path, name):
    writer = RecordWriter(tmp_path / name)
    writer.write({"step": 0})
    before = writer.path.read_bytes()
    large = {"step": 1, "text": random.Random(0).randbytes(5000).hex()}
    with file_size_limit(1000), pytest.raises(OSError, match=rf"expected to write \d+ bytes, wrote \d+.*{name}"):
        writer.write(large)
    assert writer.path.read_bytes() == before
    with file_size_limit(len(before)), pytest.raises(OSError, match=rf"too large.*{name}"):
        writer.write({"step": 2})
    writer.write(large)
    assert read_records(writer.path) == [{"step": 0}, large]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full, the disk that is always full")
def test_a_full_disk_is_an_error_that_names_the_file():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        RecordWriter("/dev/full").write({"step": 0})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[1, 2]", "got list"),
        (b"\xff\xfe", "utf-8"),
        (b'{"schema": 3}', "expected schema 2 or 1"),
        (b"{", "line 1"),
    ],
)
def test_bad_lines_are_named_and_left_out(tmp_path, line, reason):
    (tmp_path / "p").write_bytes(line + b'\n\n{"step": 1, "lr": NaN}\n')
    with pytest.warns(UserWarning, match=rf"line 1 is not a record.*{reason}"):
        assert read_records(tmp_path / "p") == [{"step": 1, "lr": None}]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of records .* got .*nowhere"):
        read_records(tmp_path / "nowhere")


def test_what_is_no_record_is_refused_and_leaves_the_file_alone(tmp_path):
    writer = RecordWriter(tmp_path / "p")
    with pytest.raises(TypeError, match="expected a record"):
        writer.write([1])
    with pytest.raises(TypeError, match=r"expected record\['a'\]\[1\] to be JSON-able, got object"):
        writer.write({"a": [0, object()]})
    assert not writer.path.exists()


def test_latest_per_step_drops_the_trajectory_a_resumed_run_gave_up():
    first = [{"step": step, "run": 1} for step in (0, 5, 10, 15)]
    again = [{"step": step, "run": 2} for step in (5, 8)]
    assert latest_per_step([*first, {"kind": "note"}, *again]) == [first[0], *again]


def test_latest_per_step_wants_steps():
    with pytest.raises(ValueError, match="integer 'step', got None"):
        latest_per_step([{"lr": 1e-4}])


def test_taken_point(make, make_failed):
    assert taken_point(make())["eta"] == 1e-4
    assert taken_point(make(multipliers=(0.5, 2))) is None
    assert taken_point(make_failed(0)) is None
