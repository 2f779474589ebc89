"""What is read of a run's folder, and what is said where it is none."""

import json
import shutil

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.reporting import RecordWriter, read_run


@pytest.fixture
def run(tmp_path, make):
    """A folder with three probes."""
    folder = tmp_path / "runs/version_0"
    writer = RecordWriter(folder / "entropy_probe/records.jsonl")
    for step in (0, 5, 10):
        writer.write(make(step))
    return folder


@pytest.mark.parametrize("given", [".", "..", "../..", "entropy_probe", "entropy_probe/records.jsonl"])
def test_a_run_is_found_from_its_folder_and_its_neighbours(run, given):
    found = read_run(run / given)
    assert [record.step for record in found.records] == [0, 5, 10]
    assert found.path.resolve() == run
    assert found.probe.resolve() == run / "entropy_probe"


def test_records_in_a_folder_of_another_name(run):
    shutil.move(run / "entropy_probe", run / "elsewhere")
    assert len(read_run(run / "elsewhere").records) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere", "expected a run's folder with entropy_probe/records.jsonl, got .*nowhere: there is no such folder"),
        ("other", "expected a run's folder with .*other, which holds notes.txt: give the folder of a run"),
        ("empty", "which holds nothing: give"),
        ("other/notes.txt", "which is a file: give the folder it lies in"),
        ("many", "expected the folder of one run, got .*many, which holds 2: give one of .*a, .*b$"),
        ("foreign", "expected .*results.json to hold the results of a measurement, got something else"),
        ("broken", "expected .*results.json to hold the results of a measurement, got no JSON"),
        ("deep", "expected .*results.json to hold the results of a measurement, got no JSON"),
        ("odd", "expected .*results.json to hold the results of a measurement: expected 'step' to be a whole number"),
    ],
)
def test_other_folders_are_refused(tmp_path, given, message):
    runs = ("many/a/entropy_probe", "many/b/entropy_probe")
    for folder in ("other", "empty", *runs, "foreign", "broken", "deep", "odd"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "other/notes.txt").write_text("")
    for name in "ab":
        (tmp_path / f"many/{name}/entropy_probe/records.jsonl").write_text("")
    (tmp_path / "foreign/results.json").write_text('{"results": []}')
    (tmp_path / "broken/results.json").write_text("{")
    (tmp_path / "deep/results.json").write_text("[" * 100_000)
    (tmp_path / "odd/results.json").write_text('{"kind": "measurement", "step": [1]}')
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path / given)


def test_what_is_damaged_is_named_and_the_rest_is_there(run, make):
    file = run / "entropy_probe/records.jsonl"
    with open(file, "ab") as lines:
        lines.write(b'{"step": 15, "sta\n\xff\xfe\n[1]\n{"kind": "probe", "step": "fifteen"}\n')
        lines.write(b'{"kind": "probe"}\n{"kind": "note"}\n')
        lines.write(json.dumps(make(20)).encode() + b"\n")
    (run / "config.yaml").write_text("model: !!python/object:os.system {}\n")
    (run / "events.out.tfevents.1.host").write_bytes(b"no event")
    (run / "metrics.csv").write_text("step,train/reward\n0,high\n")
    found = read_run(run)
    assert [record.step for record in found.records] == [0, 5, 10, 20]
    text = "\n".join(found.damaged)
    for number in (4, 5, 6, 7):
        assert f"records.jsonl, line {number} is not a record" in text
    assert "records without a whole number as their step were left out: 1" in text
    assert "config.yaml is no plain YAML" in text
    assert "metrics.csv could not be read: ValueError" in text
    assert found.config == {}
    assert "os.system" in found.config_text


def test_a_value_that_is_not_of_its_tag(run):
    (run / "config.yaml").write_text("seed: !!bool maybe\n")  # a KeyError of PyYAML's
    found = read_run(run)
    assert found.damaged == [f"{run / 'config.yaml'} is no plain YAML, and is shown as it is: KeyError"]


def test_config_is_read_but_not_executed(run):
    (run / "config.yaml").write_text("# lightning.pytorch==2.6\nmodel:\n  policy:\n    name: small\n")
    found = read_run(run)
    assert found.config == {"model": {"policy": {"name": "small"}}}
    assert not found.damaged


def test_curves_of_event_files_are_those_of_the_run_as_it_finally_went(run):
    """A resumed run writes a file of its own, from an earlier step on."""
    for start, values in ((0, [0.1, 0.2, 0.3, 0.4]), (2, [0.7, 0.8])):
        with SummaryWriter(str(run), filename_suffix=f".{start}") as writer:
            for step, value in enumerate(values, start=start):
                for tag in ("train/reward", "train/entropy", "entropy_probe/entropy", "train/reward_format"):
                    writer.add_scalar(tag, -value if tag.startswith("entropy_probe") else value, step)
    curves = read_run(run).curves
    assert set(curves) == {"reward", "entropy"}
    steps, values = curves["entropy"]
    assert steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(values, [0.1, 0.2, 0.7, 0.8], rtol=1e-6)  # events are of single precision


def test_curves_of_a_trainers_event_files_lie_deeper(run):
    """As Hugging Face's Trainer leaves them, which also evaluates: that is no training batch's reward."""
    with SummaryWriter(str(run / "runs/today")) as writer:
        for tag, value in (("train/reward", 0.5), ("eval/reward", 0.25), ("eval/entropy", 2.0)):
            writer.add_scalar(tag, value, 1)
    curves = read_run(run).curves
    assert set(curves) == {"reward"}
    assert [column.tolist() for column in curves["reward"]] == [[1], [0.5]]


def test_curves_of_csv(run):
    (run / "metrics.csv").write_text("entropy_probe/entropy,step,train/reward\n0.9,0,\n,0,0.25\n,1,0.5\n,2,nan\n")
    curves = read_run(run).curves
    assert set(curves) == {"reward"}
    assert [column.tolist() for column in curves["reward"]] == [[0, 1], [0.25, 0.5]]


def test_tokens_are_found_by_their_step(run, tokens):
    folder = run / "entropy_probe/attribution"
    tokens(step=5).save(folder / "step_000005.npz")
    for name in ("step_000005.html", "step_000010.html", "step_x.html", "index.html"):
        (folder / name).write_text("")
    found = read_run(run)
    assert found.token_files == {5: folder / "step_000005.npz"}
    assert list(found.token_pages) == [5, 10]


@pytest.mark.parametrize("step", [None, 40])
def test_a_measurement_is_read_from_its_results(tmp_path, make, step):
    (tmp_path / "results.json").write_text(json.dumps(make(step or 0, kind="measurement") | {"step": step}))
    (tmp_path / "attribution.html").write_text("")
    found = read_run(tmp_path)
    assert found.is_measurement
    assert len(found.records) == 1
    assert found.token_pages == {step: tmp_path / "attribution.html"}
