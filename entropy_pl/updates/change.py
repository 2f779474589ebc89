"""What a step changed, computed parameter by parameter: all at once and held, or whenever it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from entropy_pl.updates.split import COMPONENTS, Splitter, by_part
from entropy_pl.updates.vector import LazyComponents, LazyDirection, UpdateVector


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
                "next step, or read(keep=True)"
            )
        change = after.double() - self.before[name].double()
        return change if self.lr is None else change / self.lr


@dataclass(frozen=True, eq=False)
class Splits:
    """Every parameter's split, computed when asked for."""

    before: Mapping[str, Tensor]
    splitters: Mapping[str, Splitter]

    def parts(self, name: str) -> dict[str, Tensor]:
        """One parameter's components."""
        return dict(zip(COMPONENTS, self.splitters[name](self.before[name])[0], strict=True))

    def preconditioner(self, name: str) -> Tensor:
        """One parameter's P."""
        return self.splitters[name](self.before[name])[1]


def kept_update(change: Change, splits: Splits | None, lr: float, absent: str | None) -> UpdateVector:
    """All of it in float64; without splits, ``absent`` says why."""
    direction = {name: change(name) for name in change.after}
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    by_name = {name: split(splits.before[name]) for name, split in splits.splitters.items()}
    return UpdateVector(direction, lr, *by_part(by_name))


def lazy_update(change: Change, splits: Splits | None, lr: float, absent: str | None) -> UpdateVector:
    """Nothing of it yet; without splits, ``absent`` says why."""
    direction = LazyDirection(change.after, change)
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    components = LazyComponents(COMPONENTS, splits.splitters, splits.parts)
    return UpdateVector(direction, lr, components, LazyDirection(splits.splitters, splits.preconditioner))
