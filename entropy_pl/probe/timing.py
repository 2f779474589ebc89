"""Wall time by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def timed(seconds: dict[str, float], phase: str, model: nn.Module | None = None) -> Iterator[None]:
    """Bill the block's wall time to a phase, the work queued on the model's GPU included.

    Args:
        seconds: by phase; the block's time is added in place.
        phase: its name.
        model: whose GPU, if it has one, is waited for.
    """

    def now() -> float:
        if model is not None and next(model.parameters()).is_cuda:
            torch.cuda.synchronize()  # kernels are queued: without this the next phase would be billed
        return time.perf_counter()

    start = now()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + now() - start
