"""The update read off the real optimizer: θ before, θ after, and the learning rate that lay between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.updates.change import Change, Splits, kept_update, lazy_update
from entropy_pl.updates.displace import parameters_set_to
from entropy_pl.updates.family import Moments, family_of
from entropy_pl.updates.split import NextSplitter, check_gradient, update_of
from entropy_pl.updates.steps import Stepping, inner_optimizer, was_skipped, watch_steps
from entropy_pl.updates.vector import UpdateVector


class UpdateRecorder:
    """Reads one optimizer step as an :class:`UpdateVector`, whatever optimizer, clipping or schedule made it.

    Call :meth:`snapshot` before the step and :meth:`read` after it, before gradients are cleared and before a
    scheduler moves the learning rate; :func:`record_update` does both. Then :meth:`step_with` tells the step that
    another gradient would have made.

    Args:
        model: whose parameters are watched, under their ``named_parameters`` names.
        optimizer: anything with ``step()`` and ``param_groups``, or a wrapper with such a thing in its ``.optimizer``.
            Watched are its parameters that belong to the model and require a gradient.
        watches: which of them instead of those that require a gradient now.

    Raises:
        TypeError: if there is no ``step()`` or no ``param_groups``.
        ValueError: if the optimizer holds no trainable parameter of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Stepping,
        watches: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
    ) -> None:
        self._model = model
        self._optimizer = inner_optimizer(optimizer)
        held = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        self._parameters = {n: p for n, p in model.named_parameters() if id(p) in held and watches(p)}
        if not self._parameters:
            raise ValueError(
                f"expected {type(self._optimizer).__name__} to hold trainable parameters of {type(model).__name__}, "
                "got none: pass the parameters with requires_grad=True to the optimizer, of this very model object"
            )
        self._before: dict[str, Tensor] | None = None
        self._family = family_of(self._optimizer)
        self._moments: Mapping[str, Moments] = {}
        self._all_moments = False
        self._no_split: str | None = None
        self._next_splits: Mapping[str, NextSplitter] = {}
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

    def snapshot(self, moments: bool = False) -> None:
        """Keep a copy of θ, and what is needed to split the step: 8-bit moments, and who had a momentum buffer.

        Args:
            moments: keep copies of all moments of the parameters watched, for :meth:`step_with`. An optimizer whose
                step cannot be split has none to keep.
        """
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._moments = self._family.keep(self._optimizer, self._names(), moments)
        self._all_moments = moments
        self._next_splits = {}
        self._update = None

    def bytes(self) -> int:
        """Bytes of the snapshot: θ and the moments kept, in their own dtypes. 0 without a snapshot."""
        theta = sum(value.nbytes for value in (self._before or {}).values())
        return theta + sum(moments.bytes() for moments in self._moments.values())

    def read(self, keep: bool = True) -> UpdateVector:
        """Take Δθ/lr_ref in float64, and the components where the optimizer is of Adam's family or torch's SGD.

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
        change = Change(before, after, {n: tensor._version for n, tensor in after.items()}, lr if moved else None)
        family, optimizer = self._family, self._optimizer
        self._no_split = family.why_no_split(optimizer, names)
        absent = self._no_split if moved else "the step moved no parameter"
        splits = None if absent else Splits(before, family.splits(optimizer, names, lr, self._moments, before))
        if self._all_moments and lr > 0 and not self._no_split:
            # Now: a scheduler may move the learning rate.
            self._next_splits = family.next_splits(optimizer, names, lr, self._moments)
        self._update = (kept_update if keep else lazy_update)(change, splits, lr, absent)
        return self._update

    @torch.no_grad()
    def step_with(self, gradients: Mapping[str, Tensor | None], *, momentum: bool = True) -> UpdateVector:
        """The update that the optimizer would have made with other gradients, from θ and the moments of before.

        At the hyper-parameters and learning rates of the step read last, in float64; optimizer and model are not
        touched. After :meth:`read`, until the next :meth:`snapshot` or :meth:`forget`; also of a step that was left
        out, as a gradient scaler does. The gradients of the step itself give back the update recorded, but for the
        rounding of θ and what a wrapper of the optimizer did besides.

        Args:
            gradients: parameter name → g of θ's shape, as the optimizer would see it: summed, unscaled, clipped
                (:func:`~entropy_pl.updates.rebuild.clip_gradients`). A parameter that is not among them, or with None,
                has no gradient and does not move.
            momentum: False for the same step without memory of direction: β₁ = 0 (the second moment and its bias
                correction stay as they are), of SGD a momentum of 0.

        Returns:
            With components and preconditioner, held, on the devices of θ; ``direction`` is the sum of ``components``.

        Raises:
            RuntimeError: before :meth:`read`, or without ``snapshot(moments=True)``.
            ValueError: if the optimizer's step cannot be split, its learning rate was zero, a name is not that of a
                parameter watched, or a gradient is of another shape or not finite.
        """
        before, lr = self._snapshot(), self.update.lr
        if self._no_split:
            raise ValueError(f"expected an optimizer whose step can be taken apart, got another: {self._no_split}")
        if not self._all_moments:
            raise RuntimeError("the moments of before the step were not kept: call snapshot(moments=True)")
        if lr <= 0:
            raise ValueError(f"expected a step at a learning rate > 0, got {lr}: there is no step per unit of it")
        unknown = sorted(gradients.keys() - before.keys())
        if unknown:
            raise ValueError(
                f"expected gradients of parameters that the optimizer trains, got {unknown[:3]} ({len(unknown)} "
                "unknown): name them as model.named_parameters() does, and leave frozen ones out"
            )
        splits = {}
        for name, theta in before.items():
            gradient = gradients.get(name)
            if gradient is not None:
                check_gradient(name, gradient, theta)
                gradient = gradient.to(theta.device, torch.float64)
            splits[name] = self._next_splits[name](gradient, theta, momentum=momentum)
        return update_of(splits, lr)

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
        self._next_splits = {}

    def _snapshot(self) -> dict[str, Tensor]:
        if self._before is None:
            raise RuntimeError("no snapshot of the parameters: call snapshot() before optimizer.step()")
        return self._before

    def _names(self) -> dict[int, str]:
        return {id(parameter): name for name, parameter in self._parameters.items()}


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr")
    return 1.0 if rate is None else float(rate)


@contextmanager
def record_update(model: nn.Module, optimizer: Stepping, *, moments: bool = False) -> Iterator[UpdateRecorder]:
    """Record the optimizer step taken inside the block.

    The step is read the moment it ends, so that a scheduler or ``zero_grad`` in the same block does no harm. A block
    in which no step happened (a skipped one) records no movement.

    Args:
        model: the policy.
        optimizer: whose ``step()`` is called in the block, torch's or not; a wrapper of it serves as well
            (:func:`~entropy_pl.updates.steps.watch_steps`).
        moments: keep the moments of before the step too, for :meth:`UpdateRecorder.step_with`.

    Yields:
        The recorder, whose ``update`` is there when the block has ended.

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
    recorder.snapshot(moments)
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
