"""The update direction v = Δθ/lr, by parameter name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Direction = Mapping[str, Tensor]


class LazyDirection(Mapping[str, Tensor]):
    """A direction of which no tensor is kept: each is computed when it is asked for.

    Args:
        names: of the parameters, in order.
        compute: name → tensor, float64, of the parameter's shape.
    """

    def __init__(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._compute = compute

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._compute(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names  # the mixin's would compute

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def scaled(self, factor: float) -> LazyDirection:
        """Times a number."""
        return LazyDirection(self._names, lambda name: self._compute(name) * factor)


class LazyComponents(Mapping[str, Direction]):
    """Components of which no tensor is kept, and which share the work where all of one parameter are asked for.

    Args:
        parts: their names, in order.
        names: of the parameters, in order.
        split: parameter name → part → tensor, float64, of the parameter's shape.
    """

    def __init__(self, parts: Iterable[str], names: Iterable[str], split: Callable[[str], dict[str, Tensor]]) -> None:
        self._parts, self._names = dict.fromkeys(parts), dict.fromkeys(names)
        self._split = split

    def __getitem__(self, part: str) -> Direction:
        if part not in self._parts:
            raise KeyError(part)
        return LazyDirection(self._names, lambda name: self._split(name)[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def of(self, name: str) -> dict[str, Tensor]:
        """All parts of one parameter; none of a parameter that has no part."""
        return self._split(name) if name in self._names else {}

    def scaled(self, factor: float) -> LazyComponents:
        """Times a number."""
        return LazyComponents(
            self._parts, self._names, lambda name: {part: v * factor for part, v in self._split(name).items()}
        )


@dataclass(frozen=True)
class SplitSizes:
    """How large the components are, and what they leave unexplained, ‖v − Σ parts‖/‖v‖."""

    gap: float
    components: dict[str, float]


@dataclass
class SplitSums:
    """The sums of squares that :class:`SplitSizes` are made of, one parameter after another."""

    rest: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    squares: dict[str, list[float]] = field(default_factory=dict)

    def add(self, value: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        """Count one parameter in: its direction and its parts. Returns what the parts leave unexplained."""
        for part, of_part in parts.items():
            self.squares.setdefault(part, []).append(_dot(of_part, of_part))
        unexplained = value - sum(parts.values())
        self.rest.append(_dot(unexplained, unexplained))
        self.whole.append(_dot(value, value))
        return unexplained

    @property
    def parameters(self) -> int:
        """How many were counted in."""
        return len(self.whole)

    @property
    def sizes(self) -> SplitSizes:
        """Of all of them."""
        gap = math.sqrt(sum(self.rest)) / max(math.sqrt(sum(self.whole)), torch.finfo(torch.float64).tiny)
        return SplitSizes(gap, {part: math.sqrt(sum(numbers)) for part, numbers in self.squares.items()})


@dataclass(frozen=True, eq=False)
class UpdateVector:
    """One optimizer step per unit learning rate.

    Args:
        direction: parameter name → Δθ/lr_ref, float64, of the parameter's shape.
        lr: lr_ref, the largest learning rate among the trainable groups: η = lr is the step really taken.
        components: ``momentum``, ``gradient`` and ``weight_decay``, each a direction; together they are ``direction``
            to rounding (:meth:`gap`). None where the optimizer is neither of Adam's family nor torch's SGD.
        preconditioner: P per parameter: the gradient component is −P∘g, with g as in ``parameter.grad``; so P is
            negative under ``maximize``. None where there are no components.
        split_absent: why there are no components, in words. None where there are some, or nobody asked for them.
        preconditioner_absent: why there is no preconditioner where there are components.
        sizes: of the components, where they are known already; of a lazy split they are then not computed again.

    Any of the directions may be lazy (:class:`LazyDirection`): then a tensor is new at every access. ``norm``, ``dot``,
    ``gap`` and ``component_norms`` take one parameter after another and hold no more than that in float64.

    Example:
        >>> v = UpdateVector({"w": torch.tensor([3.0, 4.0])}, lr=0.1)
        >>> v.norm(), v.scaled(2.0).norm(), v.dot(v)
        (5.0, 10.0, 25.0)
    """

    direction: Direction
    lr: float
    components: Mapping[str, Direction] | None = field(default=None, repr=False)
    preconditioner: Direction | None = field(default=None, repr=False)
    split_absent: str | None = field(default=None, repr=False)
    preconditioner_absent: str | None = field(default=None, repr=False)
    sizes: SplitSizes | None = field(default=None, repr=False)

    @property
    def why_no_preconditioner(self) -> str | None:
        """In words; None where there is one, or nobody asked for it."""
        return self.split_absent or self.preconditioner_absent

    def norm(self) -> float:
        """Euclidean norm over all parameters."""
        return math.sqrt(self.dot(self))

    def checked_norm(self) -> float:
        """The norm of an update that can be measured.

        Raises:
            ValueError: naming the first parameter whose direction is NaN or infinite.
        """
        norm = self.norm()
        if not math.isfinite(norm):  # squares of finite numbers may overflow, too
            for name, value in self.direction.items():
                bad = int((~value.isfinite()).sum())
                if bad:
                    raise ValueError(
                        f"expected a finite update, got NaN or infinity in {bad} of {value.numel()} numbers of {name}: "
                        "the step has spoilt the policy, or the policy was spoilt before it. Look at the loss and its "
                        "gradient (`detect_anomaly` of PyTorch finds where it began), and go on from an earlier "
                        "checkpoint"
                    )
        return norm

    def dot(self, other: UpdateVector) -> float:
        """Inner product of two directions.

        Raises:
            ValueError: if they are not over the same parameters.
        """
        if self.direction.keys() != other.direction.keys():
            odd = sorted(self.direction.keys() ^ other.direction.keys())
            raise ValueError(f"expected two updates of the same parameters, got {odd[:3]} in one of them only")
        same = other.direction is self.direction  # a lazy one is computed once
        return sum(_dot(value, value if same else other.direction[name]) for name, value in self.direction.items())

    def along(self, gradient: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
        """⟨∇f, v⟩ and the same of every component, for a gradient by parameter name; no components, no parts.

        Raises:
            KeyError: if the gradient lacks a parameter of the direction.
        """
        whole = math.fsum(_dot(value, gradient[name].to(value.device)) for name, value in self.direction.items())
        sums: dict[str, list[float]] = {part: [] for part in self.components or ()}
        for name in self.direction if self.components is not None else ():
            for part, value in self.parts(name).items():
                sums[part].append(_dot(value, gradient[name].to(value.device)))
        return whole, {part: math.fsum(numbers) for part, numbers in sums.items()}

    def scaled(self, factor: float) -> UpdateVector:
        """The direction and its components times a number; lr stays."""
        return replace(
            self,
            direction=_scale(self.direction, factor),
            components=self.components and _scale_parts(self.components, factor),
            preconditioner=self.preconditioner and _scale(self.preconditioner, factor),
            sizes=None,
        )

    def gap(self) -> float | None:
        """What the components leave unexplained: ‖v − Σ parts‖/‖v‖, or None without components."""
        if self.components is None:
            return None
        if self.sizes is not None:
            return self.sizes.gap
        sums = SplitSums()
        for name, value in self.direction.items():
            sums.add(value, self.parts(name))
        return sums.sizes.gap

    def component_norms(self) -> dict[str, float] | None:
        """Euclidean norm of every component over all parameters, or None without components."""
        if self.components is None:
            return None
        if self.sizes is not None:
            return dict(self.sizes.components)
        squares: dict[str, list[float]] = {part: [] for part in self.components}
        for name in dict.fromkeys(name for part in self.components.values() for name in part):
            for part, value in self.parts(name).items():
                squares[part].append(_dot(value, value))
        return {part: math.sqrt(sum(numbers)) for part, numbers in squares.items()}

    def parts(self, name: str) -> dict[str, Tensor]:
        """One parameter's components, those it has a part in; a lazy split is made once for all of them."""
        assert self.components is not None
        if isinstance(self.components, LazyComponents):
            return self.components.of(name)
        return {part: direction[name] for part, direction in self.components.items() if name in direction}


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _scale(direction: Direction, factor: float) -> Direction:
    if isinstance(direction, LazyDirection):
        return direction.scaled(factor)
    return {name: value * factor for name, value in direction.items()}


def _scale_parts(components: Mapping[str, Direction], factor: float) -> Mapping[str, Direction]:
    if isinstance(components, LazyComponents):
        return components.scaled(factor)
    return {part: _scale(direction, factor) for part, direction in components.items()}
