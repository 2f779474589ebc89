"""Inner products of single sequences' gradients, in blocks that bound memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_BYTES = 2**30  # for the gradients of one block
Gradients = Callable[[int, int], Iterator[Tensor]]
"""From first row and past-the-last row to their gradients, ``[d]`` each."""


@dataclass(frozen=True)
class KernelCost:
    """What a kernel of [n_a, n_b] takes.

    Args:
        passes: forward and backward passes of one sequence each.
        blocks: of b; those of a are taken anew for every one of them.
        bytes: of the gradients held at a time.
    """

    passes: int
    blocks: int
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.passes} forward and backward passes of one sequence each ({self.blocks} "
            f"block{'s' if self.blocks > 1 else ''}), {self.bytes / 2**20:.0f} MiB of gradients"
        )


def kernel_cost(
    rows_a: int, rows_b: int, dimension: int, *, same: bool = False, itemsize: int = 4, max_bytes: int = DEFAULT_BYTES
) -> KernelCost:
    """The cost of :func:`gradient_kernel`, known beforehand.

    Args:
        rows_a: n_a.
        rows_b: n_b.
        dimension: d, trainable parameters.
        same: whether a and b are the same sequences with the same coefficients.
        itemsize: bytes of a number.
        max_bytes: for the gradients of one block of b.

    Raises:
        ValueError: if not even one gradient fits.
    """
    size = dimension * itemsize
    block = max_bytes // max(size, 1)
    if block < 1:
        raise ValueError(
            f"expected max_bytes of at least {size}, one gradient of {dimension} parameters, got {max_bytes}"
        )
    blocks = -(-rows_b // block)
    once = same and blocks == 1
    return KernelCost(rows_b + (0 if once else blocks * rows_a), blocks, (min(block, rows_b) + 1) * size)


def gradient_kernel(
    a: Gradients,
    rows_a: int,
    b: Gradients,
    rows_b: int,
    *,
    metric: Tensor | None = None,
    beside: Sequence[Tensor] = (),
    same: bool = False,
    max_bytes: int = DEFAULT_BYTES,
) -> tuple[Tensor, Tensor]:
    """⟨g_i, P g_u⟩ of every sequence i of a with every sequence u of b.

    Args:
        a: gradients of a.
        rows_a: n_a.
        b: gradients of b.
        rows_b: n_b.
        metric: P, ``[d]``; None is 1.
        beside: other vectors ``[d]`` to be multiplied with every P g_u.
        same: whether a and b are the same gradients; they are then made once, where they fit.
        max_bytes: for the gradients of one block of b.

    Returns:
        ``[n_a, n_b]`` and ``[len(beside), n_b]``, float64, on the CPU.
    """
    kernel = torch.zeros(rows_a, rows_b, dtype=torch.float64)
    others = torch.zeros(len(beside), rows_b, dtype=torch.float64)
    start = 0
    while start < rows_b:
        first = next(b(start, start + 1))
        block = max(1, max_bytes // first.nbytes)
        end = min(start + block, rows_b)
        held = first.new_empty(end - start, len(first))
        held[0] = first
        for row, gradient in enumerate(b(start + 1, end), start=1):
            held[row] = gradient
        once = same and end - start == rows_b
        plain = held.clone() if once and metric is not None else held
        if metric is not None:
            held *= metric.to(held)
        for row, gradient in enumerate(plain if once else a(0, rows_a)):
            kernel[row, start:end] = (held @ gradient).double().cpu()
        for row, vector in enumerate(beside):
            others[row, start:end] = (held @ vector.to(held)).double().cpu()
        start = end
    return kernel, others
