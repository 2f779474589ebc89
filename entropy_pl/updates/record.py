"""The update read off the real optimizer: θ before, θ after, and the learning rate that lay between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.updates.adam8bit import (
    QuantizedMoments,
    bitsandbytes_splits,
    is_bitsandbytes_adam,
    keep_moments,
    why_no_split,
)
from entropy_pl.updates.adamw import COMPONENTS, Splitter, adam_splits, by_part, is_adam_like
from entropy_pl.updates.displace import parameters_set_to
from entropy_pl.updates.steps import Stepping, inner_optimizer, was_skipped, watch_steps
from entropy_pl.updates.vector import LazyComponents, LazyDirection, UpdateVector


class UpdateRecorder:
    """Reads one optimizer step as an :class:`UpdateVector`, whatever optimizer, clipping or schedule made it.

    Call :meth:`snapshot` before the step and :meth:`read` after it, before gradients are cleared and before a
    scheduler moves the learning rate; :func:`record_update` does both.

    Args:
        model: whose parameters are watched, under their ``named_parameters`` names.
        optimizer: anything with ``step()`` and ``param_groups``, or a wrapper with such a thing in its ``.optimizer``.
            Watched are its parameters that belong to the model and require a gradient.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
        ValueError: if the optimizer holds no trainable parameter of the model.
    """

    def __init__(self, model: nn.Module, optimizer: Stepping) -> None:
        self._model = model
        self._optimizer = inner_optimizer(optimizer)
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in held}
        if not self._parameters:
            raise ValueError(
                f"expected {type(self._optimizer).__name__} to hold trainable parameters of {type(model).__name__}, "
                "got none: pass the parameters with requires_grad=True to the optimizer, of this very model object"
            )
        self._before: dict[str, Tensor] | None = None
        self._moments: dict[str, QuantizedMoments] = {}
        self._update: UpdateVector | None = None

    @property
    def update(self) -> UpdateVector:
        """The update read last.

        Raises:
            RuntimeError: before :meth:`read`.
        """
        if self._update is None:
            raise RuntimeError("no step has been read yet: call snapshot() before optimizer.step() and read() after")
        return self._update

    def snapshot(self) -> None:
        """Keep a copy of θ, and of the moments where the optimizer has them in 8 bits."""
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._moments = keep_moments(self._optimizer, self._names()) if is_bitsandbytes_adam(self._optimizer) else {}
        self._update = None

    def bytes(self) -> int:
        """Bytes of the snapshot: θ in its own dtype, and 8-bit moments (2 a number). 0 without a snapshot."""
        theta = sum(value.nbytes for value in (self._before or {}).values())
        return theta + sum(moments.bytes() for moments in self._moments.values())

    def read(self, keep: bool = True) -> UpdateVector:
        """Take Δθ/lr_ref in float64, and the components where the optimizer is Adam-like.

        No movement (a skipped step, a learning rate of zero) gives a direction of zeros. An optimizer without a
        learning rate (Adafactor's own schedule) counts as one of rate 1.

        Args:
            keep: True holds all in float64, 40 bytes a number with components. False holds nothing: direction,
                components and preconditioner are lazy, and compute a parameter's tensor anew at every access from the
                snapshot, the parameters' storage and the optimizer's state. Such a vector is good until the optimizer
                steps again or zeroes its gradients in place; that the parameters hold other values for a while
                (:meth:`at_theta_before`, :func:`~entropy_pl.updates.displace.displaced`) does not disturb it. It
                keeps the snapshot alive, :meth:`forget` or not.

        Raises:
            RuntimeError: without a snapshot. From a lazy vector, where it notices that the parameters were written to.
            ValueError: if parameters moved at a learning rate of zero.
        """
        before = self._snapshot()
        after = {name: parameter.detach() for name, parameter in self._parameters.items()}
        names = self._names()
        lr = max(
            _rate(group)
            for group in self._optimizer.param_groups
            if any(id(parameter) in names for parameter in group["params"])
        )
        moved = any(not torch.equal(after[name], before[name]) for name in after)
        if moved and lr <= 0:
            raise ValueError(f"expected a learning rate > 0 behind a step that moved the parameters, got {lr}")
        change = _Change(before, after, {n: tensor._version for n, tensor in after.items()}, lr if moved else None)
        absent = self._why_no_split() if moved else "the step moved no parameter"
        splits = None if absent else _Splits(before, self._splitters(lr))
        self._update = _kept(change, splits, lr, absent) if keep else _lazy(change, splits, lr, absent)
        return self._update

    @property
    def theta_before(self) -> Mapping[str, Tensor]:
        """θ of before the step, by parameter name, in the parameters' own dtype.

        Raises:
            RuntimeError: without a snapshot.
        """
        return self._snapshot()

    def at_theta_before(self) -> AbstractContextManager[None]:
        """The model as it was before the step, for as long as the context lasts."""
        return parameters_set_to(self._model, self._snapshot())

    def forget(self) -> None:
        """Free the snapshot."""
        self._before = None
        self._moments = {}

    def _snapshot(self) -> dict[str, Tensor]:
        if self._before is None:
            raise RuntimeError("no snapshot of the parameters: call snapshot() before optimizer.step()")
        return self._before

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._parameters.items()}

    def _why_no_split(self) -> str | None:
        if is_adam_like(self._optimizer):
            return None
        if is_bitsandbytes_adam(self._optimizer):
            return why_no_split(self._optimizer, self._names())
        return (
            f"{type(self._optimizer).__name__} is not of Adam's family: its step has no momentum, gradient and "
            "weight-decay parts here"
        )

    def _splitters(self, lr: float) -> dict[str, Splitter]:
        if isinstance(self._optimizer, torch.optim.Optimizer) and is_adam_like(self._optimizer):
            return adam_splits(self._optimizer, self._names(), lr)
        return bitsandbytes_splits(self._optimizer, self._names(), lr, self._moments)


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)


@dataclass(frozen=True, eq=False)
class _Change:
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
        after = self.after[name]
        if after._version != self.versions[name]:
            raise RuntimeError(
                f"expected the parameters as the step left them, got {name} changed since: use the update before the "
                "next step, or read(keep=True)"
            )
        change = after.double() - self.before[name].double()
        return change if self.lr is None else change / self.lr


@dataclass(frozen=True, eq=False)
class _Splits:
    """Every parameter's split, computed when asked for."""

    before: Mapping[str, Tensor]
    splitters: Mapping[str, Splitter]

    def parts(self, name: str) -> dict[str, Tensor]:
        return dict(zip(COMPONENTS, self.splitters[name](self.before[name])[0], strict=True))

    def preconditioner(self, name: str) -> Tensor:
        return self.splitters[name](self.before[name])[1]


def _kept(change: _Change, splits: _Splits | None, lr: float, absent: str | None) -> UpdateVector:
    direction = {name: change(name) for name in change.after}
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    by_name = {name: split(splits.before[name]) for name, split in splits.splitters.items()}
    return UpdateVector(direction, lr, *by_part(by_name))


def _lazy(change: _Change, splits: _Splits | None, lr: float, absent: str | None) -> UpdateVector:
    direction = LazyDirection(change.after, change)
    if splits is None:
        return UpdateVector(direction, lr, split_absent=absent)
    components = LazyComponents(COMPONENTS, splits.splitters, splits.parts)
    return UpdateVector(direction, lr, components, LazyDirection(splits.splitters, splits.preconditioner))


@contextmanager
def record_update(model: nn.Module, optimizer: Stepping) -> Iterator[UpdateRecorder]:
    """Record the optimizer step taken inside the block.

    The step is read the moment it ends, so that a scheduler or ``zero_grad`` in the same block does no harm. A block
    in which no step happened (a skipped one) records no movement.

    Args:
        model: the policy.
        optimizer: whose ``step()`` is called in the block, torch's or not; a wrapper of it serves as well
            (:func:`~entropy_pl.updates.steps.watch_steps`).

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
        ValueError: if the optimizer holds no trainable parameter of the model.
        RuntimeError: if it stepped more than once.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> with record_update(model, optimizer) as recorder:
        ...     optimizer.step()
        >>> recorder.update.lr, recorder.update.direction["bias"].round(decimals=5)
        (0.1, tensor([-1.], dtype=torch.float64))
    """
    recorder = UpdateRecorder(model, optimizer)
    recorder.snapshot()
    steps = 0

    def after_step() -> None:
        nonlocal steps
        if was_skipped(optimizer):
            return
        steps += 1
        if steps > 1:
            raise RuntimeError("expected one optimizer.step() inside record_update, got a second: record each apart")
        recorder.read()

    watch = watch_steps(optimizer, before=lambda: None, after=after_step)
    try:
        yield recorder
    finally:
        watch.remove()
    if not steps:
        recorder.read()
