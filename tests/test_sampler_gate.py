"""The gate: policies whose sampler and scorer differ are refused with the place to look at; others pass."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from broken_policies import BaseSampler, Crowded, SeesPadding, Stale, broken
from peft import LoraConfig
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from entropy_pl.peers import Peers
from entropy_pl.policy import GeneratedLogProbs, evaluation, float64_evaluation, isolated_rng, sample_completions
from entropy_pl.policy.precision import coarse_arithmetic, matmul_precision
from entropy_pl.probe import SamplerGap, SamplerGate, SamplerMismatchError, sampler_gap
from entropy_pl.rollout import Rollout

TOKENIZER = build_tokenizer()
PROMPTS = ["1+2=", "what is 12 + 3?", "a", "((3)*(4))", "1+2=", "12=", "what is it", "7-7", "no", "5*5*5="]


def without_adapter() -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return BaseSampler(build_model(logit_scale=2.0), config).eval()


def drawn(model: nn.Module, prompts: list[str] = PROMPTS, tokens: int = 8) -> tuple[Rollout, GeneratedLogProbs]:
    generated = GeneratedLogProbs()
    with isolated_rng(1):
        rollout = sample_completions(model, TOKENIZER, prompts, max_new_tokens=tokens, generated=generated)
    return rollout, generated


def gap(model: nn.Module, **how: Any) -> SamplerGap:
    return sampler_gap(model, *drawn(model), **how)


@pytest.mark.parametrize(
    ("model", "word"),
    [
        (lambda: broken(Stale), "cache"),
        (lambda: broken(SeesPadding), "padded"),
        (lambda: broken(Crowded), "one at a time"),
        (without_adapter, "adapter that acts in generate"),
    ],
)
def test_two_policies_are_refused(model, word):
    found = gap(model())
    assert found.tokens > 50
    assert max(found.mean, found.neighbours / found.tokens) > 1e-3
    with pytest.raises(SamplerMismatchError, match=word):
        found.check()


def test_the_gap_is_the_mean_difference_of_log_probs():
    """Against the oracle of two passes by hand: the adapter's policy, and the base model's that drew the tokens."""
    model = without_adapter()
    rollout, generated = drawn(model)
    differences = []
    for row in generated.index.tolist():
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row][rollout.completion_mask[row]]
        said = []
        for on in (True, False):
            with torch.no_grad(), model.disable_adapter() if not on else torch.no_grad():
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            said.append(torch.log_softmax(logits.double(), -1).gather(1, completion[:, None]).squeeze(1))
        differences.append((said[0] - said[1]).abs())
    # float32's rounding
    assert sampler_gap(model, rollout, generated).mean == pytest.approx(float(torch.cat(differences).mean()), abs=1e-5)


def test_one_policy_passes_and_the_gap_is_rounding():
    model = build_model()
    found = gap(model)
    found.check()
    assert found.mean < 1e-5
    with float64_evaluation(model):
        exact = gap(model)
    exact.check()
    assert exact.mean < 1e-13


def test_coarse_arithmetic_is_allowed_more():
    """Half precision is 0.01 to 0.03 nats a token from float32; whoever samples in it is not refused for that."""
    model = build_model().to(torch.bfloat16)
    found = gap(model)
    found.check()
    assert found.mean > 1e-3
    assert found.allowed == 0.1
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = MixtralForCausalLM(MixtralConfig(vocab_size=9, num_key_value_heads=2, num_local_experts=4, **sizes))
    assert "experts" in coarse_arithmetic(experts)
    with evaluation(model):
        assert coarse_arithmetic(model) is None
    with matmul_precision("medium"), evaluation(model):
        assert "products" in coarse_arithmetic(model)


def test_what_was_refused_stays_refused_and_what_passed_is_not_scored_again(monkeypatch):
    model, gate = broken(Stale), SamplerGate()
    gate.refuse_again()
    with pytest.raises(SamplerMismatchError) as first:
        gate.check(model, *drawn(model))
    assert gate.gap > 1e-3
    with pytest.raises(SamplerMismatchError) as second:
        gate.refuse_again()
    assert str(first.value) == str(second.value)

    model, gate = build_model(), SamplerGate()
    measured = gate.check(model, *drawn(model, tokens=4))
    other = broken(Stale)  # would be refused
    assert gate.check(other, *drawn(other, tokens=4)) == measured == gate.gap
    with pytest.raises(SamplerMismatchError):  # but these are sequences of another length
        gate.check(other, *drawn(other, tokens=30))


def test_without_log_probs_nothing_is_said():
    model, gate = build_model(), SamplerGate()
    rollout, _ = drawn(model)
    assert gate.check(model, rollout, GeneratedLogProbs()) is None
    gate.refuse_again()
    with pytest.raises(ValueError, match="got none"):
        sampler_gap(model, rollout, GeneratedLogProbs())


class ThreadPeers(Peers):
    """Processes of one test as threads."""

    def __init__(self, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(rank, len(board))
        object.__setattr__(self, "_board", board)
        object.__setattr__(self, "_barrier", barrier)

    def _gather(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(30)
        gathered = list(self._board)
        self._barrier.wait(30)
        return gathered


@pytest.mark.parametrize("last", ["fair", "stale"])
def test_all_processes_refuse_if_one_has_to(last):
    """Three shares: a fair one, an empty one, and one that is fair or stale."""
    models = [build_model(), build_model(), build_model() if last == "fair" else broken(Stale)]
    shares = [drawn(models[0]), (Rollout.empty(), GeneratedLogProbs()), drawn(models[2], PROMPTS[:3])]
    gates = [SamplerGate() for _ in models]
    found: list[Any] = [None] * 3
    board, barrier = [None] * 3, threading.Barrier(3)

    def check(rank: int) -> None:
        try:
            peers = ThreadPeers(rank, board, barrier)
            found[rank] = gates[rank].check(models[rank], *shares[rank], peers=peers)
        except SamplerMismatchError as error:
            found[rank] = str(error)

    threads = [threading.Thread(target=check, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found[0] == found[1] == found[2]
    assert isinstance(found[0], float if last == "fair" else str)
    alone = [sampler_gap(models[rank], *shares[rank]) for rank in (0, 2)]
    expected = sum(one.total for one in alone) / sum(one.tokens for one in alone)
    assert gates[1].gap == pytest.approx(expected)
