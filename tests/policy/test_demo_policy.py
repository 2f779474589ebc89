import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from entropy_pl.data.arithmetic import load_arithmetic
from entropy_pl.data.registry import format_prompt, get_dataset
from entropy_pl.objectives import RewardSum
from entropy_pl.policy import demo
from entropy_pl.policy.demo import DemoRecipe, build_tokenizer, demo_policy_path

TINY = DemoRecipe(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, steps=3, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return demo_policy_path(TINY, cache_dir=str(tmp_path_factory.mktemp("cache")))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_loads_and_generates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = tokenizer(["Question: What is 3 + 4?\nResponse: <think>"] * 2, return_tensors="pt", padding=True)
    sequences = model.generate(**prompts, max_new_tokens=5, do_sample=True)
    assert sequences.shape[0] == 2
    assert model.dtype == torch.float32
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_cached(folder, monkeypatch):
    def refuse(recipe):
        raise AssertionError("trained although cached")

    monkeypatch.setattr(demo, "train_demo_policy", refuse)
    cache = folder.parent
    assert demo_policy_path(TINY, cache_dir=str(cache)) == folder
    assert [path.name for path in cache.iterdir()] == [folder.name]
    monkeypatch.setenv("ENTROPY_PL_CACHE", str(cache))
    assert demo_policy_path(TINY) == folder
    with pytest.raises(AssertionError, match="trained although cached"):
        demo_policy_path(dataclasses.replace(TINY, seed=1))


def test_nothing_half_made_stays(tmp_path, monkeypatch):
    def interrupted(recipe):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train_demo_policy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_policy_path(TINY, cache_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_deterministic_and_without_touching_the_global_rng(folder, tmp_path):
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = demo_policy_path(TINY, cache_dir=str(tmp_path / "again"))
    assert torch.equal(state, torch.get_rng_state())
    other = demo_policy_path(dataclasses.replace(TINY, seed=1), cache_dir=str(tmp_path / "other"))
    first, second, third = weights(folder), weights(again), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])


@pytest.mark.parametrize("saved", [False, True])
def test_tokenizer_round_trip(folder, saved):
    tokenizer = AutoTokenizer.from_pretrained(folder) if saved else build_tokenizer()
    prompt = format_prompt(get_dataset("arithmetic_r1_template").template, "What is 37 + 45?")
    completion = " 7 + 5 = 12. 3 + 4 + 1 = 8. </think> <answer> 82 </answer>"
    ids = tokenizer(prompt).input_ids + tokenizer(completion).input_ids
    assert ids == tokenizer(prompt + completion).input_ids
    assert len(ids) == 15 + 21 - 2
    assert tokenizer.decode(ids) == prompt + completion
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == prompt + completion
    other = "{ünïcode} <think>\n\n x</answer>  12"
    assert tokenizer.decode(tokenizer(other).input_ids) == other


def test_texts_without_mistakes_earn_every_reward():
    import random

    careful = DemoRecipe(guess_share=0.0, wrong_share=0.0, malformed_share=0.0)
    examples = load_arithmetic("train", path=None, size=500, seed=0)
    texts = [demo._completion(example, careful, random.Random(0)) for example in examples]
    total, _ = RewardSum(["format", "numeric_answer"])(texts, [example.answer for example in examples])
    assert (total == 2).all()
    tokenizer = build_tokenizer()
    assert max(map(len, tokenizer(texts).input_ids)) + 1 <= demo.MAX_NEW_TOKENS


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("wrong_share", 1.5), ("malformed_share", -0.1)])
def test_bad_recipe(name, value):
    with pytest.raises(ValueError, match=f"expected {name} .*got {value}"):
        DemoRecipe(**{name: value})
