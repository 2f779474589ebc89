import json
import math

import numpy as np
import pytest
import torch

from entropy_pl.reporting import RecordWriter, latest_per_step, read_records, taken_point
from entropy_pl.reporting.records import number


def test_what_is_written_is_read_in_order(tmp_path, make, make_failed):
    records = [make(0), make_failed(5, message="Δθ = 0\nat U+2028:\u2028"), make(10)]
    writer = RecordWriter(tmp_path / "new" / "folder" / "probes.jsonl")
    for record in records:
        writer.write(record)
    assert read_records(writer.path) == records
    assert writer.path.read_bytes().count(b"\n") == 3


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
    with pytest.warns(UserWarning, match="line 2 is not a probe record"):
        records = read_records(path)
    assert [record["step"] for record in records] == [0, 10]


def test_a_line_whole_but_for_its_newline_is_kept(tmp_path, make):
    path = tmp_path / "probes.jsonl"
    RecordWriter(path).write(make(0))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    RecordWriter(path).write(make(5))
    assert [record["step"] for record in read_records(path)] == [0, 5]


@pytest.mark.parametrize(
    ("line", "reason"),
    [(b"[1, 2]", "got list"), (b"\xff\xfe", "utf-8"), (b'{"schema": 2}', "expected schema 1, got 2"), (b"{", "line 1")],
)
def test_bad_lines_are_named_and_left_out(tmp_path, line, reason):
    (tmp_path / "p").write_bytes(line + b'\n\n{"step": 1, "lr": NaN}\n')
    with pytest.warns(UserWarning, match=rf"line 1 is not a probe record.*{reason}"):
        assert read_records(tmp_path / "p") == [{"step": 1, "lr": None}]


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file of probe records .* got .*nowhere"):
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


@pytest.mark.parametrize("value", [None, math.nan, math.inf, "1"])
def test_number_of_what_is_none(value):
    assert math.isnan(number({"a": value}, "a"))
    assert number({"a": np.float32(0.5)}, "a") == 0.5
