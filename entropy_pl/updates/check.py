"""Whether the parts of a step are that step, but for rounding.

θ + Δθ is formed in the parameter's dtype. A number of θ's size is rounded by at most half of ε|θ|, ε the dtype's
(1.2e-7 in float32, 8e-3 in bfloat16), and an optimizer's kernel rounds three: 1 − lr·wd, its product with θ, and the
sum with the step. That is all that may part Δθ from lr Σ parts where nothing else rounds, and it is compared number by
number: of a bfloat16 parameter it is often larger than the step.

The step itself is made of rounded numbers too. 1 − βᵗ comes from a float32 βᵗ in some kernels: off by 1.2e-7 of
1 − β₂ᵗ ≥ 1e-4 (β₂ = 0.9999, t = 1), half of which is in √v. In half precision the moments are rounded as they are kept,
and √v as it is divided and shifted: by four ε in all. This is compared by norms, over a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from entropy_pl.updates.vector import SplitSizes, SplitSums

ROUNDINGS = 4  # of numbers of θ's size in one step, half an ε each: three, and one to spare
ARITHMETIC = 1e-3  # of the parts: half of 1.2e-7/1e-4, rounded up
HALF_PRECISION = 4  # times ε
T = TypeVar("T")


@dataclass
class SplitCheck:
    """One parameter after another, whether its parts add up to its step.

    Args:
        lr: lr_ref of the step.
    """

    lr: float
    _sums: SplitSums = field(default_factory=SplitSums)
    _beyond: list[tuple[float, str]] = field(default_factory=list)

    def add(
        self, name: str, change: Tensor, parts: Mapping[str, Tensor], before: Tensor, after: Tensor, steps: int = 1
    ) -> None:
        """Look at one parameter.

        Args:
            name: of it.
            change: Δθ/lr_ref.
            parts: of it, per unit lr_ref.
            before: θ before the step, in the parameter's dtype.
            after: θ after it.
            steps: that were taken on its memory.
        """
        unexplained = self._sums.add(change, parts)
        eps = torch.finfo(before.dtype).eps
        rounding = before.abs()  # in place, and in the parameter's dtype: every float64 copy of a large one counts
        torch.maximum(rounding, after.abs(), out=rounding)
        rounding.mul_(0.5 * ROUNDINGS * steps * eps).add_(torch.finfo(before.dtype).smallest_normal)
        beyond = float(unexplained.abs_().mul_(self.lr).sub_(rounding).clamp_(min=0).norm())
        relative = max(ARITHMETIC, HALF_PRECISION * eps) if before.dtype.itemsize < 4 else ARITHMETIC
        allowed = relative * self.lr * sum(float(part.norm()) for part in parts.values())
        if beyond > allowed:
            self._beyond.append((beyond, name))

    @property
    def sizes(self) -> SplitSizes:
        """The gap and the components' norms, of all parameters looked at."""
        return self._sums.sizes

    def why_not(self, steppers: str) -> str | None:
        """What is wrong with the parts, in words; None where they are the step but for rounding.

        Args:
            steppers: the optimizers' names.
        """
        if not self._beyond:
            return None
        where = max(self._beyond)[1]
        return (
            f"momentum, gradient and weight decay, read off {steppers} as its base class steps, leave "
            f"{_share(self.sizes.gap)} of the step unexplained, more than rounding in {len(self._beyond)} of "
            f"{self._sums.parameters} parameters ({where} most): it steps otherwise, or something moved the parameters "
            "besides"
        )


def _share(gap: float) -> str:
    return f"{gap:.3%}" if gap < 1e-3 else f"{gap:.0%}" if gap >= 0.1 else f"{gap:.1%}"


def made_or_why_not(make: Callable[[], T], stepper: str) -> tuple[T | None, str | None]:
    """What an optimizer's state gives, or, where the state is not of the kind expected, why it gives nothing."""
    try:
        return make(), None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        return None, f"the state of {stepper} is not that of its base class, of which parts are made ({found})"
