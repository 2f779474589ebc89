"""From logits to log-probs and entropies, a bounded number of rows at a time."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

STATS_CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}  # what is not a CPU is taken for a GPU
"""Of one chunk of logits in the entropy's dtype, of which a handful of copies are made. On a CPU it must stay in a
core's caches (a chunk of 128 MiB took 5 to 15 times as long); on a GPU it must be large enough to be worth a launch."""


_COMPILED: ContextVar[bool] = ContextVar("compiled_statistics", default=False)


class NonFiniteError(ArithmeticError):
    """The policy's logits are NaN or infinite, so that no log-prob can be had from them."""


def logits_to_stats(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-prob of the targets and entropy of softmax(logits / temperature), in nats.

    With z the logits less their maximum and Z = Σ e^z: log π(t) = z_t − log Z, and −Σ π log π = log Z − Σ z e^z / Z,
    one exponential a logit.

    Args:
        logits: ``[n, V]``.
        targets: ``[n]``.
        temperature: > 0.
        dtype: to compute in.

    Returns:
        ``log π(target)`` and ``−Σ π log π``, ``[n]`` each. A logit of −inf is a token of probability zero.
    """
    z = logits.to(dtype)
    if temperature != 1:
        z = z / temperature
    z = z - z.amax(-1, keepdim=True).detach()
    target = z.gather(-1, targets[:, None]).squeeze(-1)
    z = z.clamp(min=torch.finfo(dtype).min)  # 0 · log 0 = 0
    exponential = z.exp()
    total = exponential.sum(-1)
    log_total = total.log()
    return target - log_total, log_total - (exponential * z).sum(-1) / total


def chunked_stats(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As :func:`logits_to_stats`, a bounded number of rows at a time: ``dtype`` may be wider than the logits'."""
    rows = stats_chunk(logits.shape[-1], logits.device.type, dtype)
    chunks = zip(logits.split(rows), targets.split(rows), strict=True)
    reduce = _compiled_stats if _COMPILED.get() else logits_to_stats
    return joined(reduce(chunk, target, temperature, dtype) for chunk, target in chunks)


@contextmanager
def compiled_statistics(on: bool = True) -> Iterator[None]:
    """Within the block :func:`chunked_stats` is one kernel made by ``torch.compile``.

    It computes the same, in another order of summation, and wants a C++ compiler (on a GPU Triton). Where it cannot be
    made, a warning says why and the statistics are made without it.

    Args:
        on: whether it does; False also turns an outer block off.
    """
    token = _COMPILED.set(on)
    try:
        yield
    finally:
        _COMPILED.reset(token)


def _compiled_stats(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    try:
        found: tuple[Tensor, Tensor] = _kernel()(logits, targets, temperature, dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the compilers of this machine raise
        _kernel.cache_clear()
        warnings.warn(
            f"expected a kernel from torch.compile, got {type(error).__name__}: {str(error).splitlines()[0]}; the "
            "statistics are made without it: install a C++ compiler (on a GPU Triton), or leave compile_statistics off",
            stacklevel=2,
        )
        _COMPILED.set(False)
        return logits_to_stats(logits, targets, temperature, dtype)
    return found


@functools.cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(logits_to_stats, dynamic=True)


def joined(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Statistics of consecutive tokens as one."""
    logp, entropy = (torch.cat(values) for values in zip(*parts, strict=True))
    return logp, entropy


def check_finite(logp: Tensor, entropy: Tensor, model: nn.Module) -> None:
    """Refuse statistics made of logits that are NaN or infinite.

    Args:
        logp: of completion tokens, ``[n]``.
        entropy: likewise.
        model: behind them, whose parameters are looked at for the reason.

    Raises:
        NonFiniteError: with how many tokens they are, and what is wrong with the model.
    """
    bad = ~torch.isfinite(logp + entropy)
    if bad.any():
        raise NonFiniteError(
            f"expected finite logits, got NaN or infinity at {int(bad.sum())} of {len(logp)} completion tokens: "
            f"{why_not_finite(model)}; the policy has diverged, go on from an earlier checkpoint, or this step was too "
            "long for it, measure at smaller η"
        )


def why_not_finite(model: nn.Module) -> str:
    """The parameter behind logits that are not finite, in words.

    Args:
        model: that gave them.

    Returns:
        Its name and how many of its numbers are not finite; or that all are.
    """
    for name, parameter in model.named_parameters():
        bad = int((~parameter.detach().isfinite()).sum()) if parameter.is_floating_point() else 0
        if bad:
            return f"{bad} of {parameter.numel()} numbers of {name} are not finite"
    return "all parameters are finite, an activation overflows"


def logits_gradient(
    logits: Tensor, targets: Tensor, a: Tensor, b: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """∂/∂logits of Σ a log p_t + b h, ``[n, V]``, in the logits' dtype."""
    result = torch.empty_like(logits)
    rows = stats_chunk(logits.shape[-1], logits.device.type, dtype)
    for start in range(0, len(logits), rows):
        chunk = slice(start, start + rows)
        log_p = (logits[chunk].to(dtype) / temperature).log_softmax(-1).clamp_(min=torch.finfo(dtype).min)
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1, keepdim=True)
        a_chunk, b_chunk = (x[chunk, None].to(dtype) for x in (a, b))
        # p first: where it is zero, b times the log-prob could overflow.
        gradient = log_p.add_(entropy).mul_(p).mul_(b_chunk).addcmul_(p, a_chunk).neg_()
        gradient.scatter_add_(-1, targets[chunk, None], a_chunk)
        result[chunk] = gradient.div_(temperature).to(logits.dtype)
    return result


def stats_chunk(vocabulary: int, device_type: str, dtype: torch.dtype) -> int:
    """How many tokens' logits become statistics at once."""
    limit = STATS_CHUNK_BYTES.get(device_type, STATS_CHUNK_BYTES["cuda"])
    return max(1, limit // (dtype.itemsize * vocabulary))
