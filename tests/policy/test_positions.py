"""Position regimes that change with length: nobody's numbers depend on who is scored, or sampled, with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from entropy_pl.policy import evaluation, float64_evaluation, sample_completions
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.positions import crossing, position_boundary
from entropy_pl.policy.score import token_stats
from entropy_pl.rollout import Rollout, TokenStats

TOKENIZER, BOUNDARY = build_tokenizer(), 16
SHORT, LONG = (
    ["1+2=", "12+34=", "a=b"],
    ["what is one plus two now:", "one plus one plus one = ", "what then is it now "],
)
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def longrope() -> Phi3ForCausalLM:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": BOUNDARY,
        "partial_rotary_factor": 1.0,
    }
    torch.manual_seed(0)
    options: dict[str, Any] = {"max_position_embeddings": 64, "original_max_position_embeddings": BOUNDARY}
    return Phi3ForCausalLM(Phi3Config(**SIZES, **options, rope_parameters=rope)).eval()


def dynamic() -> LlamaForCausalLM:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=12, rope_parameters=rope)).eval()


@torch.no_grad()
def alone(model: torch.nn.Module, rollout: Rollout, row: int) -> torch.Tensor:
    """Log-probs of one sequence, by one plain forward pass."""
    prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
    completion = rollout.completion_ids[row][rollout.completion_mask[row]]
    logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1].double()
    return torch.log_softmax(logits, -1).gather(1, completion[:, None]).squeeze(1)


def test_completions_of_both_regimes_are_those_drawn_alone():
    """Greedy, so that they can be compared; every completion stays within its regime."""
    model = longrope()
    drawn = sample_completions(model, TOKENIZER, SHORT + LONG, max_new_tokens=10, top_k=1)
    assert not crossing(drawn, BOUNDARY).any()
    for row, prompt in enumerate(SHORT + LONG):
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10
        )
        ours = drawn.completion_ids[row][drawn.completion_mask[row]].tolist()
        assert ours == expected[0, ids.shape[1] :].tolist()


def test_scores_do_not_depend_on_the_neighbours():
    """Sequences on both sides of the boundary and across it; 1e-5 is float32's rounding of a log-prob, a regime 0.1."""
    model = longrope()
    drawn = [sample_completions(model, TOKENIZER, SHORT + LONG, max_new_tokens=n) for n in (4, 14)]
    rollout = Rollout.concatenate(drawn)
    beyond = rollout.prompt_lengths + rollout.completion_lengths > BOUNDARY
    assert crossing(rollout, BOUNDARY).any()
    assert (~beyond).any()
    assert (beyond & ~crossing(rollout, BOUNDARY)).any()
    together = token_stats(model, rollout, max_batch_tokens=10**6)
    for row in range(len(rollout)):
        expected = alone(model, rollout, row)
        torch.testing.assert_close(together.logp[row, : len(expected)], expected, atol=1e-5, rtol=0)

    ones = TokenStats(torch.ones_like(together.logp), torch.zeros_like(together.logp), together.mask)
    whole, single = (
        weighted_gradient(model, rollout, ones, ["model.embed_tokens.weight"], max_batch_tokens=n) for n in (10**6, 1)
    )
    for name, gradient in whole.items():  # of the order of 1 to 10
        torch.testing.assert_close(gradient, single[name], atol=1e-4, rtol=1e-4)


def test_a_sequence_crosses_when_it_is_drawn_in_one_regime_and_scored_in_another():
    def rollout(prompt: int, completion: int) -> Rollout:
        ids, mask = (torch.ones(1, n, dtype=torch.long) for n in (prompt, completion))
        return Rollout(ids, ids.bool(), mask, mask.bool())

    lengths = {(4, 12): False, (4, 13): True, (16, 1): True, (17, 20): False}
    assert {n: bool(crossing(rollout(*n), BOUNDARY)) for n in lengths} == lengths
    assert not crossing(rollout(4, 13), None).any()


@pytest.mark.parametrize(
    ("rope", "boundary"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, None),
        ({"rope_type": "longrope", "original_max_position_embeddings": 9}, 9),
        ({"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 9}}, 9),
        ({"full_attention": {"rope_type": "linear", "original_max_position_embeddings": 9}}, None),
        (None, None),
    ],
)
def test_the_boundary_is_read_from_the_configuration(rope, boundary):
    model = torch.nn.Module()
    model.config = LlamaConfig(**SIZES)
    model.config.rope_parameters = rope
    assert position_boundary(model) == boundary


@pytest.mark.parametrize("build", [longrope, dynamic])
@pytest.mark.parametrize("precision", [evaluation, float64_evaluation])
def test_what_the_run_remembers_of_lengths_stays_its_own(build, precision):
    """A run in one regime, a probe in another: the next pass of the run, and its tables, are as they were."""
    model = build()
    long, short = torch.full((1, 30), 7), torch.full((1, 5), 7)
    with torch.no_grad():
        model(input_ids=long)
        rotary = model.model.rotary_emb
        before = {name: buffer.clone() for name, buffer in rotary.named_buffers()}
        remembered = dict(vars(rotary))
        with precision(model):
            model(input_ids=short)
    assert vars(rotary).keys() == remembered.keys()
    assert getattr(rotary, "max_seq_len_cached", None) == remembered.get("max_seq_len_cached")
    after = dict(rotary.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
