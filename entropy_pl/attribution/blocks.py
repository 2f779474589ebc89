"""Error bars over E of every single token, from the attribution by each of a few blocks of E.

With δH_uk = Σ_b x_b, x_b the part of block b's sequences, the influences of a block add up to

    Ψ_b = x_b − (n_b/N) δH_uk − δH_uk (T_b − n_b T̄)/(N T̄) − (Σ_{i∈b} ψ_i) Ṫ_uk/(N T̄)

(the last two for ``per_token`` alone; T_b the block's tokens, ψ_i the influence of Ĥ itself and Ṫ_uk what the token
does to the mean length: :mod:`.matrix`), and B blocks give SE² = B/(B−1) Σ_b Ψ_b². Of 8 blocks it is itself good to a
quarter, 1/√(2·7).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution.matrix import length_gradient
from entropy_pl.estimators import entropy_estimate, first_order_coefficients
from entropy_pl.estimators.estimate import cluster_index
from entropy_pl.estimators.snis import Clusters, Integrand, Normalize, Weighting
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import Method, tangents
from entropy_pl.rollout import Rollout, TokenStats, prompt_clusters
from entropy_pl.updates.vector import UpdateVector


def token_standard_errors(
    model: nn.Module,
    eval_rollout: Rollout,
    update_rollout: Rollout,
    update: UpdateVector,
    *,
    token_coefficients: Tensor,
    gradient_scale: float = 1.0,
    blocks: int = 8,
    base: TokenStats | None = None,
    update_base: TokenStats | None = None,
    baseline: Tensor | None = None,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    temperature: float | None = None,
    method: Method = "auto",
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
) -> Tensor:
    """Standard error over E of every token's attributed change, per unit η.

    Passes: a backward one over all of E for the blocks together and another for the mean length; over U two of
    ``central_difference``, or a ``forward_mode`` one, for every block and for the length.

    Args:
        model: the policy at θ, from which E was drawn.
        eval_rollout: the E-batch, ``[N, T]``.
        update_rollout: the U-batch, ``[N_U, T_U]``.
        update: v, with its preconditioner.
        token_coefficients: ∂L/∂log π(t_uk), ``[N_U, T_U]``.
        gradient_scale: c, the factor that clipping by norm put on the loss's gradient.
        blocks: B; whole prompts of E go into a block, at most one block per prompt.
        base: statistics of E at θ, if they are at hand.
        update_base: statistics of U at θ, if they are at hand.
        baseline: of the estimate, ``[N, T]``.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clusters: prompt of each completion of E, ``[N]``; None groups equal prompts by themselves.
        temperature: that logits are divided by; None takes each rollout's own.
        method: of U's derivatives.
        entropy_dtype: dtype of softmax and entropy.
        max_batch_tokens: padded tokens per micro-batch.

    Returns:
        ``[N_U, T_U]``, float64.

    Raises:
        ValueError: if the update has no preconditioner, or there are fewer than two blocks.
    """
    preconditioner = update.preconditioner
    if preconditioner is None:
        raise ValueError(
            "expected an update with a preconditioner, got none: "
            f"{update.why_no_preconditioner or 'read it with record_update, or give preconditioner='}"
        )
    eval_rollout, update_rollout = (rollout.at_temperature(temperature) for rollout in (eval_rollout, update_rollout))
    scoring: dict[str, Any] = {"entropy_dtype": entropy_dtype, "max_batch_tokens": max_batch_tokens}
    names = list(preconditioner)
    base = token_stats(model, eval_rollout, **scoring) if base is None else base
    update_base = token_stats(model, update_rollout, **scoring) if update_base is None else update_base
    clusters = prompt_clusters(eval_rollout) if clusters is None else clusters
    prompt = torch.from_numpy(cluster_index(clusters, len(base)))
    blocks = min(blocks, int(prompt.max()) + 1)
    if blocks < 2:
        raise ValueError(f"expected at least 2 blocks of E's prompts, got {blocks}")
    coefficients = first_order_coefficients(
        base, normalize=normalize, weighting=weighting, integrand=integrand, baseline=baseline
    )

    def attributed(gradient: dict[str, Tensor]) -> Tensor:
        q = {name: p * gradient[name].to(p) for name, p in preconditioner.items()}
        along = tangents(model, update_rollout, UpdateVector(q, lr=0.0), method=method, base=update_base, **scoring)
        return -gradient_scale * token_coefficients.to(along.first.logp) * along.first.logp

    parts, counts, lengths, influences = [], [], [], []
    own = entropy_estimate(base, normalize=normalize, integrand=integrand, clusters=clusters).influence
    for block in range(blocks):
        rows = torch.nonzero(prompt % blocks == block)[:, 0].to(base.logp.device)
        gradient = weighted_gradient(
            model,
            eval_rollout.select(rows.to(eval_rollout.prompt_ids.device)),
            coefficients.select(rows),
            names,
            **scoring,
        )
        parts.append(attributed(gradient))
        counts.append(len(rows))
        lengths.append(int(base.mask[rows].sum()))
        influences.append(float(own[rows.to(own.device)].sum()))
    whole = torch.stack(parts).sum(0)
    count, tokens = len(base), sum(lengths)
    variance = torch.zeros_like(whole)
    longer = torch.zeros_like(whole)
    if normalize == "per_token":
        longer = attributed(length_gradient(model, eval_rollout, base, names, weighting, scoring))
    for part, n, length, influence in zip(parts, counts, lengths, influences, strict=True):
        psi = part - n / count * whole
        if normalize == "per_token":
            psi = psi - (length / tokens - n / count) * whole - influence / tokens * longer
        variance += psi.square()
    return (blocks / (blocks - 1) * variance).sqrt()
