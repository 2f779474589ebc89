"""Memory that a block takes: what it holds on to, and what it has let go of by its end."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from entropy_pl.probe.memory import LESS_MEMORY, peak_memory, what_happened

MIB = 2**20


def test_what_a_block_took_and_freed_is_its_peak():
    """64 MiB touched and freed inside the block, within what an allocator and the interpreter add."""
    with peak_memory(torch.device("cpu")) as memory:
        block = torch.ones(64 * MIB, dtype=torch.uint8)
        time.sleep(0.05)  # ten looks
        del block
    assert memory.kind == "resident"
    assert 60 * MIB < memory.added < 80 * MIB


def test_a_block_that_takes_nothing_adds_nothing():
    with peak_memory(torch.device("cpu")) as memory:
        time.sleep(0.02)
    assert 0 <= memory.added < 4 * MIB


def test_an_error_leaves_no_thread_behind():
    before = threading.active_count()
    with pytest.raises(KeyError), peak_memory(torch.device("cpu")):
        raise KeyError
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("error", "wanting"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory of this"), False),
    ],
)
def test_a_want_of_memory_is_answered(error, wanting):
    said = what_happened(error)
    assert said.startswith(f"{type(error).__name__}: {error}")
    assert said.endswith(LESS_MEMORY) == wanting
