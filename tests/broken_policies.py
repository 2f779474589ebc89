"""Policies that sample from another distribution than a forward pass says."""

from __future__ import annotations

from typing import Any

from peft import PeftModelForCausalLM
from tiny import build_model
from torch import nn
from transformers import Qwen2ForCausalLM


class Stale(Qwen2ForCausalLM):
    """Its cache fades: keys are not those that a pass over the whole sequence has."""

    def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        for layer in [] if past_key_values is None else past_key_values.layers:
            if layer.get_seq_length():
                layer.keys.mul_(0.9)
        return super().forward(*args, past_key_values=past_key_values, **kwargs)


class SeesPadding(Qwen2ForCausalLM):
    """It reads the padding that generate puts before short prompts."""

    def forward(self, *args: Any, attention_mask: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Crowded(Qwen2ForCausalLM):
    """What it says depends on how many sequences it is given at once."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * (1 + 0.01 * len(kwargs["input_ids"]))
        return output


class BaseSampler(PeftModelForCausalLM):
    """Its generate leaves the adapter out."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.disable_adapter():
            return super().generate(*args, **kwargs)


def broken(kind: type[Qwen2ForCausalLM]) -> nn.Module:
    model = build_model(logit_scale=2.0)
    model.__class__ = kind
    return model
