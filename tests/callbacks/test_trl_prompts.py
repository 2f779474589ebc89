"""With its trainer, the probe's prompts are the tokens that TRL itself would begin with."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import build_tokenizer, with_special_tokens
from trl_runs import EVALUATED, LEARNT, grpo_trainer

from entropy_pl.callbacks.trl import EntropyProbeTrainerCallback
from entropy_pl.monitor import run_probe
from entropy_pl.monitor.trl_prompts import TrainerPrompts

QUICK = {"report_to": [], "max_steps": 1, "bf16": False}
TEMPLATE = (
    "{% if tools %}<{{ tools[0].function.name }}>{% endif %}{% if thinks %}#{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OF_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}="


def chat(text: str, *more: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (("user", text), *more)]


def chatting_tokenizer(template: str = TEMPLATE, added: str = "$A") -> Any:
    tokenizer = with_special_tokens(build_tokenizer(bos_token="<bos>"), added)
    tokenizer.chat_template = template
    return tokenizer


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first.
        b: the second.
    """
    return a + b


def told(record: Any) -> list[str]:
    """Warnings of a record but that its E-batch is small, as those of these tests are."""
    return [warning for warning in record["warnings"] if not warning.startswith("The E-batch has")]


def begun_with(trainer: Any, prompts: Any, monkeypatch: Any, **options: Any) -> tuple[set[Any], set[Any], Any]:
    """The prompts' tokens of one step: those that TRL gave to its loss, those of the E-batch; and the record."""
    settings = {"trainer": trainer, "num_sequences": 16, "eta_multipliers": (), "attribution": False}
    callback = EntropyProbeTrainerCallback(prompts, **(settings | options))
    trainer.add_callback(callback)
    of_the_run, of_the_probe = set(), set()
    draw, loss = run_probe.sample_completions, trainer.compute_loss

    def noted(*args: Any, **kwargs: Any) -> Any:
        rollout = draw(*args, **kwargs)
        rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        of_the_probe.update(tuple(ids[mask].tolist()) for ids, mask in rows)
        return rollout

    def compute_loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
        of_the_run.update(tuple(ids[mask].tolist()) for ids, mask in rows)
        return loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(run_probe, "sample_completions", noted)
    trainer.compute_loss = compute_loss
    trainer.train()
    [record] = callback.records
    assert (record["status"], record["message"]) == ("ok", None)
    return of_the_run, of_the_probe, record


RUNS: dict[str, tuple[list[Any], str, dict[str, Any]]] = {
    "chats in which the assistant spoke last": (
        [chat(text, ("assistant", "it is")) for text in EVALUATED],
        "<bos> $A <eos>",
        {"chat_template_kwargs": {"thinks": True}},
    ),
    "strings with a BOS of their own": ([f"<bos>{text}" for text in EVALUATED], "<bos> $A", {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_e_prompts_are_trls_own_tokens(tmp_path, monkeypatch, name):
    """A run on the E prompts themselves: what TRL begins with is among what the probe begins with."""
    prompts, added, options = RUNS[name]
    rows = {"prompt": prompts, "answer": ["1"] * len(prompts)}
    trainer = grpo_trainer(
        tmp_path,
        data=rows,
        tokenizer=chatting_tokenizer(added=added),
        peft=False,
        reward=lambda completions, answer, **_: [float(len(str(c))) for c in completions],
        learning_rate=1e-3,
        **QUICK,
        **options,
    )
    run, probe, record = begun_with(trainer, Dataset.from_dict(rows), monkeypatch)
    assert run
    assert run <= probe
    assert len(probe) == 16
    assert record["e_prompts"]["in_u"] == 16
    assert told(record) == []
    assert record["absent"].keys() <= {"attribution"}  # rewards are there: the rows are found by their texts


@pytest.fixture
def trainer(tmp_path):
    return grpo_trainer(tmp_path, tokenizer=chatting_tokenizer(), peft=False, **QUICK)


def by_hand(tokenizer: Any, prompt: Any, **options: Any) -> list[int]:
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, **options)["input_ids"]


def of(trainer: Any, tokenizer: Any = None) -> TrainerPrompts:
    own = trainer.processing_class
    return TrainerPrompts(trainer, trainer.args, own, own if tokenizer is None else tokenizer)


@pytest.mark.parametrize("added", ["<bos> $A", "$A <eos>"])
def test_chats_get_no_special_tokens_and_strings_do(trainer, added):
    tokenizer = with_special_tokens(trainer.processing_class, added)
    chats, strings = [chat("1+1="), chat("2+2=", ("assistant", "4"), ("user", "3+3="))], ["5+5=", "<user>6+6="]
    found = of(trainer).prompts([strings[0], *chats, strings[1]])
    expected = [tokenizer(strings[0])["input_ids"], *(by_hand(tokenizer, c) for c in chats)]
    assert [list(prompt.ids) for prompt in found] == [*expected, tokenizer(strings[1])["input_ids"]]


@pytest.mark.parametrize("encodes", [True, False], ids=["as TRL encodes", "a version without the method"])
def test_tools_and_a_template_of_the_trainers_own(trainer, monkeypatch, encodes):
    trainer.tools, trainer.chat_template = [add], "+" + TEMPLATE
    if not encodes:
        monkeypatch.delattr(type(trainer), "_tokenize_prompts")
    chats, prompts = [chat("1+1="), chat("2+2=")], of(trainer)
    found = prompts.prompts(chats)
    options = {"tools": [add], "chat_template": "+" + TEMPLATE}
    assert [list(p.ids) for p in found] == [by_hand(trainer.processing_class, c, **options) for c in chats]
    assert found[0].text == "+<add><user>1+1=\n<assistant>"
    assert [w for w in prompts.warnings if "has no _tokenize_prompts: they may differ" in w] == prompts.warnings
    assert len(prompts.warnings) == (not encodes)


class Game:
    """An environment that draws at random, as somebody's might."""

    made = 0

    def __init__(self) -> None:
        Game.made += 1

    def reset(self, goal: str, **_: Any) -> str:
        drawn = (random.random(), np.random.rand(), torch.rand(()).item())
        return f" {goal}" if all(0 <= number < 1 for number in drawn) else ""

    def win(self, points: int) -> int:
        """Win.

        Args:
            points: so many.
        """
        return points


class Quiz(Game):
    def reset(self, **_: Any) -> None:
        """Add nothing."""

    def ask(self, what: int) -> int:
        """Ask.

        Args:
            what: so much.
        """
        return what


def in_environments(trainer: Any, factories: dict[Any, Any], tools: dict[Any, list[Any]]) -> None:
    """As TRL's constructor leaves the trainer, given ``environment_factory``."""
    if not hasattr(trainer, "environment_factories"):
        pytest.skip("this version of TRL makes its environments at the start")
    trainer.environment_factories, trainer._env_tools = factories, tools
    trainer._multi_environment = None not in factories
    trainer._batch_environments = ["of the batch under way"]


def test_environments_add_their_tools_and_observations_and_the_run_keeps_its_own(trainer):
    tools = {"game": [Game().win], "quiz": [Quiz().ask]}
    in_environments(trainer, {"game": Game, "quiz": Quiz}, tools)
    rows = [
        {"prompt": chat(f"{a}+1="), "environment": name, "goal": str(a)} for a in range(3) for name in ("game", "quiz")
    ]
    before = dict(vars(trainer))
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    streams = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    prompts = of(trainer)
    found = prompts.prompts(rows)
    assert (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())) == streams
    assert vars(trainer) == before
    asked = [chat(f"{a}+1=" + (f" {a}" if name == "game" else "")) for a in range(3) for name in ("game", "quiz")]
    expected = [
        by_hand(trainer.processing_class, c, tools=tools[row["environment"]])
        for c, row in zip(asked, rows, strict=True)
    ]
    assert [list(prompt.ids) for prompt in found] == expected
    assert prompts.warnings == []


def test_what_an_environment_does_not_say_is_said(trainer):
    class Shut(Game):
        def reset(self, **_: Any) -> str:
            raise ConnectionError("no such server")

    in_environments(trainer, {None: Shut}, {None: []})
    prompts = of(trainer)
    [first, _] = prompts.prompts([chat("1+1="), chat("2+2=")])
    assert list(first.ids) == by_hand(trainer.processing_class, chat("1+1="))
    [warning] = prompts.warnings
    assert "without what the run's environments add" in warning
    assert "ConnectionError: no such server" in warning


def test_a_rollout_of_its_own_and_a_method_that_fails(trainer):
    trainer.rollout_func = add
    prompts = of(trainer)
    prompts.prompts([chat("1+1=")])
    assert "rollout_func, which makes tokens of them in a way of its own" in prompts.warnings[0]
    trainer._tokenize_prompts = add
    [found] = (prompts := of(trainer)).prompts([chat("1+1=")])
    assert list(found.ids) == by_hand(trainer.processing_class, chat("1+1="))
    assert "_tokenize_prompts did not take them (TypeError: " in prompts.warnings[-1]


def test_a_tokenizer_of_the_probes_own_does_not_make_the_prompts(trainer):
    other = chatting_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", "<bos> $A")
    found = of(trainer, other).prompts([chat("1+1="), "1+1="])
    assert [prompt.text for prompt in found] == ["<user>1+1=\n<assistant>", "1+1="]
    assert other.bos_token_id not in {token for prompt in found for token in prompt.ids}


def test_a_processor_renders_by_its_own_template_and_adds_what_it_adds(trainer):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL", reason="Pillow is not installed")
    tokenizer = chatting_tokenizer(template=TEMPLATE, added="<bos> $A")
    trainer._is_vlm, trainer.processing_class = (
        True,
        transformers.LlavaProcessor(
            image_processor=transformers.CLIPImageProcessor(), tokenizer=tokenizer, chat_template=OF_PARTS
        ),
    )
    in_parts = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("1+1", "2+2")]
    found = (prompts := of(trainer, tokenizer)).prompts(in_parts)
    expected = [by_hand(trainer.processing_class, c, tokenize=True, return_dict=True)[0] for c in in_parts]
    assert [list(prompt.ids) for prompt in found] == expected
    assert found[0].ids[0] == tokenizer.bos_token_id  # unlike tokenizers, processors add it to a chat
    assert [prompt.text for prompt in found] == ["1+1=", "2+2="]
    assert prompts.warnings == []


def test_without_its_trainer_tools_are_said_to_be_unknown(trainer):
    trainer.args.chat_template_kwargs = {"thinks": True}
    own = trainer.processing_class
    prompts = TrainerPrompts(None, trainer.args, own, own)
    [found] = prompts.prompts([chat("1+1=")])
    assert found.text == "#<user>1+1=\n<assistant>"  # what the arguments say is known
    assert "EntropyProbeTrainerCallback(..., trainer=trainer)" in prompts.warnings[0]
    strings = TrainerPrompts(None, trainer.args, own, own)
    strings.prompts(["1+1="])
    assert strings.warnings == []


def test_a_question_that_trl_itself_loses_is_refused_by_name(trainer):
    """TRL makes parts of strings for vision-language processors alone."""
    trainer.processing_class.chat_template = OF_PARTS
    trainer.processing_class.name_or_path = "somebody/vlm"
    with pytest.raises(ValueError, match=r"the chat template of somebody/vlm reads a message's content as a list"):
        of(trainer).prompts([chat("1+1="), chat("2+2=")])
    in_parts = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("1+1", "2+2")]
    assert [prompt.text for prompt in of(trainer).prompts(in_parts)] == ["1+1=", "2+2="]


def test_images_are_refused(trainer):
    rows = [{"prompt": chat("what is it?"), "images": [object()]}]
    with pytest.raises(ValueError, match="E prompts of text alone, got prompt 0 with images"):
        of(trainer).prompts(rows)


# ------------------------------------------------------------------------------------- a run that samples from another


def test_records_of_a_run_with_top_p_and_a_foreign_tokenizer_say_so(tmp_path):
    trainer = grpo_trainer(tmp_path, data={"prompt": LEARNT}, top_p=0.9, min_p=0.05, **QUICK)
    trainer.model.get_base_model().set_input_embeddings(torch.nn.Embedding(2048, 32))  # 54 tokens
    callback = EntropyProbeTrainerCallback(EVALUATED, trainer=trainer, num_sequences=16, attribution=False)
    trainer.add_callback(callback)
    with pytest.warns(UserWarning, match="the run samples with") as seen:
        trainer.train()
    [record] = callback.records
    said = {str(warning.message) for warning in seen}
    assert set(told(record)) <= said
    [foreign, truncated] = told(record)
    assert "and the policy embeds 2,048" in foreign
    assert "top_p=0.9, min_p=0.05, the probe without" in truncated
    assert "whole distribution at temperature 1" in truncated
