"""Position regimes: models that encode all positions of a batch otherwise once the longest of its sequences is long.

Longrope (Phi-3, Phi-4) has short and long rotary factors, and chooses between them by the longest sequence in the batch
of the moment. A token's log-prob then depends on how long its neighbours are, and of a completion that crosses the
boundary while it is generated the first tokens are drawn with other factors than a pass over all of it applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from entropy_pl.rollout import Rollout


def position_boundary(model: nn.Module) -> int | None:
    """The length beyond which the model encodes all positions otherwise, in tokens; None where there is none.

    Args:
        model: a Hugging Face language model, plain or PEFT.
    """
    config: Any = getattr(model, "config", None)
    getter = getattr(config, "get_text_config", None)
    config = config if getter is None else getter()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(rope, Mapping):
        return None
    settings = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]  # one for each kind of layer
    found = [
        one.get("original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None))
        for one in settings
        if one.get("rope_type", one.get("type")) == "longrope"
    ]
    return next((int(boundary) for boundary in found if boundary is not None), None)


def crossing(rollout: Rollout, boundary: int | None) -> Tensor:
    """Which sequences cross the boundary while they are generated, ``[N]``, bool.

    Args:
        rollout: the sequences.
        boundary: of :func:`position_boundary`.
    """
    prompts = rollout.prompt_lengths
    if boundary is None:
        return prompts < 0
    return (prompts <= boundary) & (prompts + rollout.completion_lengths > boundary)
