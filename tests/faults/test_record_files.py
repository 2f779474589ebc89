"""A records file that something has happened to: good lines are kept, bad ones named, and a run goes on with it."""

from __future__ import annotations

import warnings

import pytest
from six_steps import Saves, measured, records, run

from entropy_pl.reporting import RecordWriter, latest_per_step, read_records


def test_a_run_goes_on_with_a_damaged_file(tmp_path, uninterrupted):
    run(tmp_path, Saves(tmp_path / "a.ckpt"), steps=3)
    file = tmp_path / "records.jsonl"
    first, second = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([b"\x00" * 40, first[:-30], b'{"schema": 1, "step": [4]}', second]) + b"\n")
    with pytest.warns(UserWarning, match=r"records\.jsonl, line 1 is not a record and was left out") as caught:
        run(tmp_path, ckpt_path=tmp_path / "a.ckpt")
    said = "\n".join(str(warning.message) for warning in caught)
    assert "records.jsonl, line 2 is not a record and was left out" in said
    assert "line 3 is not a record and was left out: expected 'step' to be a whole number" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert records(tmp_path) == uninterrupted.records[1:]


@pytest.mark.parametrize("lost", [1, None], ids=["a record is damaged", "a record has followed"])
def test_a_run_taken_again_over_its_records_shows_every_step(tmp_path, uninterrupted, capsys, lost):
    """Steps 0, 2 and 4, of which 2 is damaged, or was written again last; a line that is no probe's lies among them."""
    file = tmp_path / "records.jsonl"
    for record in uninterrupted.records:
        RecordWriter(file).write(record)
    lines = file.read_bytes().splitlines()
    lines = [b"{" if n == lost else line for n, line in enumerate(lines)] + ([lines[1]] if lost is None else [])
    file.write_bytes(b"\n".join([b"{}", *lines]) + b"\n")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path)
        found = read_records(file)
    assert not [warning for warning in caught if "could not" in str(warning.message)]
    shown = [measured(record) for record in latest_per_step(found[1:])]
    assert shown == uninterrupted.records
    assert "delta_entropy.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_a_flipped_byte_costs_one_record_at_most(tmp_path, name):
    """Every byte in turn; a compressed record that is given out is one that was written, by its checksum."""
    path = tmp_path / name
    written = [{"step": step, "text": "µ" * step} for step in range(3)]
    ends = [0]
    for record in written:
        RecordWriter(path).write(record)
        ends.append(path.stat().st_size)
    data = path.read_bytes()
    for index in range(ends[1], ends[2] - 1):
        path.write_bytes(data[:index] + bytes([data[index] ^ 0x15]) + data[index + 1 :])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = read_records(path)
        others = [record for record in found if record not in (written[0], written[2])]
        assert found[0] == written[0]
        assert found[-1] == written[2]
        assert len(found) + len(caught) >= 3  # what is missing is said
        assert path.suffix != ".gz" or others in ([], [written[1]])
