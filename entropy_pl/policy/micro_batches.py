"""Micro-batches of like length, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import psutil
import torch
from torch import Tensor, nn

from entropy_pl.policy.positions import position_boundary
from entropy_pl.policy.shape import ModelShape
from entropy_pl.rollout import Rollout

MIN_TOKENS = 256
MAX_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Per micro-batch, where memory allows more: a CPU is fastest while a layer's activations stay in its caches, and more
than this does not make a GPU busier."""
MAX_GRAPH_TOKENS = {"cpu": 2048, "cuda": 8192}
"""The same for a pass with a backward pass to follow."""
SHARE_OF_FREE_MEMORY = 0.25


def micro_batches(rollout: Rollout, max_batch_tokens: int, boundary: int | None = None) -> list[Tensor]:
    """Row indices in groups whose padded size, rows × longest, stays within the budget; like lengths together.

    A sequence longer than the budget gets a micro-batch of its own. Rows without a completion token are left out.

    Args:
        rollout: ``[N, T]``.
        max_batch_tokens: the budget.
        boundary: of :func:`~entropy_pl.policy.positions.position_boundary`; sequences beyond it, and up to it, are
            never together.

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
        longest = lengths[groups[-1][0]] if groups else 0
        together = boundary is None or (longest > boundary) == (lengths[i] > boundary)
        if groups and together and (len(groups[-1]) + 1) * longest <= max_batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [torch.tensor(group, device=rollout.prompt_ids.device) for group in groups]


def default_batch_tokens(model: nn.Module, rollout: Rollout | None = None, *, graph: bool = False) -> int:
    """Padded tokens per micro-batch where none are given, from the model's shape and the memory that is free.

    A power of two, so that runs with about the same memory free take the same: micro-batches change the rounding.

    Args:
        model: a language model; its activations are taken to be in float32, or the default dtype if that is wider.
        rollout: what is to be scored; its longest sequence tells what attention that is not fused will take.
        graph: whether a backward pass follows, for which activations of all layers are kept.

    Returns:
        As many as fit into a quarter of the free memory, between 256 and what keeps the device busy.
    """
    device, shape = model_device(model), ModelShape.of(model)
    numbers = shape.graph_of_body + shape.graph_of_head if graph else shape.activations
    # On a GPU PyTorch has no fused attention in float64.
    fused = shape.fused and (device.type == "cpu" or torch.get_default_dtype() != torch.float64)
    if rollout is not None and len(rollout) and not fused:
        longest = int((rollout.prompt_lengths + rollout.completion_lengths).max())
        numbers += 2 * shape.heads * longest * (shape.layers if graph else 1)  # scores and their softmax
    fitting = SHARE_OF_FREE_MEMORY * _free_bytes(device) / (numbers * torch.get_default_dtype().itemsize)
    limits = MAX_GRAPH_TOKENS if graph else MAX_TOKENS
    most = limits.get(device.type, limits["cuda"])
    return max(MIN_TOKENS, min(most, 2 ** max(0, int(fitting).bit_length() - 1)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(psutil.virtual_memory().available)


def model_device(model: nn.Module) -> torch.device:
    """Where the model's inputs belong: with its token embeddings."""
    return next(model.parameters()).device


def compact(rollout: Rollout, rows: Tensor) -> Rollout:
    """A micro-batch of the rollout with the columns that are all padding cut off."""
    part = rollout.select(rows)
    prompts, completions = int(part.prompt_lengths.max()), int(part.completion_lengths.max())
    start = part.prompt_ids.shape[1] - prompts
    return replace(
        part,
        prompt_ids=part.prompt_ids[:, start:],
        prompt_mask=part.prompt_mask[:, start:],
        completion_ids=part.completion_ids[:, :completions],
        completion_mask=part.completion_mask[:, :completions],
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
    for part, where in parts(model, rollout, max_batch_tokens):
        for result, values in zip(results, score(part), strict=True):
            result[where] = values.double()
    return results


def parts(
    model: nn.Module, rollout: Rollout, max_batch_tokens: int | None
) -> Iterator[tuple[Rollout, tuple[Tensor, Tensor]]]:
    """The micro-batches on the model's device, and where in ``[N, T]`` their completion tokens lie, in mask order."""
    rollout = rollout.to(model_device(model))
    if max_batch_tokens is None:
        max_batch_tokens = default_batch_tokens(model, rollout)
    for rows in micro_batches(rollout, max_batch_tokens, position_boundary(model)):
        part = compact(rollout, rows)
        row, column = part.completion_mask.nonzero(as_tuple=True)
        yield part, (rows[row], column)
