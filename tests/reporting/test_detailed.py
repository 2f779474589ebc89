import gzip
import json
import math
import os
import signal
from dataclasses import replace
from statistics import stdev

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors import SafetensorError
from safetensors.torch import load_file

from entropy_pl.estimators import first_order_delta_entropy, snis_delta_entropy
from entropy_pl.reporting import (
    DetailedLog,
    LoggingSettings,
    MeasuredBatch,
    config_hash,
    raw_tensors,
    read_records,
    sequence_records,
    summary_record,
    token_records,
)
from entropy_pl.rollout import Rollout, TokenStats

LENGTHS = [3, 1, 5, 4, 2, 5]
ETAS = (1e-2, 1e-3)
HEAD = {"schema", "kind", "run_id"}
CONFIG = {"probe": {"etas": ETAS, "seed": 0}, "name": "tiny"}
RESULT = {"sweep": [{"eta": 1e-3, "deltaH_true": -0.5, "stderr": math.nan}], "versions": {"torch": "2"}}


def measured(**others):
    """A batch of numbers drawn at random, measured by the estimators; sequences 2i and 2i + 1 share a prompt."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    clusters = torch.arange(len(LENGTHS)) // 2

    def stats(scale=1.0):
        s, h = (scale * torch.rand(shape, generator=generator, dtype=torch.float64) * mask for _ in range(2))
        return TokenStats(-s, h, mask)

    base, tangent = stats(), stats(20.0)
    shifted = {
        eta: TokenStats(base.logp + eta * tangent.logp, base.entropy + eta * tangent.entropy, mask) for eta in ETAS
    }
    options = {"normalize": "per_sequence", "weighting": "sequence", "clusters": clusters}
    batch = MeasuredBatch(
        rollout=Rollout(
            prompt_ids=clusters[:, None].expand(-1, 2),
            prompt_mask=torch.ones(len(LENGTHS), 2),
            completion_ids=torch.randint(1, 99, shape, generator=generator) * mask,
            completion_mask=mask,
        ),
        base=base,
        shifted=shifted,
        changes={eta: snis_delta_entropy(base, stat, **options) for eta, stat in shifted.items()},
        first_order=first_order_delta_entropy(base, tangent, **options),
        tangent=tangent,
        clusters=clusters,
        prompts=[f"prompt {i // 2}" for i in range(len(LENGTHS))],
        completions=[f"completion {i}\n" for i in range(len(LENGTHS))],
    )
    return replace(batch, **others)


@pytest.fixture
def settings(tmp_path):
    """Factory of settings that are enabled and write below ``tmp_path``."""
    return lambda **options: LoggingSettings(enabled=True, output_directory=str(tmp_path / "logs"), **options)


def write(settings, run_id="run", batch=None):
    with DetailedLog(settings, run_id) as log:
        log.write_measurement(RESULT, batch or measured(), config=CONFIG, seconds=1.5)
    return log


def kinds(settings):
    return [record["kind"] for record in read_records(write(settings).path)]


N = len(LENGTHS)
SUMMARY, STANDARD = ["summary"], ["summary", "measurement"]
DETAILED, DEBUG = [*STANDARD, *["sequence"] * N], [*STANDARD, *["sequence"] * N, *["tokens"] * N]


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("level", "expected"), [("minimal", SUMMARY), ("standard", STANDARD), ("detailed", DETAILED), ("debug", DEBUG)]
)
def test_each_level_adds_its_kinds(settings, level, expected, compress):
    log = write(settings(level=level, compress=compress))
    assert [record["kind"] for record in read_records(log.path)] == expected
    assert {record["run_id"] for record in read_records(log.path)} == {"run"}
    assert log.tensors_path.exists() == (level == "debug")
    assert log.path.name == "measure-run.jsonl" + (".gz" if compress else "")
    with (gzip.open if compress else open)(log.path, "rt") as file:
        assert [json.loads(line)["kind"] for line in file] == expected


@pytest.mark.parametrize(
    ("level", "flags", "expected", "texts", "tensors"),
    [
        ("minimal", {"log_tokens": True}, [*SUMMARY, *["tokens"] * N], False, False),
        ("standard", {"log_sequences": True}, DETAILED, True, False),
        ("standard", {"log_raw_tensors": True}, STANDARD, False, True),
        ("detailed", {}, DETAILED, True, False),
        ("detailed", {"log_sequences": False}, DETAILED, False, False),
        ("debug", {}, DEBUG, True, True),
        ("debug", {"log_tokens": False, "log_raw_tensors": False}, DETAILED, True, False),
    ],
)
def test_flags_add_to_the_level_and_take_away(settings, level, flags, expected, texts, tensors):
    log = write(settings(level=level, **flags))
    records = read_records(log.path)
    assert [record["kind"] for record in records] == expected
    assert any("prompt" in record for record in records) == any("completion" in record for record in records) == texts
    assert log.tensors_path.exists() == tensors


def test_a_log_that_is_not_enabled_touches_nothing(tmp_path):
    settings = LoggingSettings(level="debug", log_raw_tensors=True, output_directory=str(tmp_path / "logs"))
    log = write(settings)
    assert log.write_tensors({"a": torch.zeros(1)}) is None
    assert not any(tmp_path.iterdir())


def test_nothing_is_opened_before_the_first_write(tmp_path, settings):
    DetailedLog(settings(), "run").close()
    assert not any(tmp_path.iterdir())


def test_summary(settings):
    batch = measured()
    (record,) = read_records(write(settings(level="minimal"), batch=batch).path)
    assert record == {
        "schema": 2,
        "kind": "summary",
        "run_id": "run",
        "config_hash": config_hash(CONFIG),
        "sweep": [
            {
                "eta": eta,
                "deltaH_true": batch.changes[eta].value,
                "deltaH_approx": eta * batch.first_order.value,
            }
            for eta in sorted(ETAS)
        ],
        "timing": {"total": 1.5},
    }


def test_the_whole_result_stands_in_the_measurement(settings):
    record = read_records(write(settings()).path)[1]
    assert {key: record[key] for key in record.keys() - HEAD} == {
        "sweep": [{"eta": 1e-3, "deltaH_true": -0.5, "stderr": None}],
        "versions": {"torch": "2"},
    }


def test_config_hash_knows_content_and_not_order():
    assert config_hash({"a": 1, "b": {"c": [1.0], "d": None}}) == config_hash({"b": {"d": None, "c": (1.0,)}, "a": 1})
    assert len({config_hash(config) for config in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {})}) == 5


def test_the_estimates_can_be_had_again_from_the_sequences(settings):
    """ΔH(η) = Σ w H(η)/Σ w − mean H with w = exp(log weight), SE = sd of ψ summed by prompt, · √C/N."""
    batch = measured()
    log = write(settings(level="detailed"))
    records = [record for record in read_records(log.path) if record["kind"] == "sequence"]

    def clustered_error(influences):
        by_prompt = [sum(pair) for pair in zip(influences[::2], influences[1::2], strict=True)]
        return stdev(by_prompt) * math.sqrt(len(by_prompt)) / N

    for j, eta in enumerate(sorted(ETAS)):
        points = [record["sweep"][j] for record in records]
        assert {point["eta"] for point in points} == {eta}
        weights = [math.exp(point["log_weight"]) for point in points]
        after = sum(w * point["entropy"] for w, point in zip(weights, points, strict=True)) / sum(weights)
        before = sum(record["entropy"] for record in records) / N
        assert after - before == pytest.approx(batch.changes[eta].value, rel=1e-10)  # float64 sums in another order
        assert clustered_error([point["influence"] for point in points]) == pytest.approx(
            batch.changes[eta].stderr, rel=1e-10
        )
    assert clustered_error([record["first_order_influence"] for record in records]) == pytest.approx(
        batch.first_order.stderr, rel=1e-10
    )


def test_sequence_records():
    batch = measured()
    records = list(sequence_records(batch))
    assert [record["index"] for record in records] == list(range(N))
    assert [record["cluster"] for record in records] == [0, 0, 1, 1, 2, 2]
    assert [record["n_tokens"] for record in records] == LENGTHS
    assert {record["n_prompt_tokens"] for record in records} == {2}
    # float64 sums in another order
    assert [record["logp"] for record in records] == pytest.approx(
        [sum(row) for row in batch.base.logp.tolist()], 1e-14
    )
    assert records[3]["prompt"] == "prompt 1"
    assert records[3]["completion"] == "completion 3\n"
    numbers = {"index", "cluster", "n_prompt_tokens", "n_tokens", "logp", "entropy", "first_order_influence", "sweep"}
    assert {frozenset(record) for record in sequence_records(batch, texts=False)} == {frozenset(numbers)}


def test_sequence_records_of_the_bare_minimum():
    batch = measured(tangent=None, clusters=None, prompts=None, completions=None, shifted={}, changes={})
    for i, record in enumerate(sequence_records(batch)):
        assert record["cluster"] == i
        assert not record["sweep"]
        assert record["prompt"] is record["completion"] is None


def test_token_records_hold_the_completions_tokens_and_no_padding():
    batch = measured()
    for i, record in enumerate(token_records(batch)):
        assert record == {
            "index": i,
            "token_id": batch.rollout.completion_ids[i, : LENGTHS[i]].tolist(),
            "logp": batch.base.logp[i, : LENGTHS[i]].tolist(),
            "entropy": batch.base.entropy[i, : LENGTHS[i]].tolist(),
            "logp_dot": batch.tangent.logp[i, : LENGTHS[i]].tolist(),
            "entropy_dot": batch.tangent.entropy[i, : LENGTHS[i]].tolist(),
        }
    assert all(record["logp_dot"] is record["entropy_dot"] is None for record in token_records(measured(tangent=None)))


def test_raw_tensors_come_back_bit_by_bit(settings):
    batch = measured()
    batch.base.logp[0, 0] = math.nan  # which JSON could not keep
    loaded = load_file(write(settings(log_raw_tensors=True), batch=batch).tensors_path)
    of_tokens = {"base/logp", "base/entropy", "tangent/logp", "tangent/entropy"}
    of_tokens |= {f"shifted/{eta}/{name}" for eta in ("0.001", "0.01") for name in ("logp", "entropy")}
    influences = {"first_order/influence", "change/0.001/influence", "change/0.01/influence"}
    ids = {f"rollout/{part}_{name}" for part in ("prompt", "completion") for name in ("ids", "mask")}
    assert loaded.keys() == of_tokens | influences | ids | {"clusters"} == raw_tensors(batch).keys()
    assert loaded["rollout/completion_mask"].dtype is torch.bool
    torch.testing.assert_close(loaded, raw_tensors(batch), rtol=0, atol=0, equal_nan=True)


def test_tensors_may_share_storage_and_replace_those_of_an_earlier_call(settings):
    rows = torch.arange(6.0).reshape(2, 3).requires_grad_()
    with DetailedLog(settings(level="debug"), "run") as log:
        log.write_tensors({"old": rows})
        assert log.write_tensors({"all": rows, "first": rows[0], "column": rows.T[1]}) == log.tensors_path
    loaded = load_file(log.tensors_path)
    assert {name: tensor.tolist() for name, tensor in loaded.items()} == {
        "all": [[0, 1, 2], [3, 4, 5]],
        "first": [0, 1, 2],
        "column": [1, 4],
    }
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["measure-run.jsonl", "measure-run.safetensors"]
    assert log.tensors_path.stat().st_mode == log.path.stat().st_mode  # whoever may read one may read the other


def test_tensors_that_do_not_fit_leave_those_of_before(settings, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"some of it")
        raise SafetensorError("No space left on device")  # as safetensors does

    with DetailedLog(settings(level="debug"), "run") as log:
        log.write_tensors({"a": torch.zeros(2)})
        monkeypatch.setattr("entropy_pl.reporting.detailed_log.save_file", full)
        with pytest.raises(OSError, match=r"expected to write 1 tensors to .*run\.safetensors, got: No space"):
            log.write_tensors({"a": torch.ones(2)})
    assert load_file(log.tensors_path)["a"].tolist() == [0, 0]
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["measure-run.jsonl", "measure-run.safetensors"]


def test_a_run_id_used_again_goes_on_in_its_file(settings):
    for _ in range(2):
        write(settings(level="minimal", max_files=1))
    assert kinds(settings(level="minimal", max_files=1)) == SUMMARY * 3


def test_a_run_id_used_again_removes_nothing_of_its_own(settings):
    plain = write(settings(level="minimal", max_files=1, log_raw_tensors=True))
    packed = write(settings(level="minimal", max_files=1, compress=True))
    assert set(plain.path.parent.iterdir()) == {plain.path, plain.tensors_path, packed.path}


SUFFIXES = (".jsonl", ".safetensors", ".safetensors.tmp")


def aged(directory, **ages):
    """Logs with their tensors, by run id and age in seconds."""
    directory.mkdir(exist_ok=True)
    for run_id, age in ages.items():
        for suffix in (SUFFIXES[0] + ".gz" if run_id == "packed" else SUFFIXES[0], *SUFFIXES[1:]):
            path = directory / f"measure-{run_id}{suffix}"
            path.write_bytes(b"")
            os.utime(path, (2e9 - age, 2e9 - age))


def test_the_oldest_logs_make_room_with_their_companions_and_no_other_file_does(tmp_path, settings):
    directory = tmp_path / "logs"
    aged(directory, zoe=10, packed=30, b=20, a=40)
    others = ["notes.jsonl", "measure-.jsonl", "measure-a.txt", "measure-c.safetensors", "xmeasure-a.jsonl", "probes"]
    for name in others:
        (directory / name).touch()
        os.utime(directory / name, (0, 0))
    (directory / "measure-folder.jsonl").mkdir()
    (directory / "measure-link.jsonl").symlink_to(directory / "notes.jsonl")
    others += ["measure-folder.jsonl", "measure-link.jsonl"]
    log = write(settings(max_files=3))
    left = {path.name for path in directory.iterdir()}
    kept = {f"measure-{run}{suffix}" for run in ("b", "zoe") for suffix in SUFFIXES}
    assert left == {*others, log.path.name, *kept}


def test_nothing_is_removed_while_a_file_is_being_written(tmp_path, settings):
    with DetailedLog(settings(max_files=2), "run") as log:
        log.write("summary", {})
        aged(tmp_path / "logs", a=1, b=2, c=3)
        log.write("summary", {})
        assert len(list(log.path.parent.glob("*.jsonl"))) == 4


def test_runs_at_once_do_not_remove_each_others_logs(settings):
    with DetailedLog(settings(max_files=1), "first") as first, DetailedLog(settings(max_files=1), "second") as second:
        for log in (first, second, first, second):
            log.write("summary", {})
        third = write(settings(max_files=1), "third")
        assert [len(read_records(log.path)) for log in (first, second, third)] == [2, 2, 2]
    last = write(settings(max_files=1), "last")
    assert list(last.path.parent.iterdir()) == [last.path]


def test_a_killed_run_keeps_its_log_no_longer_than_another(settings):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            log = DetailedLog(settings(), "killed")
            log.write("summary", {})
            os.write(writer, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"."
        killed = DetailedLog(settings(), "killed")
        write(settings(max_files=1), "beside")
        assert len(read_records(killed.path)) == 1
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
    write(settings(max_files=1), "after")
    assert not killed.path.exists()


def test_a_log_removed_while_it_was_let_go_is_begun_anew(settings):
    log = write(settings(level="minimal", max_files=1), "first")
    write(settings(level="minimal", max_files=1), "second")
    assert not log.path.exists()
    with log:
        log.write("summary", {})
    assert len(read_records(log.path)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "verbose"}, r"expected level to be one of minimal, standard, detailed, debug, got 'verbose'"),
        ({"max_files": 0}, r"max_files to be a whole number of at least 1, .* got 0 .*enabled=False"),
        ({"max_files": 2.5}, r"max_files to be a whole number of at least 1, .* got 2\.5"),
        ({"output_directory": ""}, r"expected output_directory to be a folder .* got an empty name"),
        ({"log_tokens": "no"}, r"expected log_tokens to be true, false or null .* got 'no'"),
        ({"enabled": "no"}, r"expected enabled to be true or false, got 'no'"),
    ],
)
def test_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LoggingSettings(**options)


def test_settings_are_a_section_of_a_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--log", type=LoggingSettings, default=LoggingSettings())
    text = yaml.safe_dump({"log": {"enabled": True, "level": "debug", "log_tokens": False, "max_files": 3}})
    parsed = parser.instantiate_classes(parser.parse_string(text)).log
    assert parsed == LoggingSettings(enabled=True, level="debug", log_tokens=False, max_files=3)
    assert "the texts of prompts and completions" in parser.format_help()


@pytest.mark.parametrize("run_id", ["", "../x", "a/b", ".hidden", "a b", "ä", "a\n"])
def test_a_run_id_that_cannot_name_a_file(run_id):
    with pytest.raises(ValueError, match="expected a run_id of letters, digits"):
        DetailedLog(LoggingSettings(), run_id)


def test_an_unknown_kind_of_record(settings):
    with pytest.raises(ValueError, match="one of summary, measurement, sequence, tokens, got 'token'"):
        DetailedLog(settings(), "run").write("token", {})


def test_a_record_cannot_pass_for_another_runs(settings):
    with DetailedLog(settings(), "run") as log:
        log.write("summary", {"run_id": "other", "kind": "measurement", "value": 1})
    assert read_records(log.path) == [{"schema": 2, "kind": "summary", "run_id": "run", "value": 1}]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"changes": {}}, r"expected shifted and changes at the same η, got \[0\.001, 0\.01\] and \[\]"),
        ({"clusters": torch.zeros(2)}, "expected clusters for 6 sequences, got 2"),
        ({"prompts": ["one"]}, "expected prompts for 6 sequences, got 1"),
        ({"tangent": TokenStats(*[torch.zeros(6, 4)] * 3)}, r"expected tangent of .* = \[6, 5\], got \[6, 4\]"),
    ],
)
def test_arrays_of_different_batches(others, message):
    with pytest.raises(ValueError, match=message):
        measured(**others)


def test_influences_of_another_batch():
    change = measured().first_order
    with pytest.raises(ValueError, match="expected the influences of first_order for 6 sequences, got 3"):
        measured(first_order=replace(change, influence=change.influence[:3]))


def test_summary_needs_a_config_that_json_has_a_form_for():
    with pytest.raises(TypeError, match=r"record\['model'\] to be JSON-able, got object"):
        summary_record(measured(), config={"model": object()}, seconds=0.0)
