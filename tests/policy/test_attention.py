"""Attention in blocks against PyTorch's own, and its derivative against a difference."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from entropy_pl.policy import attention
from entropy_pl.policy.attention import BlockwiseAttention, blockwise_attention

LENGTH = 11  # three blocks of four queries, the last one short


@pytest.fixture(autouse=True)
def four_queries_a_block(monkeypatch):
    monkeypatch.setattr(attention, "QUERIES", 4)


def tensors(seed: int = 0, kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, LENGTH, 6), (2, kv_heads, LENGTH, 6), (2, kv_heads, LENGTH, 6)]
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def window() -> torch.Tensor:
    """Query i reads itself and the two keys before it."""
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return (distance >= 0) & (distance < 3)


MASKS = {
    "all": {},
    "causal": {"is_causal": True},
    "window": {"attn_mask": window()},
    "a window for each row": {"attn_mask": torch.stack([window(), window().tril()])[:, None]},
    "numbers": {"attn_mask": torch.linspace(-2, 2, LENGTH * LENGTH, dtype=torch.float64).view(1, 1, LENGTH, LENGTH)},
    "one row for all": {"attn_mask": (torch.arange(LENGTH) < 5)[None, None, None]},
    "scaled": {"is_causal": True, "scale": 0.3},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_against_pytorch(mask, kv_heads):
    q, k, v = tensors(kv_heads=kv_heads)
    options = MASKS[mask] | {"enable_gqa": kv_heads < 4}
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(q, k, v, **options)
    # Sums of eleven products in float64, in another order.
    torch.testing.assert_close(blockwise_attention(q, k, v, **options), expected, rtol=1e-13, atol=1e-14)


def test_no_key_of_a_later_block_is_read():
    q, k, v = tensors()
    k[:, :, 8:] = v[:, :, 8:] = float("nan")
    assert blockwise_attention(q, k, v, is_causal=True)[:, :, :8].isfinite().all()


def test_its_derivative():
    at, along = tensors(0), tensors(1)
    _, derivative = jvp(lambda *x: blockwise_attention(*x, is_causal=True), at, along)
    step = 1e-5
    plus, minus = (
        scaled_dot_product_attention(*(x + sign * step * d for x, d in zip(at, along, strict=True)), is_causal=True)
        for sign in (1, -1)
    )
    # The difference is off by step² times a third derivative, 1e-10, and by rounding over step, 1e-11.
    torch.testing.assert_close(derivative, (plus - minus) / (2 * step), rtol=1e-8, atol=1e-8)


def test_the_mode_takes_the_place_of_the_fused_kernels():
    at, along = tensors(0), tensors(1)

    def fused(*x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(*x, is_causal=True)

    with BlockwiseAttention():
        _, derivative = jvp(fused, at, along)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = jvp(fused, at, along)
    torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-13)


def test_dropout_is_refused():
    with pytest.raises(ValueError, match="expected attention without dropout"):
        blockwise_attention(*tensors(), dropout_p=0.1)
