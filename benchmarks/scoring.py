"""Scoring a batch: a bare Hugging Face forward, the naive way, TRL's functions, and this package's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.options import Options
from benchmarks.policies import Case, build_case
from benchmarks.tables import Table
from benchmarks.timing import interleaved
from entropy_pl import Rollout, token_stats
from entropy_pl.policy.head import completion_logits
from entropy_pl.policy.micro_batches import compact, default_batch_tokens, micro_batches

BARE = "bare forward, all positions to the head"


@dataclass(frozen=True)
class Packed:
    """A micro-batch as every alternative gets it: made outside the times, and the same tokens for all.

    Args:
        ids: ``[n, L]``, packed to the left, padded on the right.
        completion: ``[n, L - 1]``, True at the positions that emit completion tokens.
        rollout: the same tokens, prompts padded on the left, completions on the right.
    """

    ids: Tensor
    completion: Tensor
    rollout: Rollout


def run(options: Options) -> list[Table]:
    """Ratios to the bare forward."""
    case = build_case(options)
    batches = packed(case.model, case.rollout)
    model, rollout = case.model, case.rollout
    alternatives: dict[str, Callable[[], object]] = {
        BARE: partial(bare_forward, model, batches),
        "bare forward, completion positions to the head": partial(each, completion_positions, model, batches),
        "naive: float64 log-softmax and entropy of [n, L, V]": partial(each, naive, model, batches),
        "TRL: selective_log_softmax + entropy_from_logits, float32": partial(each, trl_stats, model, batches),
        "token_stats, float64 entropies": partial(token_stats, model, rollout),
        "token_stats, float32 entropies": partial(token_stats, model, rollout, entropy_dtype=torch.float32),
    }
    times = interleaved(alternatives, options.rounds, case.device)
    rows = [(name, str(times.ratio(name, BARE)), f"{times.median(name):.2f}") for name in alternatives]
    return [Table("scoring", f"Scoring; {case.what}", ("work", "bare forward passes", "s"), rows)]


def packed(model: Any, rollout: Rollout, *, at_once: bool = False) -> list[Packed]:
    """The micro-batches that ``token_stats`` makes by itself, or one of all."""
    budget = default_batch_tokens(model)
    if at_once:
        budget = len(rollout) * int((rollout.prompt_lengths + rollout.completion_lengths).max())
    return [_packed(compact(rollout, rows)) for rows in micro_batches(rollout, budget)]


def _packed(part: Rollout) -> Packed:
    lengths = part.prompt_lengths + part.completion_lengths
    real = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    ids = torch.zeros(real.shape, dtype=torch.long, device=lengths.device)
    mask = torch.cat([part.prompt_mask, part.completion_mask], 1)
    ids[real] = torch.cat([part.prompt_ids, part.completion_ids], 1)[mask]
    place = torch.arange(1, real.shape[1], device=lengths.device)  # of the token emitted
    completion = (place >= part.prompt_lengths[:, None]) & (place < lengths[:, None])
    return Packed(ids, completion, part)


@torch.no_grad()
def bare_forward(model: Any, batches: list[Packed]) -> None:
    """What Hugging Face's model does when it is called; its logits are dropped."""
    for batch in batches:
        model(input_ids=batch.ids, use_cache=False)


@torch.no_grad()
def each(score: Callable[[Any, Packed], Any], model: Any, batches: list[Packed]) -> list[Any]:
    """One way of scoring, over all micro-batches."""
    return [score(model, batch) for batch in batches]


def completion_positions(model: Any, batch: Packed) -> None:
    """A forward whose head sees what it has to, all of it at once; its logits are dropped."""
    completion_logits(model, batch.rollout)


def naive(model: Any, batch: Packed) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies ``[number of completion tokens]`` from full float64 log-probs ``[n, L - 1, V]``."""
    logp = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
    return chosen[batch.completion], entropy[batch.completion]


def trl_stats(model: Any, batch: Packed) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies as TRL's GRPOTrainer has them: prompts padded on the left, the last T + 1 logits."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    part = batch.rollout
    ids = torch.cat([part.prompt_ids, part.completion_ids], 1)
    mask = torch.cat([part.prompt_mask, part.completion_mask], 1)
    kept = part.completion_ids.shape[1]
    output = model(input_ids=ids, attention_mask=mask.long(), logits_to_keep=kept + 1, use_cache=False)
    logits = output.logits[:, :-1]
    chosen, entropy = selective_log_softmax(logits, part.completion_ids), entropy_from_logits(logits)
    return chosen[part.completion_mask], entropy[part.completion_mask]


def reference(case: Case) -> Callable[[], object]:
    """The bare forward of a case, as other tables take it."""
    return partial(bare_forward, case.model, packed(case.model, case.rollout))
