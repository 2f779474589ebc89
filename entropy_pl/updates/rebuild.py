"""The step that Adam would take from a saved state and a fresh gradient, computed rather than taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from entropy_pl.updates.adamw import AdamSettings, split_next_step
from entropy_pl.updates.optimizer_state import MatchedState
from entropy_pl.updates.split import check_gradient, update_of
from entropy_pl.updates.vector import UpdateVector


@torch.no_grad()
def rebuild_update(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor | None],
    state: MatchedState,
    *,
    lr: float | None = None,
) -> UpdateVector:
    """Compute v = Δθ/lr_ref of the next Adam or AdamW step and its components, in float64; nothing is changed.

    The moments take the gradient in as torch's step would (:func:`~entropy_pl.updates.adamw.next_moments`), and the
    step follows from them as in :func:`~entropy_pl.updates.adamw.split_step`.

    Args:
        parameters: parameter name → θ.
        gradients: parameter name → g of θ's shape, as the optimizer would see it: averaged, unscaled, clipped
            (:func:`~entropy_pl.updates.clipping.clip_gradients`). None: the parameter does not move, its momentum and
            decay neither, as in torch.
        state: the moments before the step (:func:`~entropy_pl.updates.optimizer_state.match_optimizer_state`).
        lr: lr_ref of the step, > 0; None for the largest learning rate saved. The groups keep their proportions: those
            of their learning rates or, if these are all zero (the end of a schedule), of their initial ones.

    Returns:
        On the parameters' devices; ``direction`` is the sum of ``components`` to the last bit.

    Raises:
        ValueError: if parameters, gradients and state are not of the same names and shapes, a gradient is not finite,
            or there is no learning rate.
    """
    _check(parameters, gradients, state)
    lr_ref, scales = _learning_rates([group.settings for group in state.groups], lr)
    splits = {}
    for group, scale in zip(state.groups, scales, strict=True):
        for name, moments in group.moments.items():
            theta, gradient = parameters[name].detach(), gradients[name]
            if gradient is not None:
                gradient = gradient.to(theta.device, torch.float64)
            splits[name] = split_next_step(group.settings, moments, gradient, theta, scale)
    return update_of({name: splits[name] for name in parameters}, lr_ref)


@torch.no_grad()
def _check(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], state: MatchedState) -> None:
    for what, names in (("gradients", gradients.keys()), ("the optimizer state", state.names())):
        if names != parameters.keys():
            missing, extra = sorted(parameters.keys() - names), sorted(names - parameters.keys())
            raise ValueError(
                f"expected {what} of the same {len(parameters)} parameters, got {len(missing)} missing "
                f"{missing[:3]} and {len(extra)} others {extra[:3]}: take all three from one model (None is the "
                "gradient of a parameter that had none)"
            )
    for name, gradient in gradients.items():
        if gradient is not None:
            check_gradient(name, gradient, parameters[name])


def _learning_rates(groups: Sequence[AdamSettings], lr: float | None) -> tuple[float, list[float]]:
    """lr_ref, and lr_g/lr_ref of every group."""
    if lr is not None and not lr > 0:
        raise ValueError(f"expected lr > 0, got {lr}: give None for the learning rate saved")
    rates = [group.lr for group in groups]
    largest = max(rates, default=0.0)
    if largest > 0:
        return lr or largest, [rate / largest for rate in rates]
    if lr is None:
        raise ValueError(
            f"expected a learning rate > 0 in the saved state, got {sorted(set(rates))} (the end of a schedule?): "
            "give lr, the learning rate of the step to rebuild"
        )
    initial = [group.initial_lr or 0.0 for group in groups]
    largest = max(initial, default=0.0)
    return lr, [rate / largest if largest > 0 else 1.0 for rate in initial]
