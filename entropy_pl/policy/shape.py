"""The sizes of a language model that decide what a pass costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from entropy_pl.policy.head import head_sizes

SAVED_HIDDEN, SAVED_INNER = 10, 4  # numbers a layer keeps for its backward pass, per token, in hidden and inner sizes
BACKWARD = 2  # times that at its peak: as measured, what is kept and about as much on the way back


@dataclass(frozen=True)
class ModelShape:
    """Sizes as the model's configuration names them.

    Args:
        hidden: d, of the residual stream.
        inner: of the feed-forward layers; 4d where the configuration does not say.
        layers: their number.
        heads: of attention.
        kv_heads: heads of keys and values.
        head_size: numbers per head.
        vocabulary: V, rows of the output head.
        fused: whether attention never holds the scores of all pairs of positions.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    fused: bool

    @classmethod
    def of(cls, model: nn.Module) -> ModelShape:
        """The shape of a Hugging Face language model, plain or PEFT.

        Raises:
            ValueError: if the model has no output head.
        """
        config = _text_config(getattr(model, "config", None))
        vocabulary, hidden = head_sizes(model)
        heads = _size(config, "num_attention_heads", 1)
        return cls(
            hidden=hidden,
            inner=_size(config, "intermediate_size", 4 * hidden),
            layers=_size(config, "num_hidden_layers", 1),
            heads=heads,
            kv_heads=_size(config, "num_key_value_heads", heads),
            head_size=_size(config, "head_dim", hidden // heads),
            vocabulary=vocabulary,
            fused=getattr(config, "_attn_implementation", None) != "eager",
        )

    @property
    def activations(self) -> int:
        """Numbers that a pass without a graph holds per token, of one layer at a time."""
        return 8 * self.hidden + 3 * self.inner

    @property
    def graph_of_body(self) -> int:
        """Numbers that a pass holds per token for its backward pass, the head left out.

        As if nothing were checkpointed: a probe runs in eval mode, in which Transformers checkpoints nothing.
        """
        return BACKWARD * self.layers * (SAVED_HIDDEN * self.hidden + SAVED_INNER * self.inner)

    @property
    def graph_of_head(self) -> int:
        """Numbers that a pass holds for the logits of a token and their backward pass."""
        return BACKWARD * self.vocabulary

    @property
    def cache(self) -> int:
        """Numbers in the keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size


def _text_config(config: Any) -> Any:
    """The language model's part of a configuration, where there are several."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _size(config: Any, name: str, default: int) -> int:
    """A number of a configuration; of one for each layer the largest."""
    try:
        value = getattr(config, name, None)
    except Exception:  # Transformers has configurations that raise where layers differ
        value = None
    largest = max(value) if isinstance(value, list | tuple) and value else value
    return int(largest) if largest else default
