"""The Fisher kernel: how far a step on one completion moves the log-prob of another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from entropy_pl.attribution.kernel import DEFAULT_BYTES, KernelCost, gradient_kernel, kernel_cost
from entropy_pl.estimators import jackknife_standard_error
from entropy_pl.estimators.estimate import cluster_index
from entropy_pl.estimators.snis import Clusters
from entropy_pl.policy.adapter import trainable_parameters
from entropy_pl.policy.gradients import sequence_gradients
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.vector import Direction


def fisher_kernel(
    model: nn.Module,
    rollout_a: Rollout,
    rollout_b: Rollout,
    *,
    preconditioner: Direction | None = None,
    temperature: float | None = None,
    entropy_dtype: torch.dtype = torch.float64,
    max_bytes: int = DEFAULT_BYTES,
) -> Tensor:
    """K_ij = ⟨∇S_i, P ∇S_j⟩, S_i = Σ_k log π(t_ik): with P of an optimizer, what a unit step on j does to S_i.

    Gradients are taken one sequence at a time, and those of a block of b held: :func:`fisher_kernel_cost` says
    beforehand how many passes that makes.

    Args:
        model: a causal language model, at θ.
        rollout_a: ``[N_a, T_a]``.
        rollout_b: ``[N_b, T_b]``; the very object ``rollout_a`` makes a symmetric kernel for half the passes.
        preconditioner: P by parameter name (``UpdateVector.preconditioner``); its names are the parameters that count.
            None: P = 1 over the trainable parameters.
        temperature: that logits are divided by; None takes each rollout's own.
        entropy_dtype: dtype of the softmax.
        max_bytes: for the gradients of one block of b.

    Returns:
        ``[N_a, N_b]``, nats² per unit of θ², or nats per unit step with P; float64, on the CPU.

    Raises:
        ValueError: if not even one gradient fits into ``max_bytes``.
    """
    names = list(trainable_parameters(model) if preconditioner is None else preconditioner)
    metric = None if preconditioner is None else torch.cat([preconditioner[name].flatten() for name in names])

    def gradients(rollout: Rollout, start: int, end: int) -> Iterator[Tensor]:
        part = rollout.select(torch.arange(start, end, device=rollout.prompt_ids.device)).at_temperature(temperature)
        mask = part.completion_mask
        ones = TokenStats(mask.double(), torch.zeros_like(mask, dtype=torch.float64), mask)
        return sequence_gradients(model, part, ones, names, entropy_dtype=entropy_dtype)

    fisher_kernel_cost(model, rollout_a, rollout_b, preconditioner=preconditioner, max_bytes=max_bytes)
    kernel, _ = gradient_kernel(
        lambda start, end: gradients(rollout_a, start, end),
        len(rollout_a),
        lambda start, end: gradients(rollout_b, start, end),
        len(rollout_b),
        metric=metric,
        same=rollout_a is rollout_b,
        max_bytes=max_bytes,
    )
    return kernel


def fisher_kernel_cost(
    model: nn.Module,
    rollout_a: Rollout,
    rollout_b: Rollout,
    *,
    preconditioner: Direction | None = None,
    max_bytes: int = DEFAULT_BYTES,
) -> KernelCost:
    """What :func:`fisher_kernel` will take, with its arguments and errors.

    Args:
        model: as for :func:`fisher_kernel`.
        rollout_a: the rows' sequences.
        rollout_b: the columns' sequences.
        preconditioner: by parameter name; None takes all trainable parameters.
        max_bytes: the most that a block of gradients may take.
    """
    parameters = dict(model.named_parameters())
    names = list(trainable_parameters(model) if preconditioner is None else preconditioner)
    return kernel_cost(
        len(rollout_a),
        len(rollout_b),
        sum(parameters[name].numel() for name in names),
        same=rollout_a is rollout_b,
        itemsize=max(4, *(parameters[name].element_size() for name in names)),
        max_bytes=max_bytes,
    )


@dataclass(frozen=True)
class KernelSummary:
    """Means of a kernel over pairs of sequences, a sequence with itself left out; None where there is no such pair.

    Args:
        within_prompt: over pairs of completions of one prompt.
        between_prompts: over pairs of two prompts' completions.
        within_cosine: of K_ij/√(K_ii K_jj) likewise; only of a square kernel of one batch.
        between_cosine: likewise.
        within_stderr: of ``within_prompt``, by leaving out each prompt in turn; None without two prompts.
        between_stderr: likewise; None without three.
    """

    within_prompt: float | None
    between_prompts: float | None
    within_cosine: float | None
    between_cosine: float | None
    within_stderr: float | None
    between_stderr: float | None

    def to_dict(self) -> dict[str, float | None]:
        """As plain numbers."""
        return asdict(self)


def kernel_summary(kernel: Tensor, clusters: Clusters) -> KernelSummary:
    """How much completions share, within a prompt and between prompts.

    Args:
        kernel: of one batch with itself, ``[N, N]``.
        clusters: prompt of each sequence, ``[N]``.

    Raises:
        ValueError: if the kernel is not square, or the clusters are of another length.
    """
    count = len(kernel)
    if kernel.shape != (count, count):
        raise ValueError(f"expected the kernel of a batch with itself, [N, N], got {list(kernel.shape)}")
    prompts = torch.from_numpy(cluster_index(clusters, count))
    scale = kernel.diagonal().abs().clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    cosine = kernel * scale[:, None] * scale

    def mean(values: Tensor, within: bool, rows: Tensor) -> float | None:
        same = prompts[rows, None] == prompts[rows]
        pairs = (same & ~torch.eye(len(rows), dtype=torch.bool)) if within else ~same
        return float(values[rows][:, rows][pairs].mean()) if pairs.any() else None

    def stderr(within: bool) -> float | None:
        everything = torch.arange(count)
        kept = [everything[prompts != prompt] for prompt in prompts.unique()]
        if any(mean(kernel, within, rows) is None for rows in [everything, *kept]):
            return None
        return jackknife_standard_error(lambda rows: mean(kernel, within, rows) or 0.0, count, clusters=clusters)

    rows = torch.arange(count)
    return KernelSummary(
        within_prompt=mean(kernel, True, rows),
        between_prompts=mean(kernel, False, rows),
        within_cosine=mean(cosine, True, rows),
        between_cosine=mean(cosine, False, rows),
        within_stderr=stderr(True),
        between_stderr=stderr(False),
    )
