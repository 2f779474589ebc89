"""Who sees a progress bar: a person at a terminal, and nobody else."""

from __future__ import annotations

import io
import re
import sys

import pytest
from commands import short_fit
from terminals import RUNS_THE_COMMAND, at_a_terminal, in_a_pipe
from tqdm import tqdm

from entropy_pl import progress as module
from entropy_pl.policy.sample import sample_completions
from entropy_pl.progress import is_watched, part, parts_shown, progress

TIME_LEFT = r"\[\d\d:\d\d<(\d\d:\d\d|\?), "  # elapsed<remaining, as tqdm writes them


class Terminal(io.StringIO):
    """A stream that says it is one."""

    def isatty(self) -> bool:
        return True


def seat_at_terminal(monkeypatch) -> Terminal:
    """Not a fixture: pytest puts its own stderr in place again between a test's setup and the test."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return stream


@pytest.mark.parametrize(
    ("variables", "watched"),
    [
        ({}, True),
        ({"CI": "true"}, False),
        ({"CI": "1"}, False),
        ({"CI": "false"}, True),
        ({"CI": ""}, True),
        ({"LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "1"}, False),
    ],
    ids=lambda value: str(value),
)
def test_a_terminal_is_watched_but_in_ci_and_in_other_processes(monkeypatch, variables, watched):
    seat_at_terminal(monkeypatch)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_watched() is watched


def test_a_stream_that_is_no_terminal_is_not_watched(monkeypatch):
    seat_at_terminal(monkeypatch)
    assert not is_watched(io.StringIO())
    closed = Terminal()
    closed.isatty = lambda: (_ for _ in ()).throw(ValueError("I/O operation on closed file"))
    assert not is_watched(closed)
    monkeypatch.setattr(sys, "stderr", None)  # a program without a console on Windows
    assert not is_watched()


def test_a_bar_has_the_time_left_and_goes_when_it_is_done(monkeypatch):
    terminal = seat_at_terminal(monkeypatch)
    with progress("counting", 4, "sheep") as bar:
        bar.update(2)
        bar.refresh()
    shown = terminal.getvalue()
    assert re.search(rf"counting:  50%.*2/4 {TIME_LEFT}", shown)
    assert shown.split("\r")[-2].strip() == ""  # the line is wiped


@pytest.mark.parametrize("patience", [0.0, 1000.0])
def test_a_part_has_a_bar_once_it_takes_long(monkeypatch, patience):
    terminal = seat_at_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", patience)
    with progress("whole", 2, "pass"), part("sampling", 10, "token") as bar:
        bar.update(5)
        bar.refresh() if patience == 0 else None
    assert ("sampling:" in terminal.getvalue()) == (patience == 0)
    assert "whole:" in terminal.getvalue()


def test_parts_are_shown_in_shown_steps_alone(monkeypatch):
    terminal = seat_at_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.0)

    def disabled() -> bool:
        with part("sampling", 1, "token") as bar:
            return bar.disable

    assert disabled()  # a library call by itself
    with parts_shown(True):
        assert not disabled()
        with progress("probe", 1, "pass", shown=False):
            assert disabled()
        assert not disabled()
    assert disabled()
    assert "sampling" in terminal.getvalue()
    assert "probe" not in terminal.getvalue()


def test_sampling_counts_every_position_once(monkeypatch, tiny_model, tiny_tokenizer):
    """Five prompts three at a time are two batches of six positions, whenever their completions end."""
    seat_at_terminal(monkeypatch)
    counted: list[tuple[int, int]] = []
    close = tqdm.close

    def count(bar: tqdm) -> None:
        if bar.desc == "sampling":
            counted.append((bar.n, bar.total))
        close(bar)

    monkeypatch.setattr(tqdm, "close", count)
    with parts_shown(True):
        sample_completions(tiny_model, tiny_tokenizer, ["12", "3", "4", "5", "678"], max_new_tokens=6, batch_size=3)
    assert counted[0] == (12, 12)


@pytest.fixture(scope="module")
def run(tiny_policy_dir, tmp_path_factory) -> list[str]:
    """Two probed steps of a tiny policy, from the command line."""
    return [*RUNS_THE_COMMAND, *short_fit(tiny_policy_dir, tmp_path_factory.mktemp("runs"))]


def test_training_at_a_terminal_shows_both_bars_with_the_time_left(run):
    shown, status = at_a_terminal(run)
    assert status == 0
    assert re.search(rf"Epoch 0:.* 1/2 {TIME_LEFT}", shown)
    assert re.search(rf"entropy probe, step 0: .*/20 {TIME_LEFT}", shown)
    for line in re.split(r"[\r\n]+", shown):  # no bar inside another's line
        assert len(re.findall(r"\d+%\|", line)) <= 1, line


@pytest.mark.slow
@pytest.mark.parametrize("ci", [False, True], ids=["pipe", "terminal of CI"])
def test_training_is_quiet_where_nobody_looks(run, ci):
    """In a process of its own; `test_cli` sees that it is quiet in this one."""
    shown, status = at_a_terminal(run, CI="true") if ci else in_a_pipe(run)
    assert status == 0
    text = shown.replace("\r\n", "\n")  # a terminal's line ends
    assert "\r" not in text
    assert not re.search(r"\d+%\||it/s|pass/s", text)
    before_the_summary = text.partition("Entropy change per optimizer step")[0]
    assert len(before_the_summary.splitlines()) <= 8
    assert "/config.yaml" in text  # said at the end, with the checkpoint
    assert ".ckpt" in text
