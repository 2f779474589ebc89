"""What another loss would have done at one step: its gradient on the same U-batch, put through the same optimizer.

From θ and the optimizer's moments of before the step, so that only the loss (or β₁) differs. Training is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from entropy_pl.attribution.batch import UpdateBatch
from entropy_pl.objectives import WITHOUT_MOMENTUM, intervened
from entropy_pl.policy_gradient import PolicyGradient
from entropy_pl.updates.clipping import clip_factor
from entropy_pl.updates.vector import UpdateVector


class StepWith(Protocol):
    """:meth:`entropy_pl.updates.UpdateRecorder.step_with`."""

    def __call__(self, gradients: Mapping[str, Tensor], *, momentum: bool = True) -> UpdateVector:
        """From gradients as the optimizer sees them to the update it would have made."""


def counterfactual_update(
    model: nn.Module, batch: UpdateBatch, name: str, step_with: StepWith, *, dtype: torch.dtype
) -> UpdateVector:
    """The update of another loss: a backward pass over U.

    The gradient is of the mode and precision that the caller chose; that of the run may have had dropout or autocast.
    ``unchanged``, the run's own loss, shows by how much that matters. Clip-Cov draws from the global torch stream.

    Args:
        model: the policy at the θ of before the step.
        batch: the U-batch, with advantages, weights and loss.
        name: of :data:`entropy_pl.objectives.INTERVENTIONS`, ``no_momentum`` or ``unchanged``.
        step_with: the optimizer's step from the moments of before.
        dtype: of softmax and loss.

    Raises:
        ValueError: for an unknown name, or a U-batch that lacks what a loss is made of.
    """
    if batch.policy_gradient is None or batch.advantages is None or batch.weights is None:
        raise ValueError(
            "expected a U-batch with advantages, weights and policy_gradient, of which other losses can be made, got "
            "one without: give them in UpdateBatch, or leave counterfactuals empty"
        )
    loss = intervened(batch.policy_gradient.loss, name)
    objective = replace(batch.policy_gradient, loss=loss, dtype=dtype)
    gradient = _clipped_gradient(model, batch, batch.advantages, batch.weights, objective)
    return step_with(gradient, momentum=name != WITHOUT_MOMENTUM)


def _clipped_gradient(
    model: nn.Module, batch: UpdateBatch, advantages: Tensor, weights: Tensor, objective: PolicyGradient
) -> dict[str, Tensor]:
    training_batch = objective.prepared(
        model,
        batch.rollout,
        advantages.to(objective.dtype),
        weights.to(objective.dtype),
        ref_logp=batch.ref_logp,
        old_logp=batch.old_logp,
    )
    gradient = objective.gradient(model, training_batch, batch.old_logp)
    if batch.max_grad_norm is None:
        return gradient
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradient.values()]))
    scale = clip_factor(norm, batch.max_grad_norm)
    return {name: scale * g for name, g in gradient.items()}
