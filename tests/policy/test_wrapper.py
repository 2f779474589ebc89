"""Adapters that act in PEFT's ``generate`` and ``forward``, against that ``generate`` and the logits it drew by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, XLoraConfig, get_peft_model
from tiny import build_model, build_tokenizer

from entropy_pl.policy import GeneratedLogProbs, float64_evaluation, head_inputs, sample_completions
from entropy_pl.policy import head as head_module
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import token_stats_jvp
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateVector
from entropy_pl.updates.displace import displaced

TOKENIZER = build_tokenizer()
# Of several lengths, with the invocation in the middle, at the end, twice, and not at all.
PROMPTS = ["1+2=", "what is 3=", "=4=5", "none of it"]
TOKENS, TEMPERATURE, SEED = 8, 0.7, 31
[INVOCATION] = TOKENIZER("=")["input_ids"]


def lora(**options: Any) -> LoraConfig:
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    return LoraConfig(**(settings | options))


def activated(**options: Any) -> PeftModel:
    """It acts from the last "=" of the prompt on; its completions often have another."""
    torch.manual_seed(3)
    return get_peft_model(build_model(logit_scale=2.0), lora(alora_invocation_tokens=[INVOCATION], **options)).eval()


def mixed(folder: Path) -> PeftModel:
    """X-LoRA over two adapters."""
    for number in range(2):
        torch.manual_seed(number)
        get_peft_model(build_model(), lora()).save_pretrained(folder / f"{number}")
    base = build_model()
    base.config.use_cache = False
    adapters = {f"{number}": str(folder / f"{number}") for number in range(2)}
    torch.manual_seed(0)
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, xlora_depth=1)
    return get_peft_model(base, config).eval()


@pytest.fixture(params=["activated", "activated head", "x-lora"])
def policy(request: pytest.FixtureRequest, tmp_path: Path) -> PeftModel:
    if request.param == "x-lora":
        return mixed(tmp_path)
    return activated() if request.param == "activated" else activated(target_modules=["q_proj", "lm_head"])


def generated_alone(model: PeftModel, prompt: str, **how: Any) -> tuple[list[int], torch.Tensor]:
    """One completion of PEFT's own ``generate``, without padding, and the logits it was chosen by."""
    ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=TOKENS,
        eos_token_id=1,
        pad_token_id=0,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.stack(out.logits, 1)[0]


def as_rollout(prompts: list[str], completions: list[list[int]]) -> Rollout:
    encoded = [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    width, tokens = max(map(len, encoded)), max(map(len, completions))
    return Rollout(
        torch.tensor([[0] * (width - len(ids)) + ids for ids in encoded]),
        torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in encoded]),
        torch.tensor([c + [0] * (tokens - len(c)) for c in completions]),
        torch.tensor([[True] * len(c) + [False] * (tokens - len(c)) for c in completions]),
    )


def test_greedy_completions_are_those_of_peft(policy):
    drawn = sample_completions(policy, TOKENIZER, PROMPTS, max_new_tokens=TOKENS, top_k=1)
    greedy = [generated_alone(policy, prompt, do_sample=False)[0] for prompt in PROMPTS]
    ours = [ids[mask].tolist() for ids, mask in zip(drawn.completion_ids, drawn.completion_mask, strict=True)]
    assert ours == greedy
    with policy.disable_adapter():
        assert ours != [generated_alone(policy, prompt, do_sample=False)[0] for prompt in PROMPTS]


def test_a_token_is_scored_as_it_was_drawn(policy, monkeypatch):
    torch.manual_seed(SEED)
    drawn = [generated_alone(policy, prompt, do_sample=True) for prompt in PROMPTS]
    # What a completion repeats of the invocation begins nothing anew.
    assert any(INVOCATION in completion[:-1] for completion, _ in drawn)
    rollout = as_rollout(PROMPTS, [completion for completion, _ in drawn])
    one, together = (token_stats(policy, rollout, temperature=TEMPERATURE, max_batch_tokens=n) for n in (1, 10**6))
    monkeypatch.setattr(head_module, "MIN_HEAD_ROWS", 3)  # the head's work in pieces
    monkeypatch.setattr(head_module, "HEAD_CHUNK_BYTES", {"cpu": 1, "cuda": 1})
    in_pieces = token_stats(policy, rollout, temperature=TEMPERATURE)
    for scored in (one, together, in_pieces):
        for row, (completion, logits) in enumerate(drawn):
            logp = torch.log_softmax(logits.double() / TEMPERATURE, -1)
            expected = logp.gather(1, torch.tensor(completion)[:, None]).squeeze(1)
            # float32's rounding of a logit through two layers
            torch.testing.assert_close(scored.logp[row, : len(completion)], expected, atol=2e-5, rtol=0)


def test_states_and_derivatives_are_of_the_activated_policy():
    """Head inputs against the policy's own hidden states; forward mode against float64's difference."""
    model = activated()
    rollout = sample_completions(model, TOKENIZER, PROMPTS[:3], max_new_tokens=3)
    states = head_inputs(model, rollout)
    first = int(rollout.completion_mask[0].sum())
    prompt = rollout.prompt_ids[0][rollout.prompt_mask[0]]
    ids = torch.cat([prompt, rollout.completion_ids[0][rollout.completion_mask[0]]])[None]
    begins = int((prompt == INVOCATION).nonzero().max())
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, alora_offsets=[ids.shape[1] - begins])
    torch.testing.assert_close(states[:first], output.hidden_states[-1][0, len(prompt) - 1 : -1], atol=1e-5, rtol=0)

    torch.manual_seed(0)
    update = UpdateVector(
        {n: torch.randn(p.shape, dtype=torch.float64) for n, p in model.named_parameters() if p.requires_grad}, 1e-2
    )
    with float64_evaluation(model):
        _, slope = token_stats_jvp(model, rollout, update, method="forward_mode")
        ends = []
        for eta in (1e-5, -1e-5):
            with displaced(model, update, eta):
                ends.append(token_stats(model, rollout).logp)
    # h² of the difference and 1e-16/h of float64
    torch.testing.assert_close(slope.logp, (ends[0] - ends[1]) / 2e-5, atol=1e-6, rtol=1e-6)
    assert slope.logp.abs().max() > 0


def test_the_wrapper_keeps_nothing(policy):
    sample_completions(policy, TOKENIZER, PROMPTS, max_new_tokens=2)  # Transformers installs what it needs once
    before = {name: dict(vars(module)) for name, module in policy.named_modules()}
    sample_completions(policy, TOKENIZER, PROMPTS, max_new_tokens=2, generated=GeneratedLogProbs())
    for name, module in policy.named_modules():
        assert vars(module).keys() == before[name].keys(), name
    assert vars(policy.base_model).get("internal_xlora_scalings") is before["base_model"].get("internal_xlora_scalings")
