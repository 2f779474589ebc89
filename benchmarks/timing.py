"""Wall times of alternatives, taken in turns.

Not pytest-benchmark: it times one alternative after the other, so that whatever else the machine does in the meantime
falls on one of them. Here a round runs every alternative once, and ratios are formed within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from entropy_pl.progress import parts_shown, progress


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one time over another of the same round, with the smallest and the largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True)
class Timings:
    """Seconds of every alternative, by round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Ratio:
        """Of two alternatives, round by round."""
        return ratio_of([a / b for a, b in zip(self.seconds[name], self.seconds[reference], strict=True)])


def ratio_of(ratios: list[float]) -> Ratio:
    """Median and range."""
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def interleaved(alternatives: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> Timings:
    """Run all alternatives in turns, ``rounds`` times; a round before those is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    with progress("taking turns", (rounds + 1) * len(alternatives), "run") as bar, parts_shown(False):
        for number in range(rounds + 1):
            with _no_collection():
                for name, work in alternatives.items():
                    took = timed_once(work, device)
                    if number:
                        seconds[name].append(took)
                    bar.set_postfix_str(name, refresh=False)
                    bar.update()
    return Timings(seconds)


def timed_once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the kernels it queued included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before the block rather than somewhere inside: looking through all objects takes a while."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait for a GPU's queue."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
