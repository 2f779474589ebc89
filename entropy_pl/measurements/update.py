"""Where v comes from offline: an optimizer's state and a fresh gradient, or two checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.groups import Groups
from entropy_pl.measurements.settings import MeasurementSettings, PrecisionSettings, UpdateVectorPrecision
from entropy_pl.policy import evaluation, evaluation_mode, float64_evaluation, trainable_parameters
from entropy_pl.policy.precision import chosen_matmul
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch
from entropy_pl.updates import UpdateVector, clip_gradients, match_optimizer_state, rebuild_update

LOSS_SCALE = 2.0**16  # where torch's GradScaler starts


@dataclass(frozen=True, eq=False)
class MeasuredUpdate:
    """An update, and what there is to say of how it was made.

    Args:
        vector: v.
        facts: JSON-able: ``source`` is ``"optimizer"`` or ``"pair"``; of an optimizer ``matched_by``, ``step`` (taken
            before this one), ``gradient_norm`` (before clipping) and ``gradient_scale`` (what clipping left of it), and
            of the U-batch ``reward``, ``zero_advantage_fraction``, ``n_sequences`` and ``n_tokens``; and in
            ``differs_from_training`` what the checkpoint tells of other settings.
    """

    vector: UpdateVector
    facts: dict[str, Any]


def update_from_optimizer(
    model: nn.Module, saved: Mapping[str, Any], groups: Groups, settings: MeasurementSettings
) -> MeasuredUpdate:
    """The step that training would take next, from the optimizer's saved moments and the gradient of a fresh U-batch.

    The model is in eval mode for it: dropout, where training has any, is left out.

    Raises:
        ValueError: if the state does not belong to the model or is not Adam's, no group of the U-batch has an
            advantage, or the gradient is not finite.
    """
    parameters = trainable_parameters(model)
    state = match_optimizer_state(saved, parameters, decoupled=settings.update.decoupled_weight_decay)
    gradients, norm, scale = clip_gradients(u_gradient(model, groups, settings), settings.update.max_grad_norm)
    vector = rebuild_update(parameters, gradients, state, lr=settings.update.lr)
    steps = [moments.step for group in state.groups for moments in group.moments.values() if moments is not None]
    facts = {
        "source": "optimizer",
        "matched_by": state.matched_by,
        "step": int(max(steps, default=0)),
        "gradient_norm": norm,
        "gradient_scale": scale,
        "reward": float(groups.rewards.mean()),
        "zero_advantage_fraction": float(groups.zero_advantage.double().mean()),
        "n_sequences": len(groups.rollout),
        "n_tokens": int(groups.rollout.completion_mask.sum()),
    }
    return MeasuredUpdate(vector, facts)


def update_from_pair(model: nn.Module, after: Mapping[str, Tensor], lr: float | None) -> MeasuredUpdate:
    """V = (θ′ − θ)/lr, lr = 1 unless told: then η = 1 is the whole way, be it one step or a thousand.

    Args:
        model: at θ.
        after: θ′ by parameter name; parameters it does not name stay.
        lr: learning rate to divide by.
    """
    parameters = dict(model.named_parameters())
    lr = 1.0 if lr is None else lr
    direction = {}
    for name, value in after.items():
        theta = parameters[name].detach()
        direction[name] = (value.to(theta.device, torch.float64) - theta.double()) / lr
    return MeasuredUpdate(UpdateVector(direction, lr), {"source": "pair"})


def u_gradient(model: nn.Module, groups: Groups, settings: MeasurementSettings) -> dict[str, Tensor | None]:
    """The gradient of the U-batch's loss by parameter name, not clipped; None where a parameter has no part in it.

    Raises:
        ValueError: if all rewards within every group are equal.
    """
    double = settings.precision.runtime_dtype == "float64"
    objective = PolicyGradient(
        settings.update.loss(settings.generation.max_new_tokens),
        settings.update.advantage,
        settings.generation.temperature,
        settings.generation.max_batch_tokens,
        dtype=torch.float64 if double else torch.float32,
    )
    with _gradient_precision(model, settings.precision):
        batch = objective.batch(model, groups)
        if batch is None:
            raise ValueError(
                f"expected groups with different rewards in the U-batch, got none out of {settings.batch_config.B_U}: "
                "there is no gradient to rebuild a step from. Raise B_U or G, or look at the rewards"
            )
        return _scaled_gradient(model, objective, batch, settings.precision.update_vector)


def _scaled_gradient(
    model: nn.Module, objective: PolicyGradient, batch: TrainingBatch, precision: UpdateVectorPrecision
) -> dict[str, Tensor | None]:
    """The gradient, its loss scaled up where float16 would lose the small of it, as a gradient scaler does."""
    scale = LOSS_SCALE if precision.use_amp and precision.amp_dtype == "float16" else 1.0
    parameters = trainable_parameters(model)  # in here, where they may be wider ones
    try:
        while True:
            model.zero_grad()
            objective.backward(model, batch, call_backward=partial(_backward_scaled, scale))
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            if scale == 1 or all(gradient is None or gradient.isfinite().all() for gradient in gradients.values()):
                return {name: None if g is None else g / scale for name, g in gradients.items()}
            scale /= 2
    finally:
        model.zero_grad()


def _backward_scaled(scale: float, loss: Tensor) -> None:
    (loss * scale).backward()


@contextmanager
def _own_dtypes(model: nn.Module) -> Iterator[None]:
    with evaluation_mode(model), chosen_matmul():
        yield


@contextmanager
def _gradient_precision(model: nn.Module, precision: PrecisionSettings) -> Iterator[None]:
    chosen = precision.update_vector
    if precision.runtime_dtype == "float64":
        context = float64_evaluation(model)
    else:
        context = evaluation(model) if chosen.grads_fp32 else _own_dtypes(model)
    device = next(model.parameters()).device.type
    with context, torch.autocast(device, dtype=getattr(torch, chosen.amp_dtype), enabled=chosen.use_amp):
        yield
