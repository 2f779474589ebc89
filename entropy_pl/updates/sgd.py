"""SGD's update, taken apart after the step into momentum, gradient and weight decay, as AdamW's is.

With g the gradient, negated under ``maximize``, and s = g + wd·θ, the step is −lr·s without momentum μ, and with it

    b_t = μ b_{t−1} + (1−τ) s,    −lr·b_t,  or  −lr·(s + μ b_t) under ``nesterov``

with dampening τ, and b_1 = s at the first step, without (torch.optim.SGD, as documented; Sutskever et al. 2013).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_pl.updates.split import NextSplitter, Split, Splitter, no_movement, watched


@dataclass(frozen=True)
class SGDSettings:
    """One parameter group's hyper-parameters, under torch's names."""

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    maximize: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> SGDSettings:
        """Read a group of an optimizer or of its state dict."""
        return cls(
            lr=float(group["lr"]),
            momentum=float(group["momentum"]),
            dampening=float(group["dampening"]),
            nesterov=bool(group["nesterov"]),
            weight_decay=float(group["weight_decay"]),
            maximize=bool(group.get("maximize")),
        )

    @property
    def sign(self) -> float:
        """Of the gradient: −1 under ``maximize``."""
        return -1.0 if self.maximize else 1.0

    @property
    def buffer_share(self) -> float:
        """How many times the buffer is in the step."""
        if not self.momentum:
            return 0.0
        return self.momentum if self.nesterov else 1.0

    def seen_share(self, *, first: bool) -> float:
        """How many times s is in the step, by itself and in the buffer."""
        alone = 1.0 if self.nesterov or not self.momentum else 0.0
        return alone + self.buffer_share * (1.0 if first else 1 - self.dampening)

    def seen(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """What the buffer averages: s = g + wd·θ."""
        return self.sign * gradient + self.weight_decay * theta

    def without_momentum(self) -> SGDSettings:
        """With μ = 0: a step along s alone."""
        return replace(self, momentum=0.0)


@dataclass(frozen=True, eq=False)
class MomentumBuffer:
    """That a parameter had a momentum buffer, and the buffer; None where only that is known."""

    values: Tensor | None

    def bytes(self) -> int:
        """Of the buffer."""
        return 0 if self.values is None else self.values.nbytes


def is_sgd(optimizer: object) -> bool:
    """Whether it is ``torch.optim.SGD`` or made of it; whether it steps as SGD does, the step must show."""
    return isinstance(optimizer, torch.optim.SGD)


def keep_buffers(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], *, values: bool = False
) -> dict[str, MomentumBuffer]:
    """Which parameters have a momentum buffer, by name, and with ``values`` a copy of it."""
    kept = {}
    for name, parameter, _ in watched(optimizer, names):
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            kept[name] = MomentumBuffer(buffer.clone() if values else None)
    return kept


def sgd_splits(
    optimizer: torch.optim.Optimizer,
    names: Mapping[int, str],
    lr_ref: float,
    kept: Mapping[str, MomentumBuffer],
    thetas: Mapping[str, Tensor],
) -> dict[str, Splitter]:
    """As :func:`~entropy_pl.updates.adamw.adam_splits`, for SGD.

    Args:
        optimizer: right after its step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.
        kept: :func:`keep_buffers` from before the step.
        thetas: θ before the step, by name.
    """
    overwritten = {id(group): _overwrote_gradients(optimizer, group, names, thetas) for group in optimizer.param_groups}
    splits: dict[str, Splitter] = {}
    for name, parameter, group in watched(optimizer, names):
        settings = SGDSettings.of(group)
        splits[name] = partial(
            _split_taken_step,
            settings,
            name in kept,
            optimizer.state.get(parameter, {}).get("momentum_buffer"),
            None if parameter.grad is None else parameter.grad.detach(),
            scale=settings.lr / lr_ref,
            overwritten=overwritten[id(group)],
        )
    return splits


def sgd_next_splits(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], lr_ref: float, kept: Mapping[str, MomentumBuffer]
) -> dict[str, NextSplitter]:
    """As :func:`~entropy_pl.updates.adamw.adam_next_splits`, for SGD.

    Args:
        optimizer: SGD.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.
        kept: :func:`keep_buffers` with values, from before the step.
    """
    splits: dict[str, NextSplitter] = {}
    for name, _, group in watched(optimizer, names):
        settings = SGDSettings.of(group)
        buffer = kept[name].values if name in kept else None
        splits[name] = partial(_split_next_step, settings, buffer, scale=settings.lr / lr_ref)
    return splits


def split_sgd_step(
    settings: SGDSettings, carried: Tensor | None, gradient: Tensor | None, theta: Tensor, scale: float
) -> Split:
    """One parameter's step per unit lr_ref, in its components.

    With k the share of the buffer in the step (μ under ``nesterov``, else 1) and c that of s = g + wd·θ, by itself and
    in the buffer (1−τ; 1 + μ(1−τ) under ``nesterov``; τ = 0 at the first step),

        v = −k μ b_{t−1} − c g − c wd·θ

    Decay of earlier steps is in b_{t−1}: momentum.

    Args:
        settings: of the parameter's group.
        carried: μ b_{t−1}; None where there was no buffer.
        gradient: as the optimizer saw it, dense. A parameter without gradient did not move: zeros.
        theta: θ before the step.
        scale: lr_g/lr_ref, with lr_g the group's learning rate.

    Returns:
        The components in the order of ``COMPONENTS`` and the preconditioner P = c · lr_g/lr_ref, −c · lr_g/lr_ref under
        ``maximize``, all float64 of θ's shape.
    """
    if gradient is None:
        return no_movement(theta)
    share = scale * settings.seen_share(first=carried is None)
    preconditioner = torch.full_like(theta, settings.sign * share, dtype=torch.float64)
    gradient_part = (gradient.double() * preconditioner).neg_()
    decay = theta.double() * -(share * settings.weight_decay)
    if carried is None or not settings.momentum:
        return [torch.zeros_like(preconditioner), gradient_part, decay], preconditioner
    return [carried.double() * -(scale * settings.buffer_share), gradient_part, decay], preconditioner


def _split_taken_step(
    settings: SGDSettings,
    had_buffer: bool,
    buffer: Tensor | None,
    gradient: Tensor | None,
    theta: Tensor,
    *,
    scale: float,
    overwritten: bool,
) -> Split:
    """From the buffer and the gradient as the step left them."""
    carried = None
    if gradient is not None:
        gradient = gradient.to_dense()  # an embedding's may be sparse
        if overwritten:
            assert buffer is not None
            gradient = gradient.double() - settings.momentum * buffer.double()
        if had_buffer and buffer is not None and settings.momentum:
            carried = buffer.to_dense().double()
            carried = carried - (1 - settings.dampening) * settings.seen(gradient.double(), theta.double())
    return split_sgd_step(settings, carried, gradient, theta, scale)


def _split_next_step(
    settings: SGDSettings,
    buffer: Tensor | None,
    gradient: Tensor | None,
    theta: Tensor,
    *,
    scale: float,
    momentum: bool,
) -> Split:
    """From the buffer before the step."""
    if not momentum:
        settings = settings.without_momentum()
    carried = None if buffer is None else settings.momentum * buffer.to_dense().to(theta.device, torch.float64)
    return split_sgd_step(settings, carried, gradient, theta, scale)


def _overwrote_gradients(
    optimizer: torch.optim.Optimizer,
    group: Mapping[str, Any],
    names: Mapping[int, str],
    thetas: Mapping[str, Tensor],
) -> bool:
    """Whether the step has left g + μ b_t in place of the gradients, as a kernel of torch's does.

    That is the foreach one, CUDA's default, under ``nesterov`` without decay and ``maximize``
    (torch 2.13: optim/sgd.py, _multi_tensor_sgd). What moved θ tells: Δθ/lr = −(h + x μ b_t), where h is what lies in
    the gradient's place, has x = 0 then and otherwise 1; x is taken over the whole group, by least squares. Other
    kernels are not asked: where θ's rounding is larger than the step, x is next to 0 for them too.
    """
    settings = SGDSettings.of(group)
    if not settings.nesterov or settings.weight_decay or settings.maximize or not settings.lr:
        return False
    on_cpu = all(parameter.device.type == "cpu" for parameter in group["params"])
    if group.get("fused") or not (group.get("foreach") or (group.get("foreach") is None and not on_cpu)):
        return False
    products, squares = 0.0, 0.0
    for parameter in group["params"]:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if id(parameter) not in names or parameter.grad is None or buffer is None:
            continue
        added = settings.momentum * buffer.to_dense().double()
        moved = (thetas[names[id(parameter)]].double() - parameter.detach().double()) / settings.lr
        products += float(((moved - parameter.grad.detach().to_dense().double()) * added).sum())
        squares += float(added.square().sum())
    return products < squares / 2
