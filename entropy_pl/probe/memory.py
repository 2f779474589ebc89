"""How much memory a block takes beyond what was in use before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import torch

from entropy_pl.policy.memory import wants_memory

INTERVAL = 0.005  # seconds between two looks
LESS_MEMORY = (
    "lower max_batch_tokens (of every pass), sample_batch_size (of the sampling) or num_sequences (of everything) of "
    "the probe"
)


@dataclass
class PeakMemory:
    """What was found; ``added`` is known when the block is over.

    Args:
        kind: ``cuda``, tensors as PyTorch's allocator counts them, or ``resident``, the process's resident set.
        added: peak within the block, less what was in use when it began, in bytes.
    """

    kind: str
    added: int = 0


def what_happened(error: Exception) -> str:
    """An error as a record or a warning says it; of a want of memory also what to do.

    Args:
        error: the one that was caught.

    Returns:
        One line: its type, what it says, and where memory was wanting what would take less of it.
    """
    said = f"{type(error).__name__}: {error}"
    return f"{said}: {LESS_MEMORY}" if wants_memory(error) else said


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watch a block's memory on a device.

    PyTorch's own peak counter is read and not reset, so that whoever watches the run by it sees the run: where the
    block raises that counter its new value is exact, elsewhere the peak is the highest of looks taken every 5 ms.

    Args:
        device: of the model; on a CPU the whole process is watched.

    Yields:
        What was taken; its numbers are there when the block has ended.
    """
    peak, in_use, highest = _counters(device)
    start, before = in_use(), highest()
    seen = [start]
    over = threading.Event()

    def look() -> None:
        while not over.wait(INTERVAL):
            seen[0] = max(seen[0], in_use())

    watcher = threading.Thread(target=look, name="entropy-probe-memory", daemon=True)
    with suppress(RuntimeError):  # no room for a thread: there are looks at both ends all the same
        watcher.start()
    try:
        yield peak
    finally:
        over.set()
        if watcher.ident is not None:
            watcher.join()
        after = highest()
        peak.added = max(seen[0], in_use(), after if after > before else 0) - start


def _counters(device: torch.device) -> tuple[PeakMemory, Callable[[], int], Callable[[], int]]:
    """An empty result, what is in use now, and the highest that ever was (0 where nobody keeps it), in bytes."""
    if device.type == "cuda":
        return (
            PeakMemory("cuda"),
            lambda: torch.cuda.memory_allocated(device),
            lambda: torch.cuda.max_memory_allocated(device),
        )
    process = psutil.Process()
    return PeakMemory("resident"), lambda: int(process.memory_info().rss), lambda: 0
