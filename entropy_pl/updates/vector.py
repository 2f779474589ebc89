"""The update direction v = Δθ/lr, by parameter name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Direction = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class UpdateVector:
    """One optimizer step per unit learning rate.

    Args:
        direction: parameter name → Δθ/lr_ref, float64, of the parameter's shape.
        lr: lr_ref, the largest learning rate among the trainable groups: η = lr is the step really taken.
        components: ``momentum``, ``gradient`` and ``weight_decay``, each a direction; together they are ``direction``
            to rounding (:meth:`gap`). None where the optimizer is not Adam-like.
        preconditioner: P per parameter: the gradient component is −P∘g. None where there are no components.

    Example:
        >>> v = UpdateVector({"w": torch.tensor([3.0, 4.0])}, lr=0.1)
        >>> v.norm(), v.scaled(2.0).norm(), v.dot(v)
        (5.0, 10.0, 25.0)
    """

    direction: Direction
    lr: float
    components: dict[str, Direction] | None = field(default=None, repr=False)
    preconditioner: Direction | None = field(default=None, repr=False)

    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        return math.sqrt(self.dot(self))

    def dot(self, other: UpdateVector) -> float:
        """Inner product of two directions.

        Raises:
            ValueError: if they are not over the same parameters.
        """
        if self.direction.keys() != other.direction.keys():
            odd = sorted(self.direction.keys() ^ other.direction.keys())
            raise ValueError(f"expected two updates of the same parameters, got {odd[:3]} in one of them only")
        return sum(_dot(value, other.direction[name]) for name, value in self.direction.items())

    def scaled(self, factor: float) -> UpdateVector:
        """The direction and its components times a number; lr stays."""
        return replace(
            self,
            direction=_scale(self.direction, factor),
            components=self.components and {k: _scale(part, factor) for k, part in self.components.items()},
            preconditioner=self.preconditioner and _scale(self.preconditioner, factor),
        )

    def gap(self) -> float | None:
        """What the components leave unexplained: ‖v − Σ parts‖/‖v‖, or None without components."""
        if self.components is None:
            return None
        rest = {
            name: value - sum(part[name] for part in self.components.values() if name in part)
            for name, value in self.direction.items()
        }
        return UpdateVector(rest, self.lr).norm() / max(self.norm(), torch.finfo(torch.float64).tiny)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _scale(direction: Direction, factor: float) -> Direction:
    return {name: value * factor for name, value in direction.items()}
