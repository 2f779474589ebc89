"""AdamW's update, taken apart after the step into momentum, gradient and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_pl.updates.split import NextSplitter, Split, Splitter, no_movement, watched


@dataclass(frozen=True)
class AdamSettings:
    """One parameter group's hyper-parameters, under torch's names.

    Args:
        initial_lr: the learning rate a scheduler started from; None where there is none.
    """

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    amsgrad: bool
    maximize: bool
    decoupled_weight_decay: bool
    initial_lr: float | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], *, decoupled: bool) -> AdamSettings:
        """Read a group of an optimizer or of its state dict; ``decoupled`` where it does not say (torch < 2.7)."""
        beta1, beta2 = (float(beta) for beta in group["betas"])
        initial_lr = group.get("initial_lr")
        return cls(
            lr=float(group["lr"]),
            betas=(beta1, beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            amsgrad=bool(group.get("amsgrad")),
            maximize=bool(group.get("maximize")),
            decoupled_weight_decay=bool(group.get("decoupled_weight_decay", decoupled)),
            initial_lr=None if initial_lr is None else float(initial_lr),
        )

    @property
    def sign(self) -> float:
        """Of the gradient: −1 under ``maximize``."""
        return -1.0 if self.maximize else 1.0

    def seen(self, gradient: Tensor, theta: Tensor) -> Tensor:
        """What the moments average: g, and with it wd·θ where decay is L2."""
        gradient = self.sign * gradient
        return gradient if self.decoupled_weight_decay else gradient + self.weight_decay * theta

    def without_momentum(self) -> AdamSettings:
        """With β₁ = 0: a step along the gradient alone, sized by the second moment as before."""
        return replace(self, betas=(0.0, self.betas[1]))


@dataclass(frozen=True, eq=False)
class AdamMoments:
    """One parameter's state after ``step`` steps, under torch's names; ``max_exp_avg_sq`` under ``amsgrad`` only."""

    step: float
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> AdamMoments:
        """Read one parameter's entry in an optimizer's state; ``step`` may be a number or a tensor."""
        return cls(float(state["step"]), state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq"))

    def copy(self) -> AdamMoments:
        """Of the tensors."""
        largest = self.max_exp_avg_sq
        return AdamMoments(
            self.step, self.exp_avg.clone(), self.exp_avg_sq.clone(), None if largest is None else largest.clone()
        )

    def values(self, device: torch.device) -> AdamMoments:
        """On that device."""
        largest = self.max_exp_avg_sq
        return AdamMoments(
            self.step,
            self.exp_avg.to(device),
            self.exp_avg_sq.to(device),
            None if largest is None else largest.to(device),
        )

    def bytes(self) -> int:
        """Of the tensors."""
        largest = self.max_exp_avg_sq
        return self.exp_avg.nbytes + self.exp_avg_sq.nbytes + (0 if largest is None else largest.nbytes)


def is_adam_like(optimizer: object) -> bool:
    """Whether it is torch's Adam or AdamW or made of them; whether it steps as they do, the step must show."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def adam_splits(optimizer: torch.optim.Optimizer, names: Mapping[int, str], lr_ref: float) -> dict[str, Splitter]:
    """How to split the step just taken, from the optimizer's state after it and the gradients still in place.

    The splitters refer to state and gradients and copy nothing: they hold until the optimizer steps again or zeroes
    its gradients in place.

    Args:
        optimizer: Adam or AdamW, right after its step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.

    Returns:
        By name, over the parameters in ``names``, in the optimizer's order.
    """
    splits: dict[str, Splitter] = {}
    for name, parameter, group in watched(optimizer, names):
        settings = _settings(optimizer, group)
        state = optimizer.state.get(parameter)
        moments = AdamMoments.of(state) if state else None
        gradient = None if parameter.grad is None else parameter.grad.detach()
        splits[name] = partial(split_step, settings, moments, gradient, scale=settings.lr / lr_ref)
    return splits


def keep_moments(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, AdamMoments]:
    """Copies of the moments by parameter name, of those that have some."""
    return {
        name: AdamMoments.of(state).copy()
        for name, parameter, _ in watched(optimizer, names)
        if (state := optimizer.state.get(parameter))
    }


def adam_next_splits(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], lr_ref: float, kept: Mapping[str, AdamMoments]
) -> dict[str, NextSplitter]:
    """How another gradient's step would split, at the hyper-parameters of now.

    Args:
        optimizer: Adam or AdamW.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.
        kept: :func:`keep_moments` from before the step.
    """
    splits: dict[str, NextSplitter] = {}
    for name, _, group in watched(optimizer, names):
        settings = _settings(optimizer, group)
        splits[name] = partial(split_next_step, settings, kept.get(name), scale=settings.lr / lr_ref)
    return splits


def _settings(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> AdamSettings:
    return AdamSettings.of(group, decoupled=isinstance(optimizer, torch.optim.AdamW))


def next_moments(settings: AdamSettings, moments: AdamMoments | None, gradient: Tensor, theta: Tensor) -> AdamMoments:
    """Adam's moments after one more gradient, in float64.

        m_t = β₁ m_{t−1} + (1−β₁) g,    v_t = β₂ v_{t−1} + (1−β₂) g²        (Kingma & Ba 2015)

    Args:
        settings: of the parameter's group.
        moments: before the step; None before the first.
        gradient: as the optimizer sees it, of θ's shape.
        theta: θ before the step.
    """
    seen = settings.seen(gradient.double(), theta.double())
    if moments is None:
        zero = torch.zeros_like(seen)
        moments = AdamMoments(0.0, zero, zero, zero)
    beta1, beta2 = settings.betas
    first = beta1 * moments.exp_avg.to(seen) + (1 - beta1) * seen
    second = beta2 * moments.exp_avg_sq.to(seen) + (1 - beta2) * seen.square()
    largest = None
    if settings.amsgrad:
        assert moments.max_exp_avg_sq is not None, "amsgrad keeps max_exp_avg_sq"
        largest = torch.maximum(moments.max_exp_avg_sq.to(seen), second)
    return AdamMoments(moments.step + 1, first, second, largest)


def split_step(
    settings: AdamSettings, moments: AdamMoments | None, gradient: Tensor | None, theta: Tensor, scale: float
) -> Split:
    """One parameter's step per unit lr_ref, in its components.

    With g the gradient the optimizer saw, m_t, v_t its moments and D = √(v_t/(1−β₂ᵗ)) + ε,

        v = −[β₁ m_{t−1} + (1−β₁) g] / ((1−β₁ᵗ) D) − wd·θ        (Kingma & Ba 2015; Loshchilov & Hutter 2019)

    where β₁ m_{t−1} = m_t − (1−β₁) g. Under L2 (not decoupled) decay, wd·θ of this step joins g inside the bracket and
    is reported as weight decay.

    Args:
        settings: of the parameter's group.
        moments: after the step.
        gradient: as the optimizer saw it. A parameter without gradient, or without moments, did not move: zeros.
        theta: θ before the step.
        scale: lr_g/lr_ref, with lr_g the group's learning rate.

    Returns:
        The components in the order of ``COMPONENTS`` and the preconditioner P = (1−β₁)/((1−β₁ᵗ) D) · lr_g/lr_ref, all
        float64 of θ's shape. Under ``maximize`` P is negative: the gradient component is −P∘g there too.
    """
    if gradient is None or moments is None:
        return no_movement(theta)
    gradient, theta = gradient.double(), theta.double()
    (beta1, beta2), step = settings.betas, moments.step
    second = moments.max_exp_avg_sq if settings.amsgrad else moments.exp_avg_sq
    assert second is not None, "amsgrad keeps max_exp_avg_sq"
    # In place, on tensors of its own: of a large parameter every float64 copy counts.
    denominator = (second.double() / (1 - beta2**step)).sqrt_().add_(settings.eps)
    preconditioner = scale * (1 - beta1) / denominator.mul_(1 - beta1**step)
    del denominator, second
    momentum = moments.exp_avg.double() / (1 - beta1)
    momentum -= settings.seen(gradient, theta)  # β₁ m_{t−1} / (1−β₁)
    momentum.mul_(preconditioner).neg_()
    decay = settings.weight_decay * theta
    del theta
    decay = decay.mul_(-scale) if settings.decoupled_weight_decay else decay.mul_(preconditioner).neg_()
    preconditioner.mul_(settings.sign)  # now that momentum and decay have it without
    return [momentum, (gradient * preconditioner).neg_(), decay], preconditioner


def split_next_step(
    settings: AdamSettings,
    moments: AdamMoments | None,
    gradient: Tensor | None,
    theta: Tensor,
    scale: float,
    *,
    momentum: bool = True,
) -> Split:
    """As :func:`split_step`, of a step not taken: from the moments before it.

    Args:
        settings: of the parameter's group.
        moments: before the step; None before the first.
        gradient: as the optimizer would see it; None: the parameter does not move.
        theta: θ before the step.
        scale: lr_g/lr_ref.
        momentum: False for the step at β₁ = 0, from the same second moment.
    """
    if gradient is None:
        return no_movement(theta)
    if not momentum:
        settings = settings.without_momentum()
    return split_step(settings, next_moments(settings, moments, gradient, theta), gradient, theta, scale)
