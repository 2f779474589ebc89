"""Forward-mode derivatives by PyTorch's dual numbers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad


def derivatives(
    function: Callable[[dict[str, Tensor]], tuple[Tensor, ...]],
    at: Mapping[str, Tensor],
    along: Mapping[str, Tensor],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A function's values at a point and their derivatives along a direction, in one pass.

    ``torch.func.jvp`` gives the same, but its tensors must not be written to in place by what the function only
    holds, which forbids what PEFT does with a module's parameters in every forward pass (``target_parameters``).

    Args:
        function: from tensors by name to tensors.
        at: the point.
        along: the direction, by the same names.

    Returns:
        Values, and derivatives of their shapes; zero for a value that does not depend on the point.

    Raises:
        NotImplementedError: for an operation without forward-mode derivative.
    """
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(value, along[name]) for name, value in at.items()}
        parts = [forward_ad.unpack_dual(value) for value in function(duals)]
    values = tuple(part.primal for part in parts)
    tangents = tuple(torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts)
    return values, tangents
