"""A KV cache for sampling in which a new token costs one write, and finished rows can leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):
    """Transformers' dynamic layer with room for tokens to come.

    The parent concatenates, which copies every key and value at every token. Here ``keys`` and ``values`` are views
    ``[B, heads, tokens, head size]`` of the first columns of larger tensors, and only new columns are written.
    """

    ROOM = 64
    """Columns of room made whenever there is none left: one copy in 65 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self._stores: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, new tokens, head size]``; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = cast("tuple[Tensor, Tensor]", (self.keys, self.values))
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        stores = self._stores
        # Transformers' other methods (reorder, repeat, reset) put new tensors in the place of the views.
        if stores is None or stores[0].data_ptr() != held[0].data_ptr() or stores[0].shape[-2] < end:
            stores = self._larger(held[0], key_states, end), self._larger(held[1], value_states, end)
            self._stores = stores
        stores[0][..., start:end, :] = key_states
        stores[1][..., start:end, :] = value_states
        self.keys, self.values = stores[0][..., :end, :], stores[1][..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows only; the memory of the others is free at once."""
        super().batch_select_indices(indices)
        self._stores = None

    def _larger(self, held: Tensor, states: Tensor, end: int) -> Tensor:
        store = states.new_empty((*states.shape[:-2], end + self.ROOM, states.shape[-1]))
        if held.numel():
            store[..., : held.shape[-2], :] = held
        return store


def sampling_cache(generator: PreTrainedModel) -> DynamicCache | None:
    """An empty cache from which rows can be dropped while sampling goes on.

    Returns:
        The cache that ``generate`` would make for the model, its full-attention layers with room for tokens to come; or
        None for a model that keeps anything but keys and values (a recurrent state, say) or makes its own cache.
    """
    takes_dynamic_cache = cast("Callable[[], bool]", generator._supports_default_dynamic_cache)
    if generator.config.is_encoder_decoder or not takes_dynamic_cache():
        return None
    cache = DynamicCache(config=generator.config.get_text_config(decoder=True))
    if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers):
        return None
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
