"""What a step changed, computed parameter by parameter: all at once and held, or whenever it is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from entropy_pl.updates.check import SplitCheck, made_or_why_not
from entropy_pl.updates.shared import Alias
from entropy_pl.updates.split import COMPONENTS, Split, Splitter, by_part
from entropy_pl.updates.vector import LazyComponents, LazyDirection, UpdateVector

OF_TWO_STEPS = (
    "parameters that share memory were each stepped, with a gradient and moments of their own ({names}): no one "
    "preconditioner makes their step of one gradient"
)


@dataclass(frozen=True, eq=False)
class Change:
    """A parameter's Δθ/lr_ref, computed when called.

    Args:
        before: θ before the step.
        after: aliases of the parameters' storage, not of the parameters, whose ``data`` may be exchanged.
        versions: of ``after``, counted up by most of what writes to it (not through ``.data``).
        lr: lr_ref; None where nothing moved.
    """

    before: Mapping[str, Tensor]
    after: Mapping[str, Tensor]
    versions: Mapping[str, int]
    lr: float | None

    def __call__(self, name: str) -> Tensor:
        """Of one parameter."""
        after = self.after[name]
        if after._version != self.versions[name]:
            raise RuntimeError(
                f"expected the parameters as the step left them, got {name} changed since: use the update before the "
                "next step, or read() in the place of read_lazily()"
            )
        change = after.double() - self.before[name].double()
        return change if self.lr is None else change / self.lr


@dataclass(frozen=True, eq=False)
class Stepped:
    """One optimizer's step on one parameter.

    Args:
        split: from θ before it to its components.
        factor: from the unit that ``split`` is in to one of lr_ref.
        alias: the parameter's place in the memory of another one; None where it has memory of its own.
    """

    split: Splitter
    factor: float = 1.0
    alias: Alias | None = None

    def __call__(self, theta: Tensor) -> Split:
        """By the numbers of its owner, whose θ is given."""
        parts, preconditioner = self.split(theta if self.alias is None else self.alias.of(theta))
        pieces = [*parts, preconditioner]
        if self.factor != 1:
            pieces = [piece * self.factor for piece in pieces]
        if self.alias is not None:
            pieces = [self.alias.onto_owner(piece) for piece in pieces]
        return pieces[:-1], pieces[-1]


@dataclass(frozen=True, eq=False)
class Splits:
    """Every parameter's split, computed when asked for.

    Memory that was stepped more than once, as several parameters or by several optimizers, moved by the sum of the
    steps. Its components are the sums of theirs, each step taken to begin where the one before it ended; whether they
    are what happened, the check says.

    Args:
        before: θ before the step.
        stepped: the steps on each parameter's memory, one after another.
        lr: lr_ref.
        steppers: the optimizers' names.
    """

    before: Mapping[str, Tensor]
    stepped: Mapping[str, Sequence[Stepped]]
    lr: float
    steppers: str

    def of(self, name: str) -> Split:
        """One parameter's components, and its P, which is worth nothing where its memory was stepped twice."""
        return split_in_turn(self.stepped[name], self.before[name], self.lr)

    def parts(self, name: str) -> dict[str, Tensor]:
        """One parameter's components."""
        return dict(zip(COMPONENTS, self.of(name)[0], strict=True))

    def preconditioner(self, name: str) -> Tensor:
        """One parameter's P."""
        return self.of(name)[1]

    @property
    def preconditioner_absent(self) -> str | None:
        """Why there is no P."""
        twice = [name for name, steps in self.stepped.items() if len(steps) > 1]
        return OF_TWO_STEPS.format(names=", ".join(twice[:3])) if twice else None

    def checked(self, change: Change, split: Mapping[str, Split] | None = None) -> SplitCheck:
        """Compare every parameter's step with its parts, one parameter after another."""
        check = SplitCheck(self.lr)
        for name in self.stepped:
            parts = (self.of(name) if split is None else split[name])[0]
            named = dict(zip(COMPONENTS, parts, strict=True))
            check.add(name, change(name), named, self.before[name], change.after[name], len(self.stepped[name]))
        return check


def split_in_turn(steps: Sequence[Stepped], theta: Tensor, lr: float) -> Split:
    """The components of several steps on the same memory, from θ before the first; P is that of the last."""
    parts, preconditioner = steps[0](theta)
    for step in steps[1:]:
        theta = theta.double() + lr * sum(parts)
        more, preconditioner = step(theta)
        parts = [part + other for part, other in zip(parts, more, strict=True)]
    return parts, preconditioner


def kept_update(change: Change, splits: Splits | None, lr: float, absent: str | None) -> UpdateVector:
    """All of it in float64; without splits, ``absent`` says why."""
    direction = {name: change(name) for name in change.after}
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    made, absent = made_or_why_not(lambda: {name: splits.of(name) for name in splits.stepped}, splits.steppers)
    if made is None:
        return UpdateVector(direction, lr, split_absent=absent)
    check = splits.checked(change, made)
    absent = check.why_not(splits.steppers)
    if absent:
        return UpdateVector(direction, lr, split_absent=absent)
    components, preconditioner = by_part(made)
    no_p = splits.preconditioner_absent
    return UpdateVector(
        direction, lr, components, None if no_p else preconditioner, preconditioner_absent=no_p, sizes=check.sizes
    )


def lazy_update(change: Change, splits: Splits | None, lr: float, absent: str | None) -> UpdateVector:
    """Nothing of it yet; without splits, ``absent`` says why."""
    direction = LazyDirection(change.after, change)
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    check, absent = made_or_why_not(partial(splits.checked, change), splits.steppers)
    if check is not None:
        absent = check.why_not(splits.steppers)
    if check is None or absent:
        return UpdateVector(direction, lr, split_absent=absent)
    no_p = splits.preconditioner_absent
    return UpdateVector(
        direction,
        lr,
        LazyComponents(COMPONENTS, splits.stepped, splits.parts),
        None if no_p else LazyDirection(splits.stepped, splits.preconditioner),
        preconditioner_absent=no_p,
        sizes=check.sizes,
    )
