"""Gradients of weighted sums of log-probs and entropies: what ∇Ĥ, ∇S_i and the like are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from entropy_pl.policy.head import completion_logits
from entropy_pl.policy.logits import logits_gradient
from entropy_pl.policy.micro_batches import compact, default_batch_tokens, micro_batches, model_device
from entropy_pl.policy.positions import position_boundary
from entropy_pl.policy.precision import evaluation
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.displace import parameters_named
from entropy_pl.updates.shared import aliased


def weighted_gradient(
    model: nn.Module,
    rollout: Rollout,
    coefficients: TokenStats,
    names: Iterable[str],
    *,
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
) -> dict[str, Tensor]:
    """∇_θ Σ_ik (a_ik log π(t_ik) + b_ik h_ik), one backward pass over the rollout; no parameter's ``grad`` is touched.

    The model runs as in :func:`~entropy_pl.policy.score.token_stats`. Softmax and entropy are not differentiated by
    autograd, whose graph would be several times the logits, but by hand, a bounded number of rows at a time: with p the
    distribution, z its logits and τ the rollout's temperature,

        ∂ log p_t/∂z_j = (1_jt − p_j)/τ,    ∂h/∂z_j = −p_j (log p_j + h)/τ.

    Args:
        model: a causal language model.
        rollout: ``[N, P]`` and ``[N, T]``; a micro-batch without coefficients is left out.
        coefficients: a as ``logp`` and b as ``entropy``, ``[N, T]``.
        names: of the parameters to differentiate by; of one that shares its memory with others, by all of them.
        entropy_dtype: dtype of softmax and entropy.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.

    Returns:
        By name, of the parameter's shape, in float32 or what the model computes in.

    Raises:
        KeyError: if the model has no parameter of a name.
        ValueError: if the coefficients are not of the rollout's tokens.
    """
    if coefficients.mask.shape != rollout.completion_mask.shape:
        raise ValueError(
            f"expected coefficients of the rollout's shape {list(rollout.completion_mask.shape)}, got "
            f"{list(coefficients.mask.shape)}"
        )
    names = list(names)
    device = model_device(model)
    rollout, coefficients = rollout.to(device), coefficients.to(device)
    with evaluation(model), torch.enable_grad():
        parameters = parameters_named(model, names)
        total = {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in parameters.items()}
        every = dict(model.named_parameters())
        others = {name: alias for name, alias in aliased(model, names).items() if every[name].requires_grad}
        held = [*parameters.values(), *(every[name] for name in others)]
        budget = default_batch_tokens(model, rollout, graph=True) if max_batch_tokens is None else max_batch_tokens
        for rows in micro_batches(rollout, budget, position_boundary(model)):
            a, b = coefficients.logp[rows], coefficients.entropy[rows]
            if not (a.any() or b.any()):
                continue
            part = compact(rollout, rows)
            mask, width = part.completion_mask, part.completion_mask.shape[1]
            logits = completion_logits(model, part)
            by_logits = logits_gradient(
                logits.detach(),
                part.completion_ids[mask],
                a[:, :width][mask],
                b[:, :width][mask],
                part.temperature,
                entropy_dtype,
            )
            gradients = torch.autograd.grad(logits, held, by_logits, allow_unused=True)
            for name, gradient in zip([*names, *others], gradients, strict=True):
                if gradient is not None and name in others:
                    total[others[name].owner] += others[name].onto_owner(gradient)
                elif gradient is not None:
                    total[name] += gradient
    return total


def sequence_gradients(
    model: nn.Module,
    rollout: Rollout,
    coefficients: TokenStats,
    names: Iterable[str],
    *,
    entropy_dtype: torch.dtype = torch.float64,
) -> Iterator[Tensor]:
    """:func:`weighted_gradient` of every sequence by itself, as one flat vector ``[d]`` each, in the rollout's order.

    A forward and a backward pass of one sequence each: no more than one sequence's activations are held.
    """
    names = list(names)
    for row in range(len(rollout)):
        index = torch.tensor([row])
        part, of_part = (
            rollout.select(index.to(rollout.prompt_ids.device)),
            coefficients.select(index.to(coefficients.logp.device)),
        )
        gradient = weighted_gradient(model, part, of_part, names, entropy_dtype=entropy_dtype)
        yield torch.cat([gradient[name].flatten() for name in names])
