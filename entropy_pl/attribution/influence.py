"""Every component of a step, and every token behind its gradient, with what it did to the entropy, in two passes.

With v the step per unit η, P its preconditioner and c the factor of clipping by norm, one backward pass over E gives
∇Ĥ, and one derivative of U's log-probs along q = P∘∇Ĥ all tokens at once (docs/theory.md, §11):

    δH_uk = −c ∂L/∂log π(t_uk) ⟨P∘∇Ĥ, ∇log π(t_uk)⟩ = −c ∂L/∂log π(t_uk) ṡ_uk(q)        per unit η.

∇Ĥ is the gradient of the δH₁ that a probe of the same E-batch reports, baseline included. Nothing is fitted: what
momentum, weight decay and tokens leave of ⟨∇Ĥ, v⟩ is named, and stays.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import nan
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution.errors import Divisor, ErrorBar, error_over_u, errors_over_e, loss_sizes
from entropy_pl.attribution.shares import Shares
from entropy_pl.estimators import first_order_coefficients
from entropy_pl.estimators.snis import Clusters, Integrand, Normalize, Weighting
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import Method, one_sided_tangent, tangents
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.vector import Direction, UpdateVector

ENTROPY_TERM, OTHER_GRADIENT, OTHER_UPDATE = "entropy_term", "gradient", "update"


@dataclass(frozen=True, eq=False)
class Attribution:
    """What a step's components, sequences and tokens did to the entropy, to first order, in nats per unit η.

    ``total`` is ``momentum + weight_decay + Σ per_token``; with the remainders it is ``first_order``.

    Args:
        per_token: of every completion token of U, ``[N_U, T_U]``, zero where there is none.
        momentum: of what the optimizer remembered of earlier gradients.
        weight_decay: of the decay.
        gradient: of this step's gradient, ⟨∇Ĥ, v_gradient⟩; the tokens are to explain it.
        first_order: of the whole step, ⟨∇Ĥ, v⟩.
        remainder: what the tokens do not explain, by name: ``entropy_term`` of the loss, which is no function of the
            tokens' log-probs; ``gradient``, the rest of it (dropout, autocast, clipping by value, other terms of the
            loss); ``update``, what the step's components leave of it (rounding of θ).
        over_e: error bars of ``first_order``, ``momentum``, ``weight_decay`` and ``gradient`` over the E-batch: how
            well they are measured.
        over_u: of Σ per_token over the prompts of U: how much of it was the luck of the batch. None for one prompt.
        stats: log-probs and entropies of U's tokens at the θ of before the step, ``[N_U, T_U]``.
    """

    per_token: Tensor = field(repr=False)
    momentum: float
    weight_decay: float
    gradient: float
    first_order: float
    remainder: dict[str, float]
    over_e: dict[str, ErrorBar]
    over_u: ErrorBar | None
    stats: TokenStats = field(repr=False)

    @property
    def per_sequence(self) -> Tensor:
        """Of every completion of U, ``[N_U]``."""
        return self.per_token.sum(1)

    @property
    def tokens(self) -> float:
        """Of all tokens together."""
        return float(self.per_token.sum())

    @property
    def total(self) -> float:
        """Momentum, weight decay and tokens: ``first_order`` without the remainders."""
        return self.momentum + self.weight_decay + self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, tokens summed; of all but tokens, with both error bars over E."""
        measured = {
            name: {"value": getattr(self, name), "stderr": error.influence, "stderr_jackknife": error.jackknife}
            for name, error in self.over_e.items()
        }
        luck = ErrorBar(nan, nan) if self.over_u is None else self.over_u
        tokens = {"value": self.tokens, "stderr_u": luck.influence, "stderr_u_jackknife": luck.jackknife}
        return measured | {"tokens": tokens, "remainder": dict(self.remainder), "total": self.total}


def attribute_update(
    model: nn.Module,
    eval_rollout: Rollout,
    update_rollout: Rollout,
    update: UpdateVector,
    *,
    token_coefficients: Tensor,
    gradient_scale: float = 1.0,
    entropy_coefficients: Tensor | None = None,
    divided_by: Divisor = "completions",
    base: TokenStats | None = None,
    tangent: TokenStats | None = None,
    baseline: Tensor | None = None,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    update_clusters: Clusters = None,
    temperature: float = 1.0,
    method: Method = "auto",
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    peers: Peers = ALONE,
    on_pass: Callable[[str], None] = lambda phase: None,
) -> Attribution:
    """Attribute the first-order entropy change of an update to its components and to every token of the U-batch.

    Passes: over E one for ``base``, a forward and a backward one, and one for each of ``tangent``, momentum and weight
    decay (their error bars; none for a component that is zero); over U three of ``central_difference``, or a
    ``forward_mode`` one. What is given is not computed. Memory is that of a micro-batch and of two vectors of the
    trainable parameters in float64.

    Args:
        model: the policy at θ, from which E was drawn.
        eval_rollout: the E-batch, ``[N, T]``.
        update_rollout: the U-batch, ``[N_U, T_U]``.
        update: v, with components and preconditioner.
        token_coefficients: ∂L/∂log π(t_uk) of the loss that made the step, ``[N_U, T_U]``.
        gradient_scale: c, the factor that clipping by norm put on the loss's gradient.
        entropy_coefficients: ∂L/∂h_uk, ``[N_U, T_U]``, where the loss has an entropy term.
        divided_by: what the loss is divided by, the number of U's ``completions`` or of their ``tokens``; for its
            error bar.
        base: statistics of E at θ, if they are at hand.
        tangent: derivatives of E's statistics along v, if they are at hand; for the error bar of ``first_order``.
        baseline: of the estimate, ``[N, T]``; see :func:`~entropy_pl.estimators.first_order_delta_entropy`.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` or ``sequence``.
        integrand: ``rao_blackwell`` or ``surprisal``.
        clusters: prompt of each completion of E, ``[N]``; None groups equal prompts by themselves.
        update_clusters: prompt of each completion of U, ``[N_U]``; None likewise.
        temperature: of the sampling distribution, for E and U alike.
        method: of U's derivative: ``auto``, ``forward_mode`` or ``central_difference``.
        entropy_dtype: dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.
        peers: the run's processes, each with its share of both rollouts and of the coefficients; ``base``, ``tangent``,
            ``baseline`` and both clusters are of all. All of them call this, and all get the whole result.
        on_pass: called with a phase's name after every pass over a batch.

    Raises:
        ValueError: if the update has no components, or shapes disagree.
        NonFiniteError: if a logit is NaN or +inf.
        PeerError: if another process failed.
    """
    if update.components is None or update.preconditioner is None:
        raise ValueError(
            "expected an update with components and preconditioner, got none: "
            f"{update.why_no_preconditioner or 'read it with record_update, or give components='}"
        )
    scoring: dict[str, Any] = {
        "temperature": temperature,
        "entropy_dtype": entropy_dtype,
        "max_batch_tokens": max_batch_tokens,
    }
    estimate: dict[str, Any] = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
    passes: dict[str, Any] = {**scoring, "peers": peers, "on_pass": on_pass}
    shares = Shares(peers)
    with peers.together():
        # In here, for a share of the wrong shape may be one process's alone.
        for name, value in (("token_coefficients", token_coefficients), ("entropy_coefficients", entropy_coefficients)):
            if value is not None and value.shape != update_rollout.completion_mask.shape:
                raise ValueError(
                    f"expected {name} of the U-batch's shape {list(update_rollout.completion_mask.shape)}, got "
                    f"{list(value.shape)}"
                )
        if base is None:
            base = shares.stats(token_stats(model, eval_rollout, **scoring))
            on_pass("scoring E")
        clusters = shares.clusters(eval_rollout) if clusters is None else clusters
        coefficients = first_order_coefficients(base, baseline=baseline, **estimate)
        own_base, own_coefficients = (
            shares.own(stats, eval_rollout).to(model_device(model)) for stats in (base, coefficients)
        )
        gradient = shares.sum(weighted_gradient(model, eval_rollout, own_coefficients, update.direction, **scoring))
        on_pass("gradient of H")
        first_order, parts = update.along(gradient)

        q = {name: p * gradient[name].to(p) for name, p in update.preconditioner.items()}
        del gradient
        u = tangents(model, update_rollout, UpdateVector(q, lr=0.0), method=method, **passes)
        del q
        per_token = -gradient_scale * token_coefficients.to(u.first.logp) * u.first.logp
        own_entropy_term = 0.0
        if entropy_coefficients is not None:
            gained = (entropy_coefficients.to(u.first.entropy) * u.first.entropy).sum()
            own_entropy_term = -gradient_scale * float(gained)
        u_stats = shares.stats(u.base)
        per_token = shares.rows(per_token)
        entropy_term = sum(peers.exchange(own_entropy_term))
        if update_clusters is None:
            update_clusters = shares.clusters(update_rollout)

        def tangent_along(direction: Direction) -> TokenStats:
            v = UpdateVector(direction, lr=update.lr)  # from which a step to difference by is looked for
            return shares.stats(one_sided_tangent(model, eval_rollout, v, own_base, **passes))

        whole = tangent_along(update.direction) if tangent is None else tangent
        momentum, weight_decay = (tangent_along(update.components[part]) for part in ("momentum", "weight_decay"))
    along = {"first_order": whole, "momentum": momentum, "weight_decay": weight_decay}
    along["gradient"] = _difference(whole, momentum, weight_decay)  # they are linear in the direction
    tokens = float(per_token.sum())
    return Attribution(
        per_token=per_token,
        momentum=parts["momentum"],
        weight_decay=parts["weight_decay"],
        gradient=parts["gradient"],
        first_order=first_order,
        remainder={
            ENTROPY_TERM: entropy_term,
            OTHER_GRADIENT: parts["gradient"] - tokens - entropy_term,
            OTHER_UPDATE: first_order - sum(parts.values()),
        },
        over_e=errors_over_e(base, along, clusters, baseline, **estimate),
        over_u=error_over_u(per_token.sum(1), loss_sizes(u_stats.mask, divided_by), update_clusters),
        stats=u_stats,
    )


def _difference(whole: TokenStats, *parts: TokenStats) -> TokenStats:
    logp, entropy = whole.logp, whole.entropy
    for part in parts:
        logp, entropy = logp - part.logp, entropy - part.entropy
    return TokenStats(logp, entropy, whole.mask)
