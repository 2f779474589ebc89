"""Derivatives of log-probs and entropies along an update: what first and second order are made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.attention import BlockwiseAttention
from entropy_pl.policy.duals import derivatives
from entropy_pl.policy.kernels import differentiable_experts
from entropy_pl.policy.logits import NonFiniteError, compiled_statistics
from entropy_pl.policy.micro_batches import default_batch_tokens, model_device, over_micro_batches
from entropy_pl.policy.precision import evaluation, quantized_layers, refuse_quantized
from entropy_pl.policy.score import completion_stats, token_stats
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.displace import parameters_named
from entropy_pl.updates.vector import UpdateVector

Method = Literal["auto", "forward_mode", "central_difference"]

# Largest |Σ_k r_ik| to aim for. It balances the h² of the difference against the rounding of a sequence's log-prob:
# 1e-5 nats in float32, 1e-13 in float64.
TARGET_LOG_RATIO = {torch.float32: 0.05, torch.float64: 1e-3}
PILOT_SEQUENCES = 8

StatsAlong = Callable[..., TokenStats]  # η, and which rows if not all → statistics at θ+ηv


@dataclass(frozen=True, eq=False)
class Tangents:
    """Statistics at θ and their derivatives per unit η along an update.

    Args:
        base: at θ, ``[N, T]``.
        first: (ṡ, ḣ), ``[N, T]``.
        second: (s̈, ḧ), ``[N, T]``; None from forward mode.
        method: what made them, ``forward_mode`` or ``central_difference``.
        step: h of the central difference, in η.
    """

    base: TokenStats
    first: TokenStats
    second: TokenStats | None
    method: str
    step: float | None = None


def token_stats_jvp(
    model: nn.Module,
    rollout: Rollout,
    update: UpdateVector,
    *,
    temperature: float | None = None,
    method: Method = "auto",
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    midpoint_base: bool = False,
) -> tuple[TokenStats, TokenStats]:
    """Statistics at θ and their derivatives along v, per unit η.

    Args:
        model: a causal language model.
        rollout: ``[N, T]``.
        update: v.
        temperature: that logits are divided by; None takes the rollout's.
        method: ``forward_mode`` is exact, but meets no quantized layer and needs unfused attention;
            ``central_difference`` is two plain passes; ``auto`` takes forward mode in float64, differences otherwise.
        entropy_dtype: dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch.
        midpoint_base: take the statistics at θ from the two passes of a central difference, as their mean, and save the
            third. They are then off by ½h² times their second derivative: much less than δH₁'s own error bar where they
            serve as the place of a derivative, far more than rounding where importance weights are made of them.

    Returns:
        (TokenStats at θ, TokenStats of derivatives), ``[N, T]``, nats and nats per unit η.

    Raises:
        ValueError: for an unknown method, or forward mode through quantized layers.
        NonFiniteError: if a logit is NaN or +inf.
    """
    result = tangents(
        model,
        rollout.at_temperature(temperature),
        update,
        method=method,
        entropy_dtype=entropy_dtype,
        max_batch_tokens=max_batch_tokens,
        midpoint_base=midpoint_base,
    )
    return result.base, result.first


def tangents(
    model: nn.Module,
    rollout: Rollout,
    update: UpdateVector,
    *,
    method: Method = "auto",
    base: TokenStats | None = None,
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    midpoint_base: bool = False,
    peers: Peers = ALONE,
    on_pass: Callable[[str], None] = lambda phase: None,
) -> Tangents:
    """As :func:`token_stats_jvp`, with second derivatives where they come for nothing, and with what made them.

    Args:
        model: a causal language model.
        rollout: ``[N, T]``.
        update: v.
        method: see :func:`token_stats_jvp`.
        base: statistics at θ, if they are already at hand.
        entropy_dtype: dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch.
        midpoint_base: see :func:`token_stats_jvp`; without ``base`` at hand. There are no second derivatives then.
        peers: who hold the other rows of the rollout: all take one and the same difference step.
        on_pass: called with ``"tangents"`` after every pass over the rollout.

    Raises:
        ValueError: as :func:`token_stats_jvp`.
        NonFiniteError: as :func:`token_stats_jvp`.
    """
    with evaluation(model), torch.no_grad():
        chosen = resolve_method(model, method)
        if chosen == "forward_mode":
            result = _forward_mode(model, rollout, update, entropy_dtype, max_batch_tokens)
            on_pass("tangents")
            return result

        if max_batch_tokens is None:  # once, so that all passes round alike
            max_batch_tokens = default_batch_tokens(model, rollout)
        stats = _stats_along(model, rollout, update, entropy_dtype, max_batch_tokens, on_pass)
        rollout = rollout.to(model_device(model))
        if update.norm() == 0:
            base = stats(0.0) if base is None else base
            zero = TokenStats(torch.zeros_like(base.logp), torch.zeros_like(base.entropy), base.mask)
            return Tangents(base, zero, zero, "central_difference", 0.0)
        if base is None and not midpoint_base:
            base = stats(0.0)
        step = _difference_step(stats, rollout, base, update, TARGET_LOG_RATIO[_compute_dtype(model)], peers)
        return _central_difference(base, stats(step), stats(-step), step)


def one_sided_tangent(
    model: nn.Module,
    rollout: Rollout,
    update: UpdateVector,
    base: TokenStats,
    *,
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
    peers: Peers = ALONE,
    on_pass: Callable[[str], None] = lambda phase: None,
) -> TokenStats:
    """First derivatives (ṡ, ḣ) along v by one plain pass, (stats(h) − stats(0))/h: good enough for an error bar.

    Off by ½h times the second derivative: where the largest |Σ_k r_ik| is about 0.05, or 1e-3 in float64, as
    here, typically by a few per cent (a few thousandths); by more along a direction of little slope and much curvature.

    Args:
        model: a causal language model.
        rollout: ``[N, T]``.
        update: v.
        base: statistics of the rollout at θ.
        entropy_dtype: dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch.
        peers: who hold the other rows of the rollout.
        on_pass: called with ``"tangents"`` after the pass.

    Returns:
        ``[N, T]``, nats per unit η.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
    """
    with evaluation(model), torch.no_grad():
        if update.norm() == 0:
            return TokenStats(torch.zeros_like(base.logp), torch.zeros_like(base.entropy), base.mask)
        rollout = rollout.to(model_device(model))
        if max_batch_tokens is None:
            max_batch_tokens = default_batch_tokens(model, rollout)
        stats = _stats_along(model, rollout, update, entropy_dtype, max_batch_tokens, on_pass)
        step = _difference_step(stats, rollout, base, update, TARGET_LOG_RATIO[_compute_dtype(model)], peers)
        moved = stats(step)
        return TokenStats((moved.logp - base.logp) / step, (moved.entropy - base.entropy) / step, base.mask)


def central_difference(
    model: nn.Module, rollout: Rollout, update: UpdateVector, step: float, **scoring: Any
) -> TokenStats:
    """First derivatives (ṡ, ḣ) along v by differences at a step of one's own, (stats(h) − stats(−h))/2h.

    Args:
        model: a causal language model.
        rollout: ``[N, T]``.
        update: v.
        step: h, in η.
        scoring: options of :func:`~entropy_pl.policy.score.token_stats`.

    Returns:
        ``[N, T]``, nats per unit η.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
    """
    plus, minus = (token_stats(model, rollout, update=update, eta=eta, **scoring) for eta in (step, -step))
    return _first_difference(plus, minus, step)


def resolve_method(model: nn.Module, method: Method) -> str:
    """The method that ``auto`` means for this model, or the one asked for if it can be had.

    Raises:
        ValueError: for an unknown method, or forward mode through quantized layers.
    """
    if method not in ("auto", "forward_mode", "central_difference"):
        raise ValueError(f"expected method 'auto', 'forward_mode' or 'central_difference', got {method!r}")
    if method == "forward_mode":
        refuse_quantized(model, "forward mode", "use method='central_difference'")
    if method == "auto":
        exact = _compute_dtype(model) is torch.float64 and not quantized_layers(model)
        return "forward_mode" if exact else "central_difference"
    return method


def _compute_dtype(model: nn.Module) -> torch.dtype:
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _stats_along(
    model: nn.Module,
    rollout: Rollout,
    update: UpdateVector,
    entropy_dtype: torch.dtype,
    max_batch_tokens: int | None,
    on_pass: Callable[[str], None],
) -> StatsAlong:
    """Statistics at θ+ηv, of all rows (a pass) or of some (a trial)."""

    def stats(eta: float, rows: Tensor | None = None) -> TokenStats:
        scored = token_stats(
            model,
            rollout if rows is None else rollout.select(rows),
            update=update,
            eta=eta,
            entropy_dtype=entropy_dtype,
            max_batch_tokens=max_batch_tokens,
        )
        if rows is None:
            on_pass("tangents")
        return scored

    return stats


def _forward_mode(
    model: nn.Module,
    rollout: Rollout,
    update: UpdateVector,
    dtype: torch.dtype,
    max_batch_tokens: int | None,
) -> Tangents:
    parameters = parameters_named(model, update.direction)
    tangent = {name: v.to(parameters[name].detach()) for name, v in update.direction.items()}  # a lazy one once

    def score(part: Rollout) -> tuple[Tensor, ...]:
        def stats() -> tuple[Tensor, Tensor]:
            return completion_stats(model, part, dtype)

        values, rates = derivatives(model, tangent, stats)
        return *values, *rates

    # Compiled kernels have no forward-mode derivative either.
    with BlockwiseAttention(), differentiable_experts(model), compiled_statistics(False):
        s, h, s1, h1 = over_micro_batches(model, rollout, score, outputs=4, max_batch_tokens=max_batch_tokens)
    mask = rollout.completion_mask.to(s.device)
    return Tangents(TokenStats(s, h, mask), TokenStats(s1, h1, mask), None, "forward_mode")


def _difference_step(
    stats: StatsAlong,
    rollout: Rollout,
    base: TokenStats | None,
    update: UpdateVector,
    target: float,
    peers: Peers,
) -> float:
    """The step h at which the largest |Σ_k r_ik| is about the target, tried out on the longest few sequences."""
    pilot = _longest(rollout.completion_lengths, PILOT_SEQUENCES, peers)
    if base is not None:
        at_theta = base.select(pilot).logp
    elif len(pilot):
        at_theta = stats(0.0, pilot).logp

    def response(step: float) -> float:
        if not len(pilot):
            return 0.0  # they are with the peers
        try:
            return float((stats(step, pilot).logp - at_theta).sum(1).abs().max())
        except NonFiniteError:  # θ is fine, so it was the step
            return math.inf

    step = update.lr or 1 / update.norm()
    for _ in range(8):
        largest = max(peers.exchange(response(step)))
        # Far from the target the response need not be linear, or may drown in rounding: move by a bounded factor.
        factor = min(max(target / max(largest, 1e-300), 1e-4), 1e4)
        step *= factor
        if 0.25 < factor < 4:
            break
    return step


def _longest(lengths: Tensor, count: int, peers: Peers) -> Tensor:
    """Which rows of this process are among the ``count`` longest of all; of equal ones the first."""
    everyone = peers.exchange(lengths.tolist())
    before = sum(map(len, everyone[: peers.rank]))
    all_lengths = [length for part in everyone for length in part]
    chosen = sorted(range(len(all_lengths)), key=lambda i: -all_lengths[i])[:count]
    mine = [i - before for i in chosen if before <= i < before + len(lengths)]
    return torch.tensor(mine, dtype=torch.long, device=lengths.device)


def _first_difference(plus: TokenStats, minus: TokenStats, step: float) -> TokenStats:
    return TokenStats((plus.logp - minus.logp) / (2 * step), (plus.entropy - minus.entropy) / (2 * step), plus.mask)


def _central_difference(base: TokenStats | None, plus: TokenStats, minus: TokenStats, step: float) -> Tangents:
    first = _first_difference(plus, minus, step)
    if base is None:
        middle = TokenStats((plus.logp + minus.logp) / 2, (plus.entropy + minus.entropy) / 2, plus.mask)
        return Tangents(middle, first, None, "central_difference", step)
    second = TokenStats(
        (plus.logp - 2 * base.logp + minus.logp) / step**2,
        (plus.entropy - 2 * base.entropy + minus.entropy) / step**2,
        base.mask,
    )
    return Tangents(base, first, second, "central_difference", step)
