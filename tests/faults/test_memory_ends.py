"""Out of memory in the midst of a probe: that probe has failed, and says what to do; nothing else has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from other_process import stop_within_probe
from six_steps import Steps, assert_same, records, run


def cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def of_torch() -> Any:
    return torch.empty(2**60, dtype=torch.uint8)


def of_python() -> Any:
    return bytearray(2**60)


@pytest.mark.parametrize(
    ("allocate", "error"),
    [(cuda, "OutOfMemoryError"), (of_torch, "RuntimeError"), (of_python, "MemoryError")],
    ids=["cuda", "torch", "python"],
)
@pytest.mark.parametrize("after", [None, "sampling", "tangents"], ids=["sampling", "tangents", "sweep"])
def test_the_probe_fails_and_nothing_else(
    tmp_path, monkeypatch, uninterrupted, allocate: Callable[[], Any], error: str, after: str | None
):
    stop_within_probe(monkeypatch, 2, after, allocate)
    steps = Steps()
    with pytest.warns(UserWarning, match=rf"entropy probe at step 2 failed, training goes on\. {error}"):
        run(tmp_path, steps)
    before, failed, next_one = records(tmp_path)
    assert failed["status"] == "failed"
    assert failed["message"].startswith(f"{error}: ")
    assert failed["message"].endswith(
        "lower max_batch_tokens (of every pass), sample_batch_size (of the sampling) or num_sequences (of everything) "
        "of the probe"
    )
    assert [before, next_one] == [uninterrupted.records[0], uninterrupted.records[2]]
    for state, expected in zip(steps.states, uninterrupted.states, strict=True):
        assert_same(state, expected, streams=True)
