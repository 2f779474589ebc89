"""What a policy says of tokens it already sampled: log-probs and entropies, in micro-batches of bounded size.

Sequences are packed to the left and padded on the right, so that a causal model needs no attention mask and no
position ids: real tokens never see padding. Only completion positions reach the vocabulary head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.policy.precision import evaluation
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.displace import displaced
from entropy_pl.updates.vector import UpdateVector

MAX_LOGITS_BYTES = 2**30  # of one micro-batch, in float32; what bounds memory when no token budget is given
HEAD_CHUNK_BYTES = 2**27  # of one chunk of logits in the entropy's dtype


class NonFiniteError(ArithmeticError):
    """The policy's logits are NaN or infinite, so that no log-prob can be had from them."""


def token_stats(
    model: nn.Module,
    rollout: Rollout,
    *,
    update: UpdateVector | None = None,
    eta: float = 0.0,
    temperature: float = 1.0,
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
        temperature: of the sampling distribution; logits are divided by it.
        entropy_dtype: the dtype of softmax, log-prob and entropy.
        max_batch_tokens: padded tokens per micro-batch; None bounds the logits' memory.

    Returns:
        Statistics in nats, ``[N, T]``, float64, zero where the mask is False.

    Raises:
        NonFiniteError: if a logit is NaN or +inf.
        ValueError: for a temperature or token budget that is not positive, or an eta without an update.
    """
    if eta != 0 and update is None:
        raise ValueError(f"expected an update to go with eta={eta:g}, got none: token_stats(..., update=v, eta=...)")
    with evaluation(model), torch.no_grad():
        if update is not None and eta != 0:
            with displaced(model, update, eta):
                return _scored(model, rollout, temperature, entropy_dtype, max_batch_tokens)
        return _scored(model, rollout, temperature, entropy_dtype, max_batch_tokens)


def policy_stats(
    model: nn.Module,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    entropy_gradient: bool = False,
) -> TokenStats:
    """The same statistics with a gradient, in one forward pass, in whatever mode and autocast the caller chose.

    For training losses. Entropies carry a gradient only when asked, since the graph behind them is as large as the
    logits.

    Args:
        model: a causal language model.
        rollout: one micro-batch, ``[n, P]`` and ``[n, T]``.
        temperature: of the sampling distribution.
        dtype: the dtype of softmax, log-prob and entropy.
        entropy_gradient: whether entropies are differentiable.

    Returns:
        Statistics in nats, ``[n, T]``, of ``dtype``.
    """
    logits, mask = completion_logits(model, rollout), rollout.completion_mask
    targets = rollout.completion_ids[mask]
    logp, entropy = logits_to_stats(logits, targets, temperature, dtype)
    if not entropy_gradient:
        entropy = entropy.detach()
    return TokenStats(_scatter(logp, mask), _scatter(entropy, mask), mask)


def completion_logits(model: nn.Module, rollout: Rollout) -> Tensor:
    """Logits that predict the completion tokens, ``[number of tokens, V]`` in the order of ``completion_mask``."""
    ids, rows, columns = _packed(rollout)
    with _head_reads(model, lambda hidden: hidden[rows, columns][None]):
        return model(input_ids=ids, use_cache=False).logits[0]


def head_inputs(model: nn.Module, rollout: Rollout, *, max_batch_tokens: int | None = None) -> Tensor:
    """The last hidden states at θ that emit the completion tokens: the vocabulary head's inputs, without gradient.

    The state that emits token k is the one at the position before it: it knows the prefix and not the token. The model
    runs as in :func:`token_stats`; no logits are computed.

    Args:
        model: a Hugging Face causal language model, PEFT or plain, of hidden size d.
        rollout: prompts ``[N, P]`` and completions ``[N, T]``.
        max_batch_tokens: padded tokens per micro-batch; None bounds what the logits would take.

    Returns:
        ``[number of completion tokens, d]`` in the order of ``completion_mask``, float32 (float64 inside
        ``float64_evaluation``), on the model's device.

    Raises:
        ValueError: if the token budget is not positive.
    """
    device, mask = model_device(model), rollout.completion_mask
    states = torch.empty(int(mask.sum()), output_head(model).in_features, dtype=torch.float32, device=device)
    # Of each token, how many there are before it: its row in the result.
    place = (mask.flatten().cumsum(0) - 1).view(mask.shape).to(device)
    with evaluation(model), torch.no_grad():
        for part, where in _parts(model, rollout, max_batch_tokens):
            states[place[where]] = _emitting_states(model, part).to(states.dtype)
    return states


def logits_to_stats(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets and entropy of softmax(logits / temperature), in nats.

    Args:
        logits: ``[n, V]``.
        targets: ``[n]``.
        temperature: > 0.
        dtype: to compute in.

    Returns:
        ``log π(target)`` and ``−Σ π log π``, ``[n]`` each. A logit of −inf is a token of probability zero.
    """
    z = logits.to(dtype) / temperature
    z = z - z.amax(-1, keepdim=True).detach()
    log_z = z.exp().sum(-1).log()
    logp = z.gather(-1, targets[:, None]).squeeze(-1) - log_z
    z = z.clamp(min=torch.finfo(dtype).min)  # 0 · log 0 = 0
    entropy = log_z - ((z - log_z[:, None]).exp() * z).sum(-1)
    return logp, entropy


def chunked_stats(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`logits_to_stats`, a bounded number of rows at a time: ``dtype`` may be wider than the logits'."""
    rows = max(1, HEAD_CHUNK_BYTES // (dtype.itemsize * logits.shape[-1]))
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    parts = [logits_to_stats(chunk, target, temperature, dtype) for chunk, target in chunks]
    logp, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return logp, entropy


def check_finite(logp: Tensor, entropy: Tensor) -> None:
    """Refuse statistics made of logits that are NaN or infinite.

    Raises:
        NonFiniteError: with how many tokens they are.
    """
    bad = ~torch.isfinite(logp + entropy)
    if bad.any():
        raise NonFiniteError(
            f"expected finite logits, got NaN or infinity at {int(bad.sum())} of {len(logp)} completion tokens: the "
            "policy has diverged, or this step was too long for it"
        )


def micro_batches(rollout: Rollout, max_batch_tokens: int) -> list[Tensor]:
    """Row indices in groups whose padded size, rows × longest, stays within the budget; like lengths together.

    A sequence longer than the budget gets a micro-batch of its own. Rows without a completion token are left out.

    Raises:
        ValueError: if the budget is not positive.
    """
    if max_batch_tokens < 1:
        raise ValueError(f"expected max_batch_tokens ≥ 1, got {max_batch_tokens}")
    lengths = (rollout.prompt_lengths + rollout.completion_lengths).tolist()
    occupied = rollout.completion_lengths.gt(0).tolist()
    order = sorted((i for i in range(len(lengths)) if occupied[i]), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= max_batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [torch.tensor(group, device=rollout.prompt_ids.device) for group in groups]


def default_batch_tokens(model: nn.Module) -> int:
    """Padded tokens per micro-batch that keep its logits within a gibibyte, between 256 and 16,384."""
    return int(min(16_384, max(256, MAX_LOGITS_BYTES // (4 * output_head(model).weight.shape[0]))))


def output_head(model: nn.Module) -> Any:
    """The layer that maps hidden states to logits.

    Raises:
        ValueError: if the model is not a Hugging Face language model.
    """
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if head is None:
        raise ValueError(f"expected a Hugging Face causal language model, got {type(model).__name__} without a head")
    return head


def model_device(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: with its token embeddings."""
    return next(model.parameters()).device


def compact(rollout: Rollout, rows: Tensor) -> Rollout:
    """A micro-batch of the rollout with the columns that are all padding cut off."""
    part = rollout.select(rows)
    prompts, completions = int(part.prompt_lengths.max()), int(part.completion_lengths.max())
    start = part.prompt_ids.shape[1] - prompts
    return Rollout(
        part.prompt_ids[:, start:],
        part.prompt_mask[:, start:],
        part.completion_ids[:, :completions],
        part.completion_mask[:, :completions],
    )


def over_micro_batches(
    model: nn.Module,
    rollout: Rollout,
    score: Callable[[Rollout], tuple[Tensor, ...]],
    *,
    outputs: int,
    max_batch_tokens: int | None,
) -> list[Tensor]:
    """Call ``score`` on micro-batches and put its flat per-token outputs back in place.

    Args:
        model: decides device and default budget.
        rollout: ``[N, T]``.
        score: micro-batch → ``outputs`` tensors, one number per completion token in the order of its mask.
        outputs: how many.
        max_batch_tokens: the budget; None is the model's default.

    Returns:
        ``outputs`` tensors ``[N, T]``, float64, zero where the mask is False, on the model's device.
    """
    shape, device = rollout.completion_ids.shape, model_device(model)
    results = [torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(outputs)]
    for part, where in _parts(model, rollout, max_batch_tokens):
        for result, values in zip(results, score(part), strict=True):
            result[where] = values.double()
    return results


def _parts(
    model: nn.Module, rollout: Rollout, max_batch_tokens: int | None
) -> Iterator[tuple[Rollout, tuple[Tensor, Tensor]]]:
    """The micro-batches on the model's device, and where in ``[N, T]`` their completion tokens lie, in mask order."""
    rollout = rollout.to(model_device(model))
    for rows in micro_batches(rollout, default_batch_tokens(model) if max_batch_tokens is None else max_batch_tokens):
        part = compact(rollout, rows)
        row, column = part.completion_mask.nonzero(as_tuple=True)
        yield part, (rows[row], column)


def _scored(
    model: nn.Module, rollout: Rollout, temperature: float, dtype: torch.dtype, max_batch_tokens: int | None
) -> TokenStats:
    if not temperature > 0:
        raise ValueError(f"expected a temperature > 0, got {temperature}")

    def score(part: Rollout) -> tuple[Tensor, Tensor]:
        targets = part.completion_ids[part.completion_mask]
        logp, entropy = chunked_stats(completion_logits(model, part), targets, temperature, dtype)
        check_finite(logp, entropy)
        return logp, entropy

    logp, entropy = over_micro_batches(model, rollout, score, outputs=2, max_batch_tokens=max_batch_tokens)
    return TokenStats(logp, entropy, rollout.completion_mask.to(logp.device))


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def _packed(rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids ``[n, L]``, packed to the left, and rows and columns of the positions that emit completion tokens."""
    mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], 1)
    order = (~mask).int().argsort(dim=1, stable=True)  # real tokens first, in their order
    length = int(mask.sum(1).max())
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1).masked_fill(~mask, 0)
    rows, columns = rollout.completion_mask.nonzero(as_tuple=True)
    columns = rollout.prompt_lengths[rows] + columns - 1  # the position before a token predicts it
    return ids.gather(1, order)[:, :length], rows, columns


def _emitting_states(model: nn.Module, rollout: Rollout) -> Tensor:
    """The hidden states that emit the completion tokens of one micro-batch, ``[number of tokens, d]``."""
    ids, rows, columns = _packed(rollout)
    states: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        states.append(hidden[rows, columns])
        return hidden[:, :0]  # nothing is left for the head to do

    with _head_reads(model, keep):
        model(input_ids=ids, use_cache=False)
    return states[0]


@contextmanager
def _head_reads(model: nn.Module, chosen: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Make the vocabulary head see ``chosen(hidden)``, a few positions of the hidden states, as ``[1, n, hidden]``.

    A hook on the head's input works for every architecture and keeps what a model does to its logits afterwards.
    """

    def choose(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (chosen(args[0]), *args[1:])

    handle = output_head(model).register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()
