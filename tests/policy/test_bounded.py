"""How large the largest tensor of a pass is: what decides whether a long completion over a large vocabulary fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from test_precision import random_update
from test_score import build_rollout
from tiny import build_model
from torch.utils._python_dispatch import TorchDispatchMode

from entropy_pl.policy.head import HEAD_CHUNK_BYTES
from entropy_pl.policy.logits import STATS_CHUNK_BYTES
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import Rollout

PROMPT = 3


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes, by dtype; views make none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[torch.dtype, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                held = tensor.untyped_storage().nbytes()
                self.bytes[tensor.dtype] = max(self.bytes.get(tensor.dtype, 0), held)
        return out


def completion(tokens: int) -> Rollout:
    return build_rollout(((PROMPT, tokens),))


@pytest.mark.parametrize("method", ["scored", "central_difference", "forward_mode"])
def test_logits_of_a_long_completion_never_exist_together(method):
    """1,000 tokens over 30,000 words: all logits would be 120 MB in float32, and 240 MB in float64."""
    tokens, vocabulary = 1000, 30_000
    model = build_model(vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, max_position_embeddings=2048)
    update = random_update(model)
    with Largest() as largest:
        if method == "scored":
            token_stats(model, completion(tokens))
        else:
            token_stats_jvp(model, completion(tokens), update, method=method)
    assert largest.bytes[torch.float32] <= HEAD_CHUNK_BYTES["cpu"] < tokens * vocabulary * 4
    assert largest.bytes[torch.float64] <= max(STATS_CHUNK_BYTES["cpu"], 8 * vocabulary * 8)


@pytest.mark.parametrize("method", ["central_difference", "forward_mode"])
def test_tangents_are_linear_in_the_length_of_a_completion(method):
    """PyTorch's unfused attention, through which forward mode would go, makes scores of the length squared."""
    model = build_model(vocab_size=50, hidden_size=8, num_attention_heads=2, max_position_embeddings=2048)
    update = random_update(model)
    held = []
    for length in (512, 1024, 2048):  # whole blocks of queries
        with Largest() as largest:
            token_stats_jvp(model, completion(length - PROMPT), update, method=method)
        held.append(largest.bytes[torch.float32])
    assert held[1] <= 2.01 * held[0]  # completion positions: 1021 of 1024, and 509 of 512
    assert held[2] <= 2.01 * held[1]
