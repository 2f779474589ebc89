"""How libraries say that memory ran out: seldom by an error of its own kind."""

from __future__ import annotations

import torch

# the CPU's allocator, CUDA's, its libraries', another process's word for its own
NO_MEMORY = ("can't allocate memory", "out of memory", "alloc_failed", "memoryerror")


def wants_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, the CPU's or a GPU's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in NO_MEMORY)
    )
