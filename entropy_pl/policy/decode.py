"""Decode a batch of prompts: the policy's ``generate`` in segments, between which finished rows leave the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from entropy_pl.policy.cache import sampling_cache
from entropy_pl.policy.generated import Watch
from entropy_pl.policy.wrapper import base_of, generates_by_itself, sampling_arguments


def rows_to_end_a_segment(rows: int) -> int:
    """How many of a segment's rows have to finish for it to end: an eighth, but 4 at least where there are as many.

    A segment costs a call of ``generate`` and a copy of the cache, so it should free more than a row or two.
    """
    return min(rows, max(rows // 8, 4))


@torch.no_grad()
def decode(
    model: PreTrainedModel | PeftModel,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    watch: Watch | None = None,
) -> Tensor:
    """Complete every prompt; a row that has finished is carried along only until enough others have.

    Random numbers are drawn at every step for the rows still in the batch, in their order: which ones a row gets
    depends on when the rows above it finish. A model from whose cache rows cannot be dropped (see `sampling_cache`)
    carries all rows to the end.

    Args:
        model: the policy, in eval mode; of a PEFT model its own ``generate`` is called.
        ids: prompts ``[B, P]``, padded on the left.
        mask: ``[B, P]``, True at tokens.
        config: how tokens are chosen. ``eos_token_id`` is a list of the tokens that finish a row, or None;
            ``max_new_tokens`` and ``pad_token_id`` are set.
        processors: applied to the logits ``[rows left, V]`` before the temperature.
        watch: one of the processors that has to know which rows are left.

    Returns:
        Completions ``[B, t]``, t <= max_new_tokens; what follows a row's first end token means nothing.
    """
    generate = cast("Callable[..., Tensor]", model.generate)
    arguments = sampling_arguments(model, ids, mask)
    prompt_width, tokens = ids.shape[1], cast("int", config.max_new_tokens)
    completions = ids.new_full((len(ids), tokens), cast("int", config.pad_token_id))
    rows, mask = torch.arange(len(ids), device=ids.device), mask.long()
    ends = torch.tensor(config.eos_token_id or [], dtype=ids.dtype, device=ids.device)
    cache = None if generates_by_itself(model) else sampling_cache(base_of(model))
    config = copy.deepcopy(config)
    while True:
        config.max_new_tokens = prompt_width + tokens - ids.shape[1]
        enough = _EnoughFinished(ends, ids, len(ids) if cache is None else rows_to_end_a_segment(len(ids)))
        ids = generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([enough]),
            **({} if cache is None else {"past_key_values": cache}),
            **arguments,
        )
        width = ids.shape[1] - prompt_width
        completions[rows, :width] = ids[:, prompt_width:]
        left = (~enough.finished).nonzero().squeeze(1)
        if watch is not None:
            watch.segment_ended(ids, left)
        if cache is None or width == tokens or len(left) == 0:
            return completions[:, :width]
        mask = nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        rows, ids, mask = rows[left], ids[left], mask[left]
        arguments = {name: [values[row] for row in left.tolist()] for name, values in arguments.items()}
        cache.batch_select_indices(left.cpu())  # layers may lie on several devices


class _EnoughFinished(StoppingCriteria):
    """Ends the segment once ``enough`` rows have finished, and notes which. Nothing here waits for the device."""

    def __init__(self, ends: Tensor, ids: Tensor, enough: int) -> None:
        self._ends, self._enough = ends, enough
        self.finished = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.finished |= torch.isin(input_ids[:, -1], self._ends)
        return self.finished | (self.finished.sum() >= self._enough)
