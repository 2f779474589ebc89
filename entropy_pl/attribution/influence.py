"""Every component of a step, and every token behind its gradient, with what it did to the entropy, in two passes.

With v the step per unit η, P its preconditioner and c the factor of clipping by norm, one backward pass over E gives
∇Ĥ, and one derivative of U's log-probs along q = P∘∇Ĥ all tokens at once (docs/theory.md, §11):

    δH_uk = −c ∂L/∂log π(t_uk) ⟨P∘∇Ĥ, ∇log π(t_uk)⟩ = −c ∂L/∂log π(t_uk) ṡ_uk(q)        per unit η.

∇Ĥ is the gradient of the δH₁ that a probe of the same E-batch reports, baseline included. Nothing is fitted: what
momentum, weight decay and tokens leave of ⟨∇Ĥ, v⟩ is named, and stays.

An error bar over E needs the derivatives of E's statistics along the part it is of: of tokens u in a class c, along
v_c = −c P∘Σ_{u∈c} ∂L/∂log π_u ∇log π_u, which is one backward pass over those tokens and one pass over E.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution.errors import (
    Divisor,
    cluster_count,
    errors_over_e,
    errors_over_u,
    loss_sizes,
)
from entropy_pl.attribution.parts import ENTROPY_TERM, OTHER_GRADIENT, OTHER_UPDATE, Attribution
from entropy_pl.attribution.shares import Shares
from entropy_pl.attribution.signs import by_sign
from entropy_pl.estimators import first_order_coefficients
from entropy_pl.estimators.snis import Clusters, Integrand, Normalize, Weighting
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import Method, one_sided_tangent, tangents
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.vector import Direction, LazyDirection, UpdateVector


def attribute_update(
    model: nn.Module,
    eval_rollout: Rollout,
    update_rollout: Rollout,
    update: UpdateVector,
    *,
    token_coefficients: Tensor,
    gradient_scale: float = 1.0,
    entropy_coefficients: Tensor | None = None,
    advantages: Tensor | None = None,
    divided_by: Divisor = "completions",
    base: TokenStats | None = None,
    tangent: TokenStats | None = None,
    baseline: Tensor | None = None,
    normalize: Normalize = "per_token",
    weighting: Weighting = "prefix",
    integrand: Integrand = "rao_blackwell",
    clusters: Clusters = None,
    update_clusters: Clusters = None,
    confidence: float = 0.95,
    temperature: float | None = None,
    method: Method = "auto",
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    peers: Peers = ALONE,
    on_pass: Callable[[str], None] = lambda phase: None,
) -> Attribution:
    """Attribute the first-order entropy change of an update to its components and to every token of the U-batch.

    Passes: over E one for ``base``, a forward and a backward one, and, for error bars, one for each of ``tangent``,
    momentum, weight decay, the tokens of each sign and what all of these leave (none for what is zero); over U three of
    ``central_difference``, or a ``forward_mode`` one, and a forward and a backward one of the completions of each sign.
    What is given is not computed. Memory is that of a micro-batch and of two vectors of the trainable parameters in
    float64.

    Args:
        model: the policy at θ, from which E was drawn.
        eval_rollout: the E-batch, ``[N, T]``.
        update_rollout: the U-batch, ``[N_U, T_U]``.
        update: v, with components and preconditioner.
        token_coefficients: ∂L/∂log π(t_uk) of the loss that made the step, ``[N_U, T_U]``.
        gradient_scale: c, the factor that clipping by norm put on the loss's gradient.
        entropy_coefficients: ∂L/∂h_uk, ``[N_U, T_U]``, where the loss has an entropy term.
        advantages: of every completion of U, ``[N_U]``, by whose sign the tokens are grouped.
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
        confidence: of the intervals.
        temperature: that logits are divided by, for E and U alike; None takes each rollout's own.
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
    eval_rollout, update_rollout = (rollout.at_temperature(temperature) for rollout in (eval_rollout, update_rollout))
    scoring: dict[str, Any] = {"entropy_dtype": entropy_dtype, "max_batch_tokens": max_batch_tokens}
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
            """One-sided: a pass each instead of two, and an error bar that is off by a few per cent does no harm."""
            v = UpdateVector(direction, lr=update.lr)  # from which a step to difference by is looked for
            return shares.stats(one_sided_tangent(model, eval_rollout, v, own_base, **passes))

        whole = tangent_along(update.direction) if tangent is None else tangent
        momentum, weight_decay = (tangent_along(update.components[part]) for part in ("momentum", "weight_decay"))
        # tangents are linear in the direction, and so add up
        along = {"first_order": whole, "momentum": momentum, "weight_decay": weight_decay}
        along["gradient"] = _sum(whole, momentum, weight_decay, factor=-1)

        own_signs = {} if advantages is None else by_sign(advantages)
        explained: dict[str, Tensor] = {}
        of_tokens = token_coefficients.double()
        loss = TokenStats(of_tokens, torch.zeros_like(of_tokens), update_rollout.completion_mask)
        for name, chosen in (own_signs or {"tokens": torch.ones(len(token_coefficients), dtype=torch.bool)}).items():
            rows = chosen.nonzero()[:, 0].to(loss.logp.device)
            own = update_rollout.select(rows.to(update_rollout.prompt_ids.device))
            part = shares.sum(weighted_gradient(model, own, loss.select(rows), update.preconditioner, **scoring))
            if loss.logp[rows].any():
                on_pass("gradient of the loss")
            along[name] = tangent_along(_step_of(part, update.preconditioner, gradient_scale))
            explained = {parameter: g + explained.get(parameter, 0.0) for parameter, g in part.items()}
        if own_signs:
            along["tokens"] = _sum(*(along[name] for name in own_signs))
        along["remainder"] = tangent_along(_left_of(update, explained, gradient_scale))
        whole_signs = {} if advantages is None else by_sign(torch.cat(peers.exchange(advantages.cpu())))

    per_sequence = per_token.sum(1)
    columns = {name: per_sequence * chosen.to(per_sequence.device) for name, chosen in whole_signs.items()}
    columns["tokens"] = per_sequence
    values = parts | {"first_order": first_order} | {name: float(column.sum()) for name, column in columns.items()}
    left = first_order - sum(values[name] for name in ("momentum", "weight_decay", "tokens"))
    return Attribution(
        per_token=per_token,
        momentum=parts["momentum"],
        weight_decay=parts["weight_decay"],
        gradient=parts["gradient"],
        first_order=first_order,
        remainder={
            ENTROPY_TERM: entropy_term,
            OTHER_GRADIENT: parts["gradient"] - values["tokens"] - entropy_term,
            OTHER_UPDATE: first_order - sum(parts.values()),
        },
        by_sign={name: values[name] for name in whole_signs},
        over_e=errors_over_e(
            base,
            {name: (values.get(name, left), tangent) for name, tangent in along.items()},
            clusters,
            baseline,
            confidence=confidence,
            **estimate,
        ),
        over_u=errors_over_u(columns, loss_sizes(u_stats.mask, divided_by), update_clusters, confidence=confidence),
        stats=u_stats,
        confidence=confidence,
        prompts_of_e=cluster_count(clusters, len(base)),
        prompts_of_u=cluster_count(update_clusters, len(u_stats)),
    )


def _sum(whole: TokenStats, *parts: TokenStats, factor: float = 1.0) -> TokenStats:
    logp, entropy = whole.logp, whole.entropy
    for part in parts:
        logp, entropy = logp + factor * part.logp, entropy + factor * part.entropy
    return TokenStats(logp, entropy, whole.mask)


def _step_of(gradient: Mapping[str, Tensor], preconditioner: Direction, scale: float) -> Direction:
    """−c P∘∇ of a part of the loss: what the optimizer made of it, made when it is asked for."""
    return LazyDirection(gradient, lambda name: -scale * preconditioner[name] * gradient[name].to(preconditioner[name]))


def _left_of(update: UpdateVector, gradient: Mapping[str, Tensor], scale: float) -> Direction:
    """What momentum, weight decay and the tokens leave of the step, made when it is asked for."""
    assert update.preconditioner is not None
    tokens = _step_of(gradient, update.preconditioner, scale)

    def left(name: str) -> Tensor:
        told = [value for part, value in update.parts(name).items() if part != "gradient"]
        return update.direction[name] - sum([*told, *([tokens[name]] if name in tokens else [])])

    return LazyDirection(update.direction, left)
