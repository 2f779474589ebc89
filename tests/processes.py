"""Several processes for a test, with a deadline, so that a deadlock is a failure and not a wait."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEADLINE = 120.0  # seconds: nothing here takes ten
CONTEXT = multiprocessing.get_context("forkserver")
# A process that is forked from one that has imported these begins its work in a second instead of ten.
CONTEXT.set_forkserver_preload(["torch", "transformers.models.qwen2.modeling_qwen2", "peft", "lightning", "entropy_pl"])


def run_processes(work: Callable[..., Any], size: int, folder: Path, *args: Any) -> list[Any]:
    """What ``work(rank, *args)`` returns in each of ``size`` processes of one gloo group.

    ``work`` is a module's function. A process that raises, or is not done by the deadline, fails the test.
    """
    store = folder / f"{work.__name__}-store"
    processes = [CONTEXT.Process(target=_enter, args=(work, rank, size, store, args)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + DEADLINE
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck, f"{len(stuck)} of {size} processes hung"
    results = [pickle.loads(Path(f"{store}.{rank}").read_bytes()) for rank in range(size)]
    for result in results:
        if isinstance(result, _Raised):
            raise AssertionError(result.trace)
    return results


class _Raised:
    def __init__(self, trace: str) -> None:
        self.trace = trace


def _enter(work: Callable[..., Any], rank: int, size: int, store: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = work(rank, *args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = _Raised(traceback.format_exc())
    Path(f"{store}.{rank}").write_bytes(pickle.dumps(result))
