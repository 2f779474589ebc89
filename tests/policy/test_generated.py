"""The log-probs that a sampler keeps of what it draws."""

from __future__ import annotations

import torch
from tiny import build_model, build_tokenizer

from entropy_pl.policy import GeneratedLogProbs, isolated_rng, sample_completions

PROMPTS = ["1+2=", "a", "what is 17 - 5?", "((3)*(4))", "b", "12=", "none", "7-7", "12 + 12 ="]


def build_policy():
    model = build_model()
    model.generation_config.eos_token_id = [1, 5, 9, 13, 17, 21]  # a ninth of the vocabulary
    return model


def drawn(batch_size: int, generated: GeneratedLogProbs | None):
    with isolated_rng(3):
        return sample_completions(
            build_policy(),
            build_tokenizer(),
            PROMPTS,
            num_completions=2,
            max_new_tokens=20,
            temperature=0.8,
            batch_size=batch_size,
            generated=generated,
        )


def test_they_are_the_log_probs_of_the_tokens_drawn():
    """Against a forward pass of every sequence by itself; rows leave their batches early, by EOS, and in segments."""
    model = build_policy()
    for batch_size in (18, 5):
        generated = GeneratedLogProbs(rows=6)
        rollout = drawn(batch_size, generated)
        assert rollout.completion_lengths.unique().numel() > 3  # they end at different times
        lengths = rollout.prompt_lengths[generated.index].tolist()
        assert len(lengths) == 6
        assert {min(lengths), max(lengths)} == {1, 15}  # the shortest prompt and the longest are among them
        assert generated.padded.any() or batch_size == 5
        assert not generated.half
        for row, said in zip(generated.index.tolist(), generated.logp, strict=True):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            completion = rollout.completion_ids[row][rollout.completion_mask[row]]
            with torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            expected = torch.log_softmax(logits.double() / 0.8, -1).gather(1, completion[:, None]).squeeze(1)
            # float32's rounding of a log-prob
            torch.testing.assert_close(said[: len(completion)], expected, atol=1e-5, rtol=0)


def test_what_is_drawn_does_not_change_by_it():
    plain, watched = drawn(5, None), drawn(5, GeneratedLogProbs())
    assert torch.equal(plain.completion_ids, watched.completion_ids)
    assert torch.equal(plain.completion_mask, watched.completion_mask)


def test_half_precision_is_noted():
    generated = GeneratedLogProbs()
    model = build_model().to(torch.bfloat16)
    sample_completions(model, build_tokenizer(), PROMPTS[:2], max_new_tokens=2, generated=generated)
    assert generated.half
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample_completions(build_model(), build_tokenizer(), PROMPTS[:2], max_new_tokens=2, generated=generated)
    assert generated.half
