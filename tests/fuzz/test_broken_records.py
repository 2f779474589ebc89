"""Files of records: what is no record is left out by name, and everything that shows records can show the rest."""

from __future__ import annotations

import contextlib
import gzip
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cases import check
from mutate import Mutator
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.records import Record, current
from entropy_pl.reporting import (
    SCHEMA,
    RecordWriter,
    add_step_agreement,
    attribution_table,
    calibration_figure,
    components_figure,
    delta_entropy_figure,
    ess_figure,
    eta_sweep_figure,
    exchange_rate_figure,
    latest_per_step,
    probe_table,
    read_records,
    read_run,
    run_page,
    scalars,
    step_evidence,
    step_size_figure,
    sweep_table,
    training_figure,
)

OF_A_RUN = [
    *(calibration_figure, components_figure, delta_entropy_figure, ess_figure, exchange_rate_figure),
    *(step_size_figure, training_figure),
]


def estimate(value: float) -> dict[str, Any]:
    ends = {"ci_low": value - 0.2, "ci_high": value + 0.2}
    return {"value": value, "stderr": 0.1, **ends, "ess": 60.0, "ess_min": 60.0, "n_sequences": 64, "trustworthy": True}


def record(step: int, kind: str = "probe", schema: int = SCHEMA) -> dict[str, Any]:
    """With everything that a record can have."""
    part = {"value": 1.0, "stderr": 0.1, "stderr_u": 0.2, "ci_low": 0.8, "ci_high": 1.2}
    signs = dict.fromkeys(("positive_advantage", "negative_advantage"), 1.0 if schema == 1 else part)
    names = ("momentum", "weight_decay", "gradient", "tokens", "first_order", "remainder_sum")
    sweep = [
        {"eta": eta, "taken": eta == 1e-4}
        | {key: estimate(-eta) for key in ("true", "first_order", "reward_true", "reward_first_order")}
        for eta in (5e-5, 1e-4, 2e-4)
    ]
    return {
        **{"schema": schema, "kind": kind, "status": "ok", "message": None, "step": step, "lr": 1e-4, "reward": 0.25},
        **{"entropy": estimate(0.9), "first_order": estimate(-12.0), "second_order": estimate(3e4), "sweep": sweep},
        **{"eta_star": 8e-4, "update_norm": 3.2, "normalize": "per_token", "confidence": 0.95},
        "e_prompts": {"count": 64},
        **{"expected_reward": estimate(0.3), "exchange_rate": estimate(2.0) | {"bounded": True}, "overhead": 0.1},
        "attribution": {
            **dict.fromkeys(names, part),
            **{"remainder": {"clip": 0.1}, "total": 3.0, "by_sign": signs},
            "over_u": {"prompts": 4, "absent": "too few"},
        },
        "predictors": {"covariance": {"pearson": 0.5, "step": -3.0, "step_pearson": 0.4}},
        "counterfactuals": {"entropy_bonus": {"true": estimate(0.1), "difference": estimate(0.2), "reward_true": None}},
        **{
            "power_law": {"slope": 1.0, "r_squared": 1.0},
            "absent": {"reward": "none given"},
            "untrustworthy_from": None,
        },
    }


GOOD = [
    record(0),
    {"schema": SCHEMA, "kind": "probe", "status": "failed", "message": "got NaN", "step": 5, "lr": 1e-4},
    record(10, schema=1),
]
READ = [current(item) for item in GOOD]


@pytest.fixture
def console(tmp_path) -> Console:
    return Console(file=open(tmp_path / "shown.txt", "w", encoding="utf-8"), width=100)


def write_broken(mutator: Mutator, file: Path) -> list[int]:
    """A file with something wrong in some lines; their numbers, from 1 on, where it still has three lines of text."""
    lines = [json.dumps(item).encode() for item in GOOD]
    broken = sorted({mutator.random.randrange(3) for _ in range(mutator.random.choice([1, 1, 2]))})
    whole = mutator.random.random() < 0.2
    for at in broken:
        if mutator.random.random() < 0.2:
            lines[at] = mutator.bytes(lines[at])
        elif mutator.random.random() < 0.05:
            lines[at] = lines[at][:-1] + b', "deep": ' + b"[" * 20_000 + b"]" * 20_000 + b"}"
        else:
            lines[at] = json.dumps(mutator.broken(GOOD[at])[0]).encode()
    ends = b"\n" if file.suffix != ".gz" else b""
    parts = [line + b"\n" for line in lines]
    data = b"".join(gzip.compress(part, mtime=0) for part in parts) if not ends else b"".join(parts)
    file.write_bytes(mutator.bytes(data) if whole else data)
    one_a_line = not whole and all(line.strip() and b"\n" not in line for line in lines)
    return [at + 1 for at in broken] if one_a_line else []


@pytest.mark.parametrize("name", ["records.jsonl", "records.jsonl.gz"])
def test_lines_are_kept_or_named(name, tmp_path, console):
    file = tmp_path / name

    def show(whole: list[int], number: int) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            records = read_records(file)
        said = [str(warning.message) for warning in caught]
        assert all(str(file) in words for words in said)
        if whole:  # the other lines are as they were
            untouched = [READ[at - 1] for at in (1, 2, 3) if at not in whole]
            assert [item for item in records if item in untouched] == untouched
            assert len(records) + len(said) == 3
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            show_everything(records, number, console)

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        whole = write_broken(mutator, file)
        return lambda: show(whole, mutator.random.randrange(1000)), ["step"]

    check(name, case)


def show_everything(records: list[dict[str, Any]], number: int, console: Console) -> None:
    """All tables and scalars, and in one case of twenty a figure."""
    kept = latest_per_step([item for item in records if isinstance(item.get("step"), int)])
    console.print(probe_table(kept))
    for item in kept:
        console.print(sweep_table(item))
        console.print(attribution_table(item))
        scalars(item)
        step_evidence(item)
    add_step_agreement(record(20), kept)
    if number % 20:
        return
    draw = OF_A_RUN[number % len(OF_A_RUN)]
    for figure in [draw(kept)] if number % 3 else [eta_sweep_figure(item) for item in kept]:
        figure.canvas.draw()


@pytest.mark.slow
def test_a_page_and_an_event_file(tmp_path):
    file = tmp_path / "run" / "entropy_probe" / "records.jsonl"
    file.parent.mkdir(parents=True)
    page, writer = tmp_path / "page.html", SummaryWriter(tmp_path / "events")

    def show() -> None:
        run = read_run(tmp_path / "run")
        page.write_text(run_page(run), encoding="utf-8")
        for item in run.records:
            for tag, value in scalars(item).items():
                writer.add_scalar(tag, value, item.step)

    def case(mutator: Mutator) -> tuple[Callable[[], object], list[str]]:
        write_broken(mutator, file)
        return show, ["nothing is refused"]

    check("page", case, ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('"deep": ' + "[" * 20_000 + "]" * 20_000, "nested too deeply"),
        ('"sweep": 5', "expected 'sweep' to be a list, got int"),
        ('"sweep": [{"eta": 1, "true": 3}]', r"expected 'sweep\[0\].true' to be an object, got int"),
        ('"sweep": [null]', r"expected 'sweep\[0\]' to be an object, got NoneType"),
        ('"attribution": {"momentum": []}', "expected 'attribution.momentum' to be an object, got list"),
        ('"predictors": {"covariance": "x"}', "expected 'predictors.covariance' to be an object, got str"),
        ('"counterfactuals": {"x": {"true": 1}}', "expected 'counterfactuals.x.true' to be an object, got int"),
        ('"normalize": {}', "expected 'normalize' to be text, got dict"),
        ('"confidence": "x"', "expected 'confidence' to be a number, got str"),
        ('"step": 9007199254740993', "expected 'step' to be a whole number below 9007199254740992"),
        ('"step": 1.5', "expected 'step' to be a whole number"),
    ],
    ids=lambda value: None if len(value) > 60 else value,
)
def test_what_is_no_record_is_left_out_with_its_reason(text, reason, tmp_path):
    """Found by the cases: each ended a table, a figure or a resumed run in a TypeError, AttributeError or worse."""
    file = tmp_path / "records.jsonl"
    file.write_text(f'{json.dumps(GOOD[0])}\n{{"step": 7, {text}}}\n{json.dumps(GOOD[2])}\n')
    with pytest.warns(UserWarning, match=rf"records\.jsonl, line 2 is not a record and was left out: .*{reason}"):
        assert read_records(file) == [READ[0], READ[2]]


def test_numbers_that_no_float_can_be_are_absent(console):
    """They were an OverflowError in every table."""
    broken = record(0) | {"eta_star": 10**400, "entropy": estimate(0.9) | {"value": 10**400}}
    assert "entropy_probe/entropy" not in scalars(broken)
    assert "entropy_probe/delta_h_true" in scalars(broken)
    console.print(probe_table([broken]))


def test_half_a_character_is_shown_as_none(tmp_path, console):
    """It is valid JSON, and was a UnicodeEncodeError wherever it was written or printed; a whole one stays."""
    file = tmp_path / "records.jsonl"
    file.write_text(json.dumps(GOOD[1] | {"message": "\ud800 \U0001f600"}))
    assert [item["message"] for item in read_records(file)] == ["\ufffd \U0001f600"]
    console.print(probe_table(read_records(file)))


def test_a_predictor_without_numbers(console):
    assert step_evidence(record(0) | {"predictors": {"steer": None}}).predictors["steer"].step is None


def test_what_a_writer_writes_is_a_record(tmp_path):
    """The shapes that are refused are no record's own."""
    for item in (*GOOD, record(20, "measurement")):
        RecordWriter(tmp_path / "records.jsonl").write(item)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_records(tmp_path / "records.jsonl") == [*READ, record(20, "measurement")]


def test_what_is_read_as_a_record_is_written_back_as_it_was():
    written = 0
    for case in range(1000):
        broken, _ = Mutator(f"record {case}").broken(GOOD[0])
        if not isinstance(broken, dict):
            continue
        with contextlib.suppress(ValueError):
            assert repr(Record.from_json(broken).to_json()) == repr(broken)
            written += 1
    assert written > 300
