"""The sampling cache against plain concatenation and against forward passes without a cache."""

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from entropy_pl.policy.cache import RoomyLayer, sampling_cache


def states(tokens: int, rows: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of 4 and values of 5 numbers per head: some models have them of different size."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 2, tokens, 4, generator=generator),
        torch.randn(rows, 2, tokens, 5, generator=generator),
    )


class TestRoomyLayer:
    @pytest.mark.parametrize("sizes", [(7, 1, 1, 1), (1,) * 70, (3, 80, 2), (64, 64, 1), (1, 63, 1, 64)])
    def test_it_holds_what_was_put_in(self, sizes):
        layer, pieces = RoomyLayer(), []
        for seed, size in enumerate(sizes):
            pieces.append(states(size, seed=seed))
            keys, values = layer.update(*pieces[-1])
            assert torch.equal(keys, torch.cat([k for k, _ in pieces], 2))
            assert torch.equal(values, torch.cat([v for _, v in pieces], 2))
            assert layer.get_seq_length() == keys.shape[2]

    def test_a_token_copies_nothing_while_there_is_room(self):
        layer = RoomyLayer()
        first, _ = layer.update(*states(5))
        places = {layer.update(*states(1))[0].data_ptr() for _ in range(RoomyLayer.ROOM)}
        assert places == {first.data_ptr()}
        assert layer.update(*states(1))[0].data_ptr() not in places

    @pytest.mark.parametrize(
        "change",
        [
            lambda layer: layer.batch_select_indices(torch.tensor([2, 0])),
            lambda layer: layer.batch_repeat_interleave(2),
            lambda layer: layer.reorder_cache(torch.tensor([1, 1, 0])),
            lambda layer: layer.crop(-2),
            lambda layer: layer.reset(),  # forgets, or fills with zeros, as the version has it
        ],
        ids=["select", "repeat", "reorder", "crop", "reset"],
    )
    def test_what_transformers_does_to_a_layer_can_be_done_and_gone_on_from(self, change):
        layer, plain = RoomyLayer(), DynamicLayer()
        for one in (layer, plain):
            one.update(*states(6))
            change(one)
        rows = 3 if plain.keys is None else len(plain.keys)
        for seed in (1, 2):
            more = states(1, rows=rows, seed=seed)
            kept, expected = layer.update(*more), plain.update(*more)
            assert torch.equal(kept[0], expected[0])
            assert torch.equal(kept[1], expected[1])

    def test_dropped_rows_do_not_hold_memory(self):
        layer = RoomyLayer()
        layer.update(*states(6))
        layer.batch_select_indices(torch.tensor([1]))
        assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * 4
        assert layer._stores is None


@torch.no_grad()
def test_after_dropping_rows_the_logits_are_those_of_a_forward_without_cache(tiny_model):
    """The whole sequence anew, un-padded: neither the room, nor the dropped rows, nor the padding may be seen."""
    model, cache = tiny_model.double(), sampling_cache(tiny_model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 50, (4, 9), generator=generator)
    lengths = torch.tensor([9, 2, 6, 4])
    mask = (torch.arange(9) >= 9 - lengths[:, None]).long()
    step = ids
    for drop in (None, [0, 2, 3], None, [1, 2], None, [1], None):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -step.shape[1] :]
        logits = model(
            input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        for row, tokens in enumerate(ids):
            fresh = model(input_ids=tokens[mask[row].bool()][None], use_cache=False).logits[0, -1]
            # Rotary tables and norms are float32 inside; sums in another order differ by its rounding.
            torch.testing.assert_close(logits[row], fresh, rtol=0, atol=1e-5)
        if drop is not None:
            cache.batch_select_indices(torch.tensor(drop))
            ids, mask = ids[drop], mask[drop]
        step = torch.randint(4, 50, (len(ids), 1), generator=generator)
        ids, mask = torch.cat([ids, step], 1), torch.nn.functional.pad(mask, (0, 1), value=1)
    assert len(ids) == 1


class TestSamplingCache:
    def test_every_layer_of_a_model_with_full_attention_has_room(self, tiny_model):
        cache = sampling_cache(tiny_model)
        assert isinstance(cache, DynamicCache)
        assert [type(layer) for layer in cache.layers] == [RoomyLayer] * 2

    def test_a_sliding_window_stays_transformers_own(self):
        config = MistralConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, sliding_window=4,
        )  # fmt: skip
        cache = sampling_cache(MistralForCausalLM(config))
        assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2

    def test_none_for_a_model_with_a_state_of_another_kind(self):
        config = MambaConfig(vocab_size=23, hidden_size=16, state_size=4, num_hidden_layers=1)
        assert sampling_cache(MambaForCausalLM(config)) is None
