"""What a policy says of tokens it already sampled: log-probs and entropies, in micro-batches of bounded size.

Only completion positions reach the vocabulary head, a chunk at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from entropy_pl.policy.head import completion_logit_chunks, completion_logits, emitting_states, head_sizes
from entropy_pl.policy.logits import check_finite, chunked_stats, joined, logits_to_stats
from entropy_pl.policy.micro_batches import model_device, over_micro_batches, parts
from entropy_pl.policy.precision import evaluation
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.displace import displaced
from entropy_pl.updates.vector import UpdateVector


def token_stats(
    model: nn.Module,
    rollout: Rollout,
    *,
    update: UpdateVector | None = None,
    eta: float = 0.0,
    temperature: float | None = None,
    entropy_dtype: torch.dtype = torch.float64,
    max_batch_tokens: int | None = None,
) -> TokenStats:
    """Log-probs and entropies of the rollout's completion tokens at θ+ηv, without gradient.

    The model runs in eval mode, outside autocast, in float32 or better (float64 inside ``float64_evaluation``).

    Args:
        model: a Hugging Face causal language model, PEFT or plain.
        rollout: prompts ``[N, P]`` and completions ``[N, T]``.
        update: v; None scores at θ.
        eta: η, the step along v.
        temperature: that logits are divided by; None takes the rollout's.
        entropy_dtype: the dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.

    Returns:
        Statistics in nats, ``[N, T]``, float64, zero where the mask is False.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
        ValueError: for a temperature or token budget that is not positive, or an eta without an update.
    """
    if eta != 0 and update is None:
        raise ValueError(f"expected an update to go with eta={eta:g}, got none: token_stats(..., update=v, eta=...)")
    rollout = rollout.at_temperature(temperature)
    with evaluation(model), torch.no_grad():
        if update is not None and eta != 0:
            with displaced(model, update, eta):
                return _scored(model, rollout, entropy_dtype, max_batch_tokens)
        return _scored(model, rollout, entropy_dtype, max_batch_tokens)


def policy_stats(
    model: nn.Module,
    rollout: Rollout,
    *,
    dtype: torch.dtype = torch.float32,
    entropy_gradient: bool = False,
) -> TokenStats:
    """The same statistics with a gradient, in one forward pass, in whatever mode and autocast the caller chose.

    For training losses. Entropies carry a gradient only when asked, since the graph behind them is as large as the
    logits.

    Args:
        model: a causal language model.
        rollout: one micro-batch, ``[n, P]`` and ``[n, T]``.
        dtype: the dtype of softmax, log-prob and entropy.
        entropy_gradient: whether entropies are differentiable.

    Returns:
        Statistics in nats, ``[n, T]``, of ``dtype``.
    """
    logits, mask, temperature = completion_logits(model, rollout), rollout.completion_mask, rollout.temperature
    targets = rollout.completion_ids[mask]
    if entropy_gradient:
        logp, entropy = logits_to_stats(logits, targets, temperature, dtype)
    else:
        scaled = logits.to(dtype) if temperature == 1 else logits.to(dtype) / temperature
        logp = -nn.functional.cross_entropy(scaled, targets, reduction="none")
        with torch.no_grad():
            _, entropy = chunked_stats(logits, targets, temperature, dtype)
    return TokenStats(_scatter(logp, mask), _scatter(entropy, mask), mask)


def completion_stats(model: nn.Module, rollout: Rollout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of a micro-batch's completion tokens, in whatever mode and autocast the caller chose.

    Made for passes without a graph: the logits of a chunk of tokens are forgotten before the next chunk's are made.

    Args:
        model: a causal language model.
        rollout: one micro-batch, ``[n, P]`` and ``[n, T]``.
        dtype: the dtype of softmax, log-prob and entropy.

    Returns:
        In nats, ``[number of completion tokens]`` each, in the order of ``completion_mask``.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
    """
    targets = rollout.completion_ids[rollout.completion_mask]
    parts, done = [], 0
    for logits in completion_logit_chunks(model, rollout):
        parts.append(chunked_stats(logits, targets[done : done + len(logits)], rollout.temperature, dtype))
        done += len(logits)
        del logits  # before the next chunk is made
    logp, entropy = joined(parts)
    check_finite(logp, entropy, model)
    return logp, entropy


def head_inputs(model: nn.Module, rollout: Rollout, *, max_batch_tokens: int | None = None) -> Tensor:
    """The last hidden states at θ that emit the completion tokens: the vocabulary head's inputs, without gradient.

    The state that emits token k is the one at the position before it: it knows the prefix and not the token. The model
    runs as in :func:`token_stats`; no logits are computed.

    Args:
        model: a Hugging Face causal language model, PEFT or plain, of hidden size d.
        rollout: prompts ``[N, P]`` and completions ``[N, T]``.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.

    Returns:
        ``[number of completion tokens, d]`` in the order of ``completion_mask``, float32 (float64 inside
        ``float64_evaluation``), on the model's device.

    Raises:
        ValueError: if the token budget is not positive.
    """
    device, mask = model_device(model), rollout.completion_mask
    states = torch.empty(int(mask.sum()), head_sizes(model)[1], dtype=torch.float32, device=device)
    # Of each token, how many there are before it: its row in the result.
    place = (mask.flatten().cumsum(0) - 1).view(mask.shape).to(device)
    with evaluation(model), torch.no_grad():
        for part, where in parts(model, rollout, max_batch_tokens):
            states[place[where]] = emitting_states(model, part).to(states.dtype)
    return states


def _scored(model: nn.Module, rollout: Rollout, dtype: torch.dtype, max_batch_tokens: int | None) -> TokenStats:
    def score(part: Rollout) -> tuple[Tensor, Tensor]:
        return completion_stats(model, part, dtype)

    logp, entropy = over_micro_batches(model, rollout, score, outputs=2, max_batch_tokens=max_batch_tokens)
    return TokenStats(logp, entropy, rollout.completion_mask.to(logp.device))


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
