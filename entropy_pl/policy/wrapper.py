"""PEFT's wrapper around the policy: what it does in ``generate`` and in ``forward`` beside what its layers do.

Completions are drawn through ``PeftModel.generate`` and scored through ``PeftModel.forward``, so that adapters which
act there (activated LoRA, X-LoRA) act on both alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from entropy_pl.rollout import Rollout


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The Hugging Face model inside the wrapper, whose configuration and embeddings are the policy's.

    Raises:
        ValueError: for an adapter that learns prompts.
    """
    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError("expected a LoRA adapter, got one that learns prompts: completions would be scored without it")
    base: PreTrainedModel = model.get_base_model()
    return base


def generates_by_itself(model: nn.Module) -> bool:
    """Whether the adapter brings a ``generate`` of its own, as X-LoRA's does, which allows no cache.

    Such an adapter may also run the model's body more than once in a forward pass.
    """
    return isinstance(model, PeftModel) and hasattr(type(model.base_model), "generate")


def sampling_arguments(model: nn.Module, ids: Tensor, mask: Tensor) -> dict[str, Any]:
    """What ``generate`` has to be told beside the prompts.

    Of activated LoRA: where in every prompt it begins to act. PEFT would look for the invocation in all tokens so far
    whenever sampling is continued; a completion that happens to repeat the invocation does not begin anew.

    Args:
        model: the policy.
        ids: prompts ``[B, P]``, padded on the left.
        mask: ``[B, P]``, True at tokens.
    """
    invocation = _invocation(model)
    if invocation is None:
        return {}
    return {"alora_offsets": _offsets(_last_occurrence(ids, mask, invocation), ids.shape[1])}


def scoring_arguments(model: nn.Module, rollout: Rollout, length: int) -> dict[str, Any]:
    """What ``forward`` has to be told beside the tokens, for sequences packed to the left.

    Args:
        model: the policy.
        rollout: a micro-batch.
        length: columns of the packed sequences.
    """
    policy: Any = getattr(model, "_orig_mod", model)  # a compiled model's arguments are those of what it wraps
    invocation = _invocation(policy)
    if invocation is None:
        return {}
    starts = _last_occurrence(rollout.prompt_ids, rollout.prompt_mask, invocation)
    padding = (rollout.prompt_ids.shape[1] - rollout.prompt_lengths).tolist()
    packed = [None if start is None else start - pad for start, pad in zip(starts, padding, strict=True)]
    return {"alora_offsets": _offsets(packed, length)}


def head_sees_positions(model: nn.Module, head: nn.Module) -> bool:
    """Whether the vocabulary head carries an adapter that acts by position: then it must be given all of them."""
    by_position = _invocation(model) is not None or generates_by_itself(model)
    return by_position and isinstance(head, BaseTunerLayer)


@contextmanager
def wrapper_kept(model: nn.Module) -> Iterator[None]:
    """Put back the attributes that PEFT's wrapper and its tuner leave on themselves when they generate or score."""
    modules = (model, model.base_model) if isinstance(model, PeftModel) else ()
    kept = [(vars(module), dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for attributes, before in kept:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)


def _invocation(model: nn.Module) -> list[int] | None:
    """The tokens from which on an activated LoRA acts."""
    if not isinstance(model, PeftModel):
        return None
    return getattr(model.active_peft_config, "alora_invocation_tokens", None) or None


def _last_occurrence(ids: Tensor, mask: Tensor, wanted: list[int]) -> list[int | None]:
    """The column at which the tokens begin for the last time in each row, ``[B, P]``; None where they do not."""
    if ids.shape[1] < len(wanted):
        return [None] * len(ids)
    windows = ids.masked_fill(~mask.bool(), -1).unfold(1, len(wanted), 1)
    found = (windows == torch.tensor(wanted, device=ids.device)).all(-1)
    last = found.shape[1] - 1 - found.flip(1).int().argmax(1)
    return [column if there else None for column, there in zip(last.tolist(), found.any(1).tolist(), strict=True)]


def _offsets(starts: list[int | None], length: int) -> list[int | None]:
    """PEFT counts from the end."""
    return [None if start is None else length - start for start in starts]
