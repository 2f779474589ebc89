"""One parameter's step in its parts, and the parameters' parts gathered: the same for every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from entropy_pl.updates.vector import UpdateVector

COMPONENTS = ("momentum", "gradient", "weight_decay")
# One parameter's components, in that order, and its preconditioner.
Split = tuple[list[Tensor], Tensor]
# From one parameter's θ before the step to its split.
Splitter = Callable[[Tensor], Split]


class NextSplitter(Protocol):
    """One parameter's step with any gradient, from the moments of before the step."""

    def __call__(self, gradient: Tensor | None, theta: Tensor, *, momentum: bool) -> Split:
        """Of the gradient as the optimizer would see it, θ before the step, and with momentum or without."""


def no_movement(theta: Tensor) -> Split:
    """Zeros, float64 of θ's shape: the split of a parameter without gradient."""
    zero = torch.zeros_like(theta, dtype=torch.float64)
    return [zero] * len(COMPONENTS), zero


def watched(optimizer: Any, names: Mapping[int, str]) -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
    """The optimizer's parameters in ``names`` (``id(parameter)`` → name) in its order: name, parameter and group."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) in names:
                yield names[id(parameter)], parameter, group


def check_gradient(name: str, gradient: Tensor, theta: Tensor) -> None:
    """Raise where no step of this parameter follows from this gradient.

    Raises:
        ValueError: if it is not of θ's shape, or not finite.
    """
    if gradient.shape != theta.shape:
        expected, got = list(theta.shape), list(gradient.shape)
        raise ValueError(f"expected the gradient of {name} of shape {expected}, got {got}: take it from this model")
    if not gradient.isfinite().all():
        raise ValueError(
            f"expected a finite gradient, got {int((~gradient.isfinite()).sum())} numbers in {name} that are not: "
            "no optimizer step follows from it; look at the loss"
        )


def by_part(splits: Mapping[str, Split]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Gather the parameters' splits.

    Returns:
        ``{"momentum", "gradient", "weight_decay"}`` and the preconditioner, each by parameter name.
    """
    components = {part: {name: parts[i] for name, (parts, _) in splits.items()} for i, part in enumerate(COMPONENTS)}
    return components, {name: preconditioner for name, (_, preconditioner) in splits.items()}


def update_of(splits: Mapping[str, Split], lr: float) -> UpdateVector:
    """The update that these splits are: ``direction`` is the sum of ``components`` to the last bit.

    Args:
        splits: by parameter name, per unit lr_ref.
        lr: lr_ref.
    """
    components, preconditioner = by_part(splits)
    momentum, gradient, weight_decay = components.values()
    direction = {name: momentum[name] + gradient[name] + weight_decay[name] for name in splits}
    return UpdateVector(direction, lr, components, preconditioner)
