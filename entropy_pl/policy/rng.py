"""Random numbers that leave no trace: a measurement inside a training run must not move its random streams."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Give the block its own random streams, and the code after it the streams it would have had without the block.

    Covered are Python's ``random``, NumPy's global generator, and PyTorch's default generators: CPU, Apple's MPS, and
    every CUDA device if CUDA is initialised on entry. A CUDA context first created inside the block is left alone
    (there is no earlier state to go back to): touch the device before entering if its draws must be seeded.

    Args:
        seed: seeds every covered stream on entry; None continues the streams as they are.

    Raises:
        ValueError: if the seed is negative or does not fit 64 bits.
    """
    if seed is not None and not 0 <= seed < 2**64:
        raise ValueError(f"expected a seed from 0 to 2**64 - 1, or None to continue the present streams, got {seed}")
    restore = _snapshot()
    try:
        if seed is not None:
            _seed_everything(seed)
        yield
    finally:
        restore()


def derived_seed(seed: int, purpose: str) -> int:
    """A seed of its own for every purpose, 63 bits: ``derived_seed(0, "completions of step 5")``.

    Args:
        seed: of the run.
        purpose: any text; another one gives an unrelated seed.

    Returns:
        A number from 0 to 2⁶³ − 1, the same on every machine.
    """
    return random.Random(f"{seed}, {purpose}").getrandbits(63)


def _snapshot() -> Callable[[], None]:
    """Remember every covered stream; the function returned puts all of them back, bit for bit."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    cpu_state = torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if _cuda_in_use() else None
    mps_state = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore() -> None:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)
        if mps_state is not None:
            torch.mps.set_rng_state(mps_state)

    return restore


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    # Not torch.manual_seed: before CUDA is initialised it queues the seed for later, and so would outlive the block.
    torch.default_generator.manual_seed(seed)
    if _cuda_in_use():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)


def _cuda_in_use() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
