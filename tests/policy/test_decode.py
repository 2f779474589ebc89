"""Decoding in segments against Transformers' own ``generate``, one prompt at a time."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from entropy_pl.policy.decode import decode, rows_to_end_a_segment
from entropy_pl.policy.precision import float64_evaluation

VOCABULARY, PAD, ENDS, TOKENS = 23, 0, [1, 5, 9], 24
_SHARED = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "eos_token_id": None, "bos_token_id": None}
_ROTARY = _SHARED | {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.6,
    "tie_word_embeddings": False,
}
_GEMMA = _ROTARY | {"head_dim": 8}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_ROTARY)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_ROTARY)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**_GEMMA)),
    # Windows shorter than the sequences, in every layer and in every second one.
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_ROTARY, sliding_window=6)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**_GEMMA, sliding_window=6, query_pre_attn_scalar=8, attn_implementation="eager")
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**_SHARED, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.6)
    ),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            **_SHARED, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.6, tie_word_embeddings=False,
        )
    ),
    # A recurrent state, of which no rows are dropped.
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(**_SHARED, hidden_size=16, state_size=4, num_hidden_layers=2, initializer_range=0.6)
    ),
}  # fmt: skip


def build_family(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name]().eval()


def greedy(**options: object) -> GenerationConfig:
    options = {"top_k": 1, "eos_token_id": ENDS, "max_new_tokens": TOKENS, "pad_token_id": PAD} | options
    return GenerationConfig(do_sample=True, use_cache=True, **options)


def up_to_end(tokens: list[int]) -> list[int]:
    ended = [k for k, token in enumerate(tokens) if token in ENDS]
    return tokens[: ended[0] + 1] if ended else tokens


def random_prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(10, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])
    return ids, mask


@pytest.mark.parametrize("name", list(FAMILIES))
def test_greedy_rows_equal_those_of_generate_alone(name):
    """32 rows that end at different times; each again by Transformers' greedy search, un-padded and on its own."""
    model = build_family(name)
    # A model without a mask for its state reads padding: rows of one length.
    lengths = [5] * 32 if name == "mamba" else [1 + (7 * row) % 12 for row in range(32)]
    prompts = random_prompts(lengths)
    with torch.no_grad(), float64_evaluation(model):  # where no two logits tie, nor change places by rounding
        completions = decode(model, *padded(prompts), greedy(), LogitsProcessorList())
        found = [up_to_end(row.tolist()) for row in completions]
        expected = []
        for prompt in prompts:
            config = GenerationConfig(do_sample=False, max_new_tokens=TOKENS, eos_token_id=ENDS, pad_token_id=PAD)
            alone = model.generate(input_ids=torch.tensor([prompt]), generation_config=config)
            expected.append(up_to_end(alone[0, len(prompt) :].tolist()))
    assert found == expected
    assert len(set(map(len, found))) >= 4, "the test wants rows that end at different times"


class TestRowsCarried:
    """A model that writes an end token at position ``TOKENS + 1`` of prompt and completion: the prompt's length says
    how long a completion becomes. Every forward pass is counted."""

    @pytest.fixture
    def model_and_calls(self) -> tuple[nn.Module, list[tuple[int, int]]]:
        model, calls = build_family("qwen2"), []

        def write(module, inputs, keywords, output):
            calls.append(tuple(keywords["input_ids"].shape))
            last = keywords["position_ids"][:, -1] >= TOKENS
            output.logits[:, -1] = -50.0
            output.logits[:, -1].scatter_(1, torch.where(last, ENDS[0], 10)[:, None], 50.0)
            return output

        model.register_forward_hook(write, with_kwargs=True)
        return model, calls

    @pytest.mark.parametrize("rows", [1, 3, 8, 40])
    def test_finished_rows_leave(self, model_and_calls, rows):
        model, calls = model_and_calls
        lengths = [1 + (5 * row) % TOKENS for row in range(rows)]  # 1 … TOKENS
        prompts = random_prompts([TOKENS + 2 - n for n in lengths])
        completions = decode(model, *padded(prompts), greedy(), LogitsProcessorList())
        assert [len(up_to_end(row.tolist())) for row in completions] == lengths
        assert calls[0] == (rows, max(map(len, prompts)))
        assert [width for _, width in calls[1:]] == [1] * (max(lengths) - 1)
        carried = rows
        for step, (batch, _) in enumerate(calls):
            living = sum(n > step for n in lengths)  # rows that still need this step's token
            assert living <= batch <= carried
            assert batch - living < rows_to_end_a_segment(batch)
            carried = batch

    def test_segments_end_when_an_eighth_of_the_rows_has_finished(self):
        assert [rows_to_end_a_segment(rows) for rows in (1, 3, 4, 40, 64, 256)] == [1, 3, 4, 5, 8, 32]


def test_without_end_tokens_every_row_runs_to_the_limit():
    model = build_family("qwen2")
    completions = decode(model, *padded(random_prompts([3, 1])), greedy(eos_token_id=None), LogitsProcessorList())
    assert completions.shape == (2, TOKENS)


def test_columns_end_with_the_longest_completion():
    model = build_family("qwen2")
    every = list(range(VOCABULARY))
    completions = decode(model, *padded(random_prompts([3, 1])), greedy(eos_token_id=every), LogitsProcessorList())
    assert completions.shape == (2, 1)
