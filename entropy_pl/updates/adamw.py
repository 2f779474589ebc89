"""AdamW's update, taken apart after the step into momentum, gradient and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entropy_pl.updates.vector import Direction

COMPONENTS = ("momentum", "gradient", "weight_decay")
# One parameter's components, in that order, and its preconditioner.
Split = tuple[list[Tensor], Tensor]


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


def is_adam_like(optimizer: object) -> bool:
    """Whether the step is Adam's or AdamW's, with moments kept in full precision."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def adam_components(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], names: Mapping[int, str], lr_ref: float
) -> tuple[dict[str, Direction], Direction]:
    """Split the step just taken, from the optimizer's state after it and the gradients still in place.

    Args:
        optimizer: Adam or AdamW, right after its step.
        before: parameter name → θ before the step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.

    Returns:
        As :func:`by_part`, over the parameters in ``names``.
    """
    splits: dict[str, Split] = {}
    for group in optimizer.param_groups:
        settings = AdamSettings.of(group, decoupled=isinstance(optimizer, torch.optim.AdamW))
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            state = optimizer.state.get(parameter)
            moments = AdamMoments.of(state) if state else None
            splits[name] = split_step(settings, moments, parameter.grad, before[name], settings.lr / lr_ref)
    return by_part(splits)


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
        float64 of θ's shape.
    """
    if gradient is None or moments is None:
        zero = torch.zeros_like(theta, dtype=torch.float64)
        return [zero] * len(COMPONENTS), zero
    gradient, theta = gradient.double(), theta.double()
    (beta1, beta2), step = settings.betas, moments.step
    second = moments.max_exp_avg_sq if settings.amsgrad else moments.exp_avg_sq
    assert second is not None, "amsgrad keeps max_exp_avg_sq"
    denominator = (second.double() / (1 - beta2**step)).sqrt() + settings.eps
    preconditioner = scale * (1 - beta1) / ((1 - beta1**step) * denominator)
    decay = settings.weight_decay * theta
    momentum = moments.exp_avg.double() / (1 - beta1) - settings.seen(gradient, theta)  # β₁ m_{t−1} / (1−β₁)
    weight_decay = -scale * decay if settings.decoupled_weight_decay else -preconditioner * decay
    return [-preconditioner * momentum, -preconditioner * (settings.sign * gradient), weight_decay], preconditioner


def by_part(splits: Mapping[str, Split]) -> tuple[dict[str, Direction], Direction]:
    """Gather the parameters' splits.

    Returns:
        ``{"momentum", "gradient", "weight_decay"}`` and the preconditioner, each by parameter name.
    """
    components = {part: {name: parts[i] for name, (parts, _) in splits.items()} for i, part in enumerate(COMPONENTS)}
    return components, {name: preconditioner for name, (_, preconditioner) in splits.items()}
