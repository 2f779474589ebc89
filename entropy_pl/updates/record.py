"""The update read off the real optimizer: θ before, θ after, and the learning rate that lay between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from entropy_pl.updates.adamw import adam_components, is_adam_like
from entropy_pl.updates.displace import parameters_set_to
from entropy_pl.updates.vector import Direction, UpdateVector


class UpdateRecorder:
    """Reads one optimizer step as an :class:`UpdateVector`, whatever optimizer, clipping or schedule made it.

    Call :meth:`snapshot` before the step and :meth:`read` after it, before gradients are cleared and before a
    scheduler moves the learning rate; :func:`record_update` does both.

    Args:
        model: whose parameters are watched, under their ``named_parameters`` names.
        optimizer: watched are its parameters that belong to the model and require a gradient.

    Raises:
        ValueError: if the optimizer holds no trainable parameter of the model.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) in held}
        if not self._parameters:
            raise ValueError(
                f"expected {type(optimizer).__name__} to hold trainable parameters of {type(model).__name__}, got "
                "none: pass the parameters with requires_grad=True to the optimizer, of this very model object"
            )
        self._before: Direction | None = None
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
        """Keep a copy of θ."""
        self._before = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        self._update = None

    def read(self) -> UpdateVector:
        """Take Δθ/lr_ref in float64, and the components where the optimizer is Adam-like.

        No movement (a skipped step, a learning rate of zero) gives a direction of zeros.

        Raises:
            RuntimeError: without a snapshot.
        """
        before = self._snapshot()
        names = {id(parameter): name for name, parameter in self._parameters.items()}
        lr = max(
            float(group.get("lr", 1.0))
            for group in self._optimizer.param_groups
            if any(id(parameter) in names for parameter in group["params"])
        )
        change = {n: p.detach().double() - before[n].double() for n, p in self._parameters.items()}
        moved = any(bool(delta.any()) for delta in change.values())
        if moved and lr <= 0:
            raise ValueError(f"expected a learning rate > 0 behind a step that moved the parameters, got {lr}")
        direction = {name: delta / lr for name, delta in change.items()} if moved else change
        components = preconditioner = None
        if moved and is_adam_like(self._optimizer):
            components, preconditioner = adam_components(self._optimizer, before, names, lr)
        self._update = UpdateVector(direction, lr, components, preconditioner)
        return self._update

    def at_theta_before(self) -> AbstractContextManager[None]:
        """The model as it was before the step, for as long as the context lasts."""
        return parameters_set_to(self._model, self._snapshot())

    def forget(self) -> None:
        """Free the snapshot."""
        self._before = None

    def _snapshot(self) -> dict[str, Tensor]:
        if self._before is None:
            raise RuntimeError("no snapshot of the parameters: call snapshot() before optimizer.step()")
        return self._before


@contextmanager
def record_update(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[UpdateRecorder]:
    """Record the optimizer step taken inside the block.

    The step is read the moment it ends, so that a scheduler or ``zero_grad`` in the same block does no harm. A block
    in which no step happened (a skipped one) records no movement.

    Args:
        model: the policy.
        optimizer: whose ``step()`` is called in the block.

    Raises:
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

    def after_step(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps > 1:
            raise RuntimeError("expected one optimizer.step() inside record_update, got a second: record each apart")
        recorder.read()

    handle = optimizer.register_step_post_hook(after_step)
    try:
        yield recorder
    finally:
        handle.remove()
    if not steps:
        recorder.read()
