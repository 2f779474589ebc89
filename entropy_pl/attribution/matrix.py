"""The E×U matrix: what every completion of U did to the entropy, as every completion of E sees it.

∇Ĥ is a mean over E of g_i = N Σ_k (a_ik ∇s_ik + b_ik ∇h_ik), and the gradient's step a sum over U, so that

    M_iu = −c ⟨g_i, P ∇ℓ_u⟩,    mean_i M_iu = δH_u        per unit η,

the attribution of :mod:`.influence` one sequence at a time on both sides. Its columns are (nearly) the influences of
δH_u. For ``per_token`` they lack the noise of ĥ and of the mean length, which the quotient rule adds:

    ψ_iu = M_iu − δH_u − δH_u (T_i − T̄)/T̄ − ψ_i Ṫ_u/T̄,

ψ_i the influence of Ĥ itself and Ṫ_u what u does to the mean length. Left out is the noise of the per-position means
that self-normalization subtracts, smaller by a factor 1/√N.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution.kernel import DEFAULT_BYTES, KernelCost, gradient_kernel, kernel_cost
from entropy_pl.estimators import entropy_estimate, first_order_coefficients
from entropy_pl.estimators.estimate import standard_error
from entropy_pl.estimators.snis import Clusters, Integrand, Normalize, Weighting
from entropy_pl.policy.gradients import sequence_gradients, weighted_gradient
from entropy_pl.policy.score import token_stats
from entropy_pl.rollout import Rollout, TokenStats, prompt_clusters
from entropy_pl.updates.vector import UpdateVector


@dataclass(frozen=True, eq=False)
class InfluenceMatrix:
    """M and the error bars of its column means, nats per unit η.

    Args:
        values: M, ``[N_E, N_U]``, float64.
        stderr: of every completion's δH_u over E, ``[N_U]``, clustered by prompt.
    """

    values: Tensor
    stderr: Tensor

    @property
    def per_sequence(self) -> Tensor:
        """δH_u, ``[N_U]``."""
        return self.values.mean(0)


def influence_matrix(
    model: nn.Module,
    eval_rollout: Rollout,
    update_rollout: Rollout,
    update: UpdateVector,
    *,
    token_coefficients: Tensor,
    gradient_scale: float = 1.0,
    base: TokenStats | None = None,
    baseline: Tensor | None = None,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    temperature: float | None = None,
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    max_bytes: int = DEFAULT_BYTES,
) -> InfluenceMatrix:
    """Attribute the first-order change per completion of U and per completion of E, with error bars.

    A forward and a backward pass of every sequence by itself (:func:`influence_matrix_cost` says how many), and a
    backward pass over E for the mean length.

    Args:
        model: the policy at θ, from which E was drawn.
        eval_rollout: the E-batch, ``[N_E, T]``.
        update_rollout: the U-batch, ``[N_U, T_U]``.
        update: v, with its preconditioner.
        token_coefficients: ∂L/∂log π(t_uk), ``[N_U, T_U]``.
        gradient_scale: c, the factor that clipping by norm put on the loss's gradient.
        base: statistics of E at θ, if they are at hand.
        baseline: of the estimate, ``[N_E, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clusters: prompt of each completion of E, ``[N_E]``; None groups equal prompts by themselves.
        temperature: that logits are divided by; None takes each rollout's own.
        entropy_dtype: dtype of softmax and entropy.
        max_batch_tokens: padded tokens per micro-batch of the passes over all of E.
        max_bytes: for the gradients of one block of U.

    Raises:
        ValueError: if the update has no preconditioner, or not even one gradient fits into ``max_bytes``.
    """
    if update.preconditioner is None:
        raise ValueError(
            "expected an update with a preconditioner, got none: "
            f"{update.why_no_preconditioner or 'read it with record_update, or give preconditioner='}"
        )
    influence_matrix_cost(model, len(eval_rollout), len(update_rollout), update, max_bytes=max_bytes)  # or refuse
    names = list(update.preconditioner)
    eval_rollout, update_rollout = (rollout.at_temperature(temperature) for rollout in (eval_rollout, update_rollout))
    estimate: dict[str, Any] = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    scoring: dict[str, Any] = {"entropy_dtype": entropy_dtype}
    batched: dict[str, Any] = {**scoring, "max_batch_tokens": max_batch_tokens}
    base = token_stats(model, eval_rollout, **batched) if base is None else base
    clusters = prompt_clusters(eval_rollout) if clusters is None else clusters
    count = len(base)
    of_mean = first_order_coefficients(base, baseline=baseline, **estimate)
    e_coefficients = TokenStats(count * of_mean.logp, count * of_mean.entropy, base.mask)
    no_entropy = torch.zeros_like(token_coefficients, dtype=torch.float64)
    u_coefficients = TokenStats(token_coefficients.double(), no_entropy, update_rollout.completion_mask)

    def gradients(rollout: Rollout, coefficients: TokenStats, start: int, end: int) -> Iterator[Tensor]:
        rows = torch.arange(start, end)
        part = rollout.select(rows.to(rollout.prompt_ids.device))
        of_part = coefficients.select(rows.to(coefficients.logp.device))
        return sequence_gradients(model, part, of_part, names, **scoring)

    beside = []
    if normalize == "per_token":
        beside.append(_flat(length_gradient(model, eval_rollout, base, names, weighting, batched), names))
    metric = torch.cat([update.preconditioner[name].flatten() for name in names])
    kernel, others = gradient_kernel(
        lambda start, end: gradients(eval_rollout, e_coefficients, start, end),
        count,
        lambda start, end: gradients(update_rollout, u_coefficients, start, end),
        len(update_rollout),
        metric=metric,
        beside=beside,
        max_bytes=max_bytes,
    )
    values, others = -gradient_scale * kernel, -gradient_scale * others
    influence = values - values.mean(0)
    if normalize == "per_token":
        lengths = base.mask.sum(1).double().cpu()
        own = entropy_estimate(base, normalize=normalize, integrand=integrand, clusters=clusters).influence.cpu()
        relative = (lengths - lengths.mean()) / lengths.mean()
        influence = influence - relative[:, None] * values.mean(0) - own[:, None] * others[0] / lengths.mean()
    stderr = torch.tensor([standard_error(column, clusters)[0] for column in influence.T], dtype=torch.float64)
    return InfluenceMatrix(values, stderr)


def influence_matrix_cost(
    model: nn.Module, rows_e: int, rows_u: int, update: UpdateVector, *, max_bytes: int = DEFAULT_BYTES
) -> KernelCost:
    """What :func:`influence_matrix` will take for so many completions of E and of U; its error of ``max_bytes``.

    Args:
        model: as for :func:`influence_matrix`.
        rows_e: completions of E.
        rows_u: completions of U.
        update: v, for the parameters it moves.
        max_bytes: the most that a block of gradients may take.
    """
    parameters = dict(model.named_parameters())
    held = [parameters[name] for name in update.direction]
    itemsize = max(4, *(parameter.element_size() for parameter in held))
    return kernel_cost(rows_e, rows_u, sum(p.numel() for p in held), itemsize=itemsize, max_bytes=max_bytes)


def length_gradient(
    model: nn.Module,
    rollout: Rollout,
    base: TokenStats,
    names: list[str],
    weighting: Weighting,
    batched: dict[str, Any],
) -> dict[str, Tensor]:
    """∇ of the mean completion length: its integrand is m_ik, which has no derivative of its own."""
    counts = TokenStats(base.logp, base.mask.double(), base.mask)
    coefficients = first_order_coefficients(counts, normalize="per_sequence", weighting=weighting)
    score_alone = TokenStats(coefficients.logp, torch.zeros_like(coefficients.entropy), base.mask)
    return weighted_gradient(model, rollout, score_alone, names, **batched)


def _flat(gradient: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in names])
