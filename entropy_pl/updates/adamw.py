"""AdamW's update, taken apart after the step into momentum, gradient and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from entropy_pl.updates.vector import Direction

COMPONENTS = ("momentum", "gradient", "weight_decay")


def is_adam_like(optimizer: object) -> bool:
    """Whether the step is Adam's or AdamW's, with moments kept in full precision."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def adam_components(
    optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], names: Mapping[int, str], lr_ref: float
) -> tuple[dict[str, Direction], Direction]:
    """Split the step just taken, from the optimizer's state after it and the gradients still in place.

    With g the gradient the optimizer saw, m_t, v_t its moments and D = √(v_t/(1−β₂ᵗ)) + ε,

        v = −[β₁ m_{t−1} + (1−β₁) g] / ((1−β₁ᵗ) D) − wd·θ        (Kingma & Ba 2015; Loshchilov & Hutter 2019)

    where β₁ m_{t−1} = m_t − (1−β₁) g, and a group of learning rate lr_g carries the factor lr_g/lr_ref. Under L2
    (not decoupled) decay, wd·θ of this step joins g inside the bracket and is reported as weight decay.

    Args:
        optimizer: Adam or AdamW, right after its step.
        before: parameter name → θ before the step.
        names: ``id(parameter)`` → name.
        lr_ref: the reference learning rate, > 0.

    Returns:
        ``{"momentum", "gradient", "weight_decay"}`` and the preconditioner P = (1−β₁)/((1−β₁ᵗ) D) · lr_g/lr_ref,
        all float64 by parameter name. Parameters without a gradient did not move and get zeros.
    """
    components: dict[str, Direction] = {part: {} for part in COMPONENTS}
    preconditioner: Direction = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                continue
            state = optimizer.state.get(parameter)
            if parameter.grad is None or not state:
                p = torch.zeros_like(parameter, dtype=torch.float64)
                parts = [p] * len(COMPONENTS)
            else:
                decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
                parts, p = _split(group, state, parameter.grad.double(), before[name].double(), lr_ref, decoupled)
            for part, value in zip(COMPONENTS, parts, strict=True):
                components[part][name] = value
            preconditioner[name] = p
    return components, preconditioner


def _split(
    group: dict[str, Any], state: dict[str, Any], gradient: Tensor, theta: Tensor, lr_ref: float, decoupled: bool
) -> tuple[list[Tensor], Tensor]:
    beta1, beta2 = (float(beta) for beta in group["betas"])
    step = float(state["step"])
    if group.get("maximize"):
        gradient = -gradient
    second = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    denominator = (second.double() / (1 - beta2**step)).sqrt() + group["eps"]
    scale = float(group["lr"]) / lr_ref
    preconditioner = scale * (1 - beta1) / ((1 - beta1**step) * denominator)
    decay = group["weight_decay"] * theta
    seen = gradient if decoupled else gradient + decay
    momentum = state["exp_avg"].double() / (1 - beta1) - seen  # β₁ m_{t−1} / (1−β₁)
    weight_decay = -scale * decay if decoupled else -preconditioner * decay
    return [-preconditioner * momentum, -preconditioner * gradient, weight_decay], preconditioner
