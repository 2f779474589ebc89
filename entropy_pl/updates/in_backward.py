"""Parameters that move elsewhere than in their optimizer's ``step()``: in the backward pass, or by other code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def may_move_in_backward(parameters: Iterable[Tensor]) -> bool:
    """Whether one of them has a hook for its gradient, as optimizers that step in the backward pass put there.

    Those are LOMO and AdaLomo, the layer-wise ones of Transformers, PyTorch's recipe of an optimizer step in the
    backward pass, and ``torch.distributed.optim._apply_optimizer_in_backward``. Other hooks move nothing: whether one
    does, only the parameters tell.
    """
    hooks = ("_backward_hooks", "_post_accumulate_grad_hooks", "_in_backward_optimizers")
    return any(getattr(parameter, hook, None) for parameter in parameters for hook in hooks)


class Mark:
    """What parameters were at some time: a sum of each, which tells cheaply whether they have moved since.

    Args:
        parameters: to be summed up, each in float64, now.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._sums = self._summed()

    def moved(self) -> bool:
        """Whether one of them has another sum now."""
        now = self._summed()
        return not bool(((now == self._sums) | (now.isnan() & self._sums.isnan())).all())

    def _summed(self) -> Tensor:
        sums = [parameter.detach().sum(dtype=torch.float64).cpu() for parameter in self._parameters]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64)
