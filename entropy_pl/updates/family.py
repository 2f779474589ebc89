"""What has to be done differently for each family of optimizers whose step can be taken apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from entropy_pl.updates import adam8bit, adamw, sgd
from entropy_pl.updates.split import NextSplitter, Splitter

Names = Mapping[int, str]  # id(parameter) → name


class Moments(Protocol):
    """What is kept of one parameter's state from before a step."""

    def bytes(self) -> int:
        """Of the copies."""


@dataclass(frozen=True, eq=False)
class Family:
    """The ways of one family; all take the optimizer and the names of the parameters watched.

    Args:
        keep: before a step, what its split needs of the state, by parameter name; if asked for everything, what the
            step with another gradient needs.
        why_no_split: after the step, what keeps it from being split, in words; None where nothing does.
        splits: after the step, with lr_ref, what was kept and θ of before, by parameter name.
        next_splits: with lr_ref and everything kept, by parameter name.
    """

    keep: Callable[[Any, Names, bool], Mapping[str, Moments]]
    why_no_split: Callable[[Any, Names], str | None]
    splits: Callable[[Any, Names, float, Mapping[str, Any], Mapping[str, Tensor]], Mapping[str, Splitter]]
    next_splits: Callable[[Any, Names, float, Mapping[str, Any]], Mapping[str, NextSplitter]]


def _other(optimizer: Any, names: Names) -> str:
    return (
        f"{type(optimizer).__name__} is not of Adam's family and not torch's SGD: its step has no momentum, gradient "
        "and weight-decay parts here"
    )


ADAM = Family(
    keep=lambda optimizer, names, everything: adamw.keep_moments(optimizer, names) if everything else {},
    why_no_split=lambda optimizer, names: None,
    splits=lambda optimizer, names, lr_ref, kept, thetas: adamw.adam_splits(optimizer, names, lr_ref),
    next_splits=adamw.adam_next_splits,
)
BITSANDBYTES = Family(
    keep=lambda optimizer, names, everything: adam8bit.keep_moments(optimizer, names, all_widths=everything),
    why_no_split=adam8bit.why_no_split,
    splits=lambda optimizer, names, lr_ref, kept, thetas: adam8bit.bitsandbytes_splits(optimizer, names, lr_ref, kept),
    next_splits=adam8bit.bitsandbytes_next_splits,
)
SGD = Family(
    keep=lambda optimizer, names, everything: sgd.keep_buffers(optimizer, names, values=everything),
    why_no_split=lambda optimizer, names: None,
    splits=sgd.sgd_splits,
    next_splits=sgd.sgd_next_splits,
)
OTHER = Family(
    keep=lambda optimizer, names, everything: {},
    why_no_split=_other,
    splits=lambda optimizer, names, lr_ref, kept, thetas: {},
    next_splits=lambda optimizer, names, lr_ref, kept: {},
)


def family_of(optimizer: object) -> Family:
    """The family of an optimizer, ``OTHER`` where its step cannot be split."""
    if adamw.is_adam_like(optimizer):
        return ADAM
    if adam8bit.is_bitsandbytes_adam(optimizer):
        return BITSANDBYTES
    return SGD if sgd.is_sgd(optimizer) else OTHER
