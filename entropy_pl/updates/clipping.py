"""Clipping of gradients by their global norm, as torch does it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_


def clip_factor(norm: Tensor | float, max_norm: float) -> Tensor:
    """Return what ``clip_grad_norm_`` multiplies gradients of this norm by: min(1, max_norm/(norm + 1e-6))."""
    norm = norm if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def clip_gradients(
    gradients: Mapping[str, Tensor | None], max_norm: float | None
) -> tuple[dict[str, Tensor | None], float, float]:
    """Clip by the global norm, by torch's own ``clip_grad_norm_``; the gradients given stay as they are.

    Args:
        gradients: parameter name → g, or None.
        max_norm: the largest norm to leave, > 0; None for no clipping.

    Returns:
        The gradients times the scale, their norm before, and the scale of :func:`clip_factor`.

    Raises:
        ValueError: if ``max_norm`` is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"expected max_norm > 0, got {max_norm}: give None for no clipping")
    clipped = {name: gradient if gradient is None else gradient.clone() for name, gradient in gradients.items()}
    holders = []  # torch clips what hangs on a tensor as its .grad
    for gradient in clipped.values():
        if gradient is not None:
            holders.append(gradient.detach())
            holders[-1].grad = gradient
    norm = clip_grad_norm_(holders, float("inf") if max_norm is None else max_norm)
    if max_norm is None:
        return dict(gradients), float(norm), 1.0
    return clipped, float(norm), float(clip_factor(norm, max_norm))
