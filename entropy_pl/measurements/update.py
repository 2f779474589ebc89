"""Where v comes from offline: an optimizer's state and a fresh gradient, or two checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution import UpdateBatch, counterfactual_update
from entropy_pl.attribution.counterfactual import StepWith
from entropy_pl.groups import Groups
from entropy_pl.measurements.settings import MeasurementSettings, PrecisionSettings, UpdateVectorPrecision
from entropy_pl.policy import (
    derived_seed,
    evaluation,
    evaluation_mode,
    float64_evaluation,
    isolated_rng,
    trainable_parameters,
)
from entropy_pl.policy.precision import chosen_matmul
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch
from entropy_pl.updates import UpdateVector, clip_gradients, match_optimizer_state, rebuild_update
from entropy_pl.updates.optimizer_state import MatchedState

OF_A_PAIR = "the difference of two checkpoints has no U-batch: measure one checkpoint with its optimizer's state"
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
        batch: the U-batch behind it; None of a pair.
        step_with: from other gradients to the step from the same state; None of a pair.
    """

    vector: UpdateVector
    facts: dict[str, Any]
    batch: UpdateBatch | None = None
    step_with: StepWith | None = None


@dataclass(frozen=True, eq=False)
class UGradient:
    """The loss of a U-batch, differentiated.

    Args:
        gradients: by parameter name, not clipped; None where a parameter has no part in the loss.
        objective: the loss.
        batch: what it was taken of.
        logp: log-probs at θ in nats, ``[N, T]``.
    """

    gradients: dict[str, Tensor | None]
    objective: PolicyGradient
    batch: TrainingBatch
    logp: Tensor

    def update_batch(self, gradient_scale: float, max_grad_norm: float | None) -> UpdateBatch:
        """What attribution and other losses need of it; the arguments are what clipping did, and was told."""
        return UpdateBatch.of_step(
            self.objective,
            self.batch,
            self.logp,
            gradient_scale=gradient_scale,
            max_grad_norm=max_grad_norm,
        )


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
    limit = settings.update.max_grad_norm
    found = u_gradient(model, groups, settings)
    gradients, norm, scale = clip_gradients(found.gradients, limit)
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
    without_part = {name for name, gradient in gradients.items() if gradient is None}

    def step_with(gradients: Mapping[str, Tensor], *, momentum: bool = True) -> UpdateVector:
        # What has no part in the loss may have zeros here, which would let its momentum move it.
        seen = {name: None if name in without_part else gradients[name] for name in parameters}
        return rebuild_update(parameters, seen, state if momentum else _forgetful(state), lr=settings.update.lr)

    return MeasuredUpdate(vector, facts, found.update_batch(scale, limit), step_with)


def _forgetful(state: MatchedState) -> MatchedState:
    """With β₁ = 0."""
    groups = (replace(group, settings=group.settings.without_momentum()) for group in state.groups)
    return replace(state, groups=tuple(groups))


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


def u_gradient(model: nn.Module, groups: Groups, settings: MeasurementSettings) -> UGradient:
    """The gradient of the U-batch's loss, and what it is made of.

    Raises:
        ValueError: if all rewards within every group are equal, and the loss has no other term.
    """
    double = settings.precision.runtime_dtype == "float64"
    objective = PolicyGradient(
        settings.update.loss(settings.generation.max_new_tokens),
        settings.update.advantage,
        max_batch_tokens=settings.generation.max_batch_tokens,
        dtype=torch.float64 if double else torch.float32,
    )
    with gradient_precision(model, settings.precision):
        with same_choice_of_tokens(settings):
            batch = objective.batch(model, groups)
        if batch is None:
            raise ValueError(
                f"expected groups with different rewards in the U-batch, got none out of {settings.batch_config.B_U}: "
                "there is no gradient to rebuild a step from. Raise B_U or G, or look at the rewards"
            )
        gradients, logp = _scaled_gradient(model, objective, batch, settings.precision.update_vector)
    return UGradient(gradients, objective, batch, logp)


def same_choice_of_tokens(settings: MeasurementSettings) -> AbstractContextManager[None]:
    """The random stream that Clip-Cov chooses tokens by: the same whenever it is asked for."""
    return isolated_rng(derived_seed(settings.seed, "choice of tokens"))


def _scaled_gradient(
    model: nn.Module, objective: PolicyGradient, batch: TrainingBatch, precision: UpdateVectorPrecision
) -> tuple[dict[str, Tensor | None], Tensor]:
    """The gradient, and log-probs at θ; the loss is scaled up where float16 would lose the small of its gradient."""
    scale = LOSS_SCALE if precision.use_amp and precision.amp_dtype == "float16" else 1.0
    parameters = trainable_parameters(model)  # in here, where they may be wider ones
    try:
        while True:
            model.zero_grad()
            logp = objective.backward(model, batch, call_backward=partial(_backward_scaled, scale))
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            if scale == 1 or all(gradient is None or gradient.isfinite().all() for gradient in gradients.values()):
                return {name: None if g is None else g / scale for name, g in gradients.items()}, logp
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
def gradient_precision(model: nn.Module, precision: PrecisionSettings) -> Iterator[None]:
    """The mode and number formats that U's gradient is taken in."""
    chosen = precision.update_vector
    if precision.runtime_dtype == "float64":
        context = float64_evaluation(model)
    else:
        context = evaluation(model) if chosen.grads_fp32 else _own_dtypes(model)
    device = next(model.parameters()).device.type
    with context, torch.autocast(device, dtype=getattr(torch, chosen.amp_dtype), enabled=chosen.use_amp):
        yield


def counterfactual_of(
    model: nn.Module, update: MeasuredUpdate, settings: MeasurementSettings, absent: dict[str, str]
) -> Callable[[str], UpdateVector] | None:
    """Return what makes the update of another loss from the same U-batch and optimizer state.

    Args:
        model: the policy.
        update: v, with the U-batch behind it.
        settings: of the measurement.
        absent: is told why there can be none, where the settings ask for some, and for an attribution.

    Returns:
        From a loss's name to its update, made as this step's own gradient was made; None of a pair of checkpoints.
    """
    batch, step_with = update.batch, update.step_with
    if batch is None or step_with is None:
        asked = {"attribution": settings.attribution.enabled, "counterfactuals": settings.attribution.counterfactuals}
        absent.update({name: OF_A_PAIR for name, wanted in asked.items() if wanted})
        return None
    assert batch.policy_gradient is not None
    precision, dtype = _without_float16(settings.precision), batch.policy_gradient.dtype

    def make(name: str) -> UpdateVector:
        with gradient_precision(model, precision), same_choice_of_tokens(settings):
            return counterfactual_update(model, batch, name, step_with, dtype=dtype)

    return make


def _without_float16(precision: PrecisionSettings) -> PrecisionSettings:
    """Float32 in its place: without a scaled loss, which these gradients are not of, the small of them is lost."""
    chosen = precision.update_vector
    if not chosen.use_amp or chosen.amp_dtype != "float16":
        return precision
    return replace(precision, update_vector=replace(chosen, use_amp=False))
