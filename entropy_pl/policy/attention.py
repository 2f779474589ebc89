"""Attention that forward-mode differentiation can go through, in memory linear in the length of the sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

QUERIES = 256
"""Queries of one block: its scores take ``QUERIES * L`` numbers a head, where PyTorch's unfused attention takes L²."""


class BlockwiseAttention(TorchFunctionMode):
    """Within the block every ``scaled_dot_product_attention`` is computed by :func:`blockwise_attention`.

    PyTorch's fused kernels have no forward-mode derivative.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            func = blockwise_attention
        return func(*args, **(kwargs or {}))


def blockwise_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(q kᵀ · scale + mask) v, a block of queries at a time; under a causal mask no key after the block is read.

    Args:
        query: ``[..., heads, L, d]``.
        key: ``[..., heads or fewer, S, d]``.
        value: as ``key``.
        attn_mask: ``[..., L, S]``: True where a query reads a key, or numbers to add. A query that reads nothing gets
            the mean of all values.
        dropout_p: must be 0: evaluation has no dropout.
        is_causal: query i reads keys 0 … i.
        scale: 1/√d if None.
        enable_gqa: whether consecutive query heads share a head of keys and values.

    Returns:
        ``[..., heads, L, d]``.

    Raises:
        ValueError: for dropout.
    """
    if dropout_p:
        raise ValueError(f"expected attention without dropout, got dropout_p={dropout_p:g}: put the model in eval mode")
    if enable_gqa:
        shared = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(shared, -3), value.repeat_interleave(shared, -3)
    queries, keys = query.shape[-2], key.shape[-2]
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)
    blocks = []
    for start in range(0, queries, QUERIES):
        rows = slice(start, min(start + QUERIES, queries))
        columns = slice(0, min(rows.stop, keys) if is_causal else keys)
        scores = query[..., rows, :] @ key[..., columns, :].transpose(-1, -2)
        lowest = torch.finfo(scores.dtype).min
        if is_causal:
            position = torch.arange(rows.stop, device=query.device)
            scores = scores.masked_fill(position[columns] > position[rows, None], lowest)
        if attn_mask is not None:
            # One row, or one column, may stand for all.
            mask = attn_mask.expand(*attn_mask.shape[:-2], queries, keys)[..., rows, columns]
            scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
        blocks.append(scores.softmax(-1) @ value[..., columns, :])
    return torch.cat(blocks, -2)
