"""One of the optimizers whose steps make an update: what is kept of it before its step, and known of it after."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from entropy_pl.updates.check import made_or_why_not
from entropy_pl.updates.family import Family, Moments, family_of
from entropy_pl.updates.split import NextSplitter, Splitter
from entropy_pl.updates.steps import Stepping, parameters_of, stepper_name


@dataclass(frozen=True, eq=False)
class TakenStep:
    """One optimizer's step, as it stood right after it.

    Args:
        lr: its largest learning rate.
        splits: by parameter name, per ``unit``.
        next_splits: of a step with another gradient, likewise.
        absent: why it cannot be taken apart, in words.
    """

    lr: float
    splits: Mapping[str, Splitter] = field(default_factory=dict)
    next_splits: Mapping[str, NextSplitter] = field(default_factory=dict)
    absent: str | None = None

    @property
    def unit(self) -> float:
        """The learning rate that splits are per unit of; 1 where it is zero."""
        return self.lr if self.lr > 0 else 1.0


@dataclass(eq=False)
class Watched:
    """An optimizer whose step is to be read.

    Args:
        optimizer: the one that holds the state.
        names: id → name, of its parameters that are watched.
        family: the ways to take its step apart.
        moments: of before the step.
        absent: why it cannot be taken apart, if that is known before it.
    """

    optimizer: Any
    names: Mapping[int, str]
    family: Family
    moments: Mapping[str, Moments] = field(default_factory=dict)
    absent: str | None = None

    @classmethod
    def of(cls, optimizer: Stepping, names: Mapping[int, str]) -> Watched:
        """Of its parameters those that have a name."""
        held = {id(p): names[id(p)] for p in parameters_of(optimizer) if id(p) in names}
        return cls(optimizer, held, family_of(optimizer))

    def keep(self, everything: bool) -> None:
        """Before the step: what its split needs of the state; or everything, for a step with another gradient."""
        kept, self.absent = made_or_why_not(
            lambda: self.family.keep(self.optimizer, self.names, everything), stepper_name(self.optimizer)
        )
        self.moments = kept or {}

    def taken(self, thetas: Mapping[str, Tensor], everything: bool) -> TakenStep:
        """Right after the step, before a scheduler moves the learning rate.

        Args:
            thetas: θ before the step.
            everything: as :meth:`keep` was told.
        """
        step = TakenStep(self._lr())
        absent = self.absent or self.family.why_no_split(self.optimizer, self.names)
        if absent:
            return TakenStep(step.lr, absent=absent)

        def made() -> TakenStep:
            of_state = (self.optimizer, self.names, step.unit, self.moments)
            next_splits = self.family.next_splits(*of_state) if everything else {}
            return TakenStep(step.lr, self.family.splits(*of_state, thetas), next_splits)

        found, absent = made_or_why_not(made, stepper_name(self.optimizer))
        return TakenStep(step.lr, absent=absent) if found is None else found

    def _lr(self) -> float:
        """The largest learning rate of its groups that hold something watched."""
        return max(
            _rate(group)
            for group in self.optimizer.param_groups
            if any(id(parameter) in self.names for parameter in group["params"])
        )


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)
