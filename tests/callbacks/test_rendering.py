"""E prompts become the tokens that the run would begin with; what a template loses is seen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from foreign import ForeignModule, fit, probe
from tiny import build_tokenizer, with_special_tokens

from entropy_pl.monitor import run_probe
from entropy_pl.monitor.prompts import count_common, find_prompts, prompt_texts
from entropy_pl.monitor.rendering import Rendering

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"  # as Zephyr's: no BOS in it
TEMPLATE = TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}"
OF_PARTS = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}="  # as SmolVLM's
OF_FIRST = "{% for m in messages %}{{ m.content[0].text }}{% endfor %}="
ADDED = ["<bos> $A", "$A <eos>", "<bos> $A <eos>"]  # as Llama's, as with add_eos_token, as BERT's


def chat(text: str, *more: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in (("user", text), *more)]


def tokenizer_with(template: str | None, added: str = "$A") -> Any:
    tokenizer = with_special_tokens(build_tokenizer(bos_token="<bos>"), added)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("added", ADDED)
def test_chats_are_encoded_as_transformers_does_and_strings_as_texts(added):
    tokenizer = tokenizer_with(TEMPLATE, added)
    chats = [chat("1+1="), chat("2+2=", ("assistant", "4"), ("user", "3+3="))]
    strings = ["5+5=", "<user>1+1="]
    found = find_prompts([chats[0], strings[0], chats[1], strings[1]], None, tokenizer, "prompt")
    of_chats = [tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"] for c in chats]
    of_strings = [tokenizer(text)["input_ids"] for text in strings]
    expected = [of_chats[0], of_strings[0], of_chats[1], of_strings[1]]
    assert [list(prompt.ids) for prompt in found] == expected
    assert found[0].text == "<user>1+1=\n<assistant>"
    assert found[1].text == strings[0]


def test_a_bos_that_the_template_writes_is_there_once():
    tokenizer = tokenizer_with("<bos>" + TEMPLATE, "<bos> $A")
    given = [chat("1+1="), "<bos><user>1+1=\n<assistant>"]  # the second rendered by the user
    first, second = find_prompts(given, None, tokenizer, "prompt")
    assert first.ids == second.ids
    assert first.ids.count(tokenizer.bos_token_id) == 1


def test_an_assistants_message_is_gone_on_with():
    tokenizer = tokenizer_with(TEMPLATE, "$A <eos>")
    [begun] = find_prompts([chat("1+1=", ("assistant", "it is"))], None, tokenizer, "prompt")
    assert begun.text == "<user>1+1=\n<assistant>it is"
    assert tokenizer.decode(begun.ids) == begun.text


def test_a_lightning_runs_e_batch_begins_with_those_tokens(tmp_path, monkeypatch):
    class Chatting(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer_with(TEMPLATE, "$A <eos>")

    begun: list[str] = []
    draw = run_probe.sample_completions

    def noted(*args: Any, **options: Any) -> Any:
        rollout = draw(*args, **options)
        rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
        begun.extend(args[1].decode(ids[mask]) for ids, mask in rows)
        return rollout

    monkeypatch.setattr(run_probe, "sample_completions", noted)
    chats = [chat(f"{a}+{b}=") for a in range(4) for b in range(4)]
    callback = probe(prompts=Dataset.from_dict({"prompt": chats, "answer": [1] * 16}), every_n_steps=1, reward=lengths)
    fit(Chatting(), tmp_path, callback, steps=2)  # the first one's learning rate is 0
    assert sorted(begun) == sorted(f"<user>{a}+{b}=\n<assistant>" for a in range(4) for b in range(4))
    assert callback.records[1]["status"] == "ok"
    assert asked == begun  # rewards are given the very texts


asked: list[str] = []


def lengths(prompts: list[str], completions: list[str]) -> list[float]:
    asked.extend(prompts)
    return [float(len(text)) for text in completions]


# ------------------------------------------------------------------------------------------------ what a template loses


@pytest.mark.parametrize("template", [OF_PARTS, OF_FIRST])
def test_a_template_that_reads_parts_is_given_parts(template):
    tokenizer = tokenizer_with(template)
    chats = [chat(f"{a}+1") for a in range(3)]
    in_parts = [[{"role": "user", "content": [{"type": "text", "text": f"{a}+1"}]}] for a in range(3)]
    expected = [f"{a}+1=" for a in range(3)]
    assert tokenizer.apply_chat_template(chats[0], tokenize=False) == "="  # its question is gone
    assert prompt_texts(chats, tokenizer) == prompt_texts(in_parts, tokenizer) == expected
    assert count_common(expected, chats[:2], Rendering(tokenizer), "prompt") == 2


def test_a_template_that_shows_nothing_is_named():
    tokenizer = tokenizer_with("{% for m in messages %}<{{ m.role }}>{% endfor %}")
    tokenizer.name_or_path = "somebody/policy"
    with pytest.raises(ValueError, match=r"got that of somebody/policy, which loses the last message of prompt 0"):
        prompt_texts([chat("1+1=")], tokenizer)


@pytest.mark.parametrize("change", ["| trim", "| upper", "| tojson", "| replace('+', ' plus ')"])
def test_a_template_that_changes_what_is_said_is_no_such(change):
    tokenizer = tokenizer_with("{% for m in messages %}{{ m.content " + change + " }}{% endfor %}")
    texts = prompt_texts([chat(' 1+1="'), chat(' 2+1="')], tokenizer)
    assert len(set(texts)) == 2


def test_images_are_refused():
    seen = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    with pytest.raises(ValueError, match="prompts of text alone, got prompt 1 with image"):
        prompt_texts([chat("1+1="), seen], tokenizer_with(OF_PARTS))


# ------------------------------------------------------------------------------------------------------- several splits


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_the_one_split_of_a_dict_is_taken_and_of_two_the_user_must_say_which(kind):
    tokenizer = build_tokenizer()
    data = Dataset.from_dict({"prompt": ["1+1=", "2+2="]})
    texts = [prompt.text for prompt in find_prompts(None, kind(test=data), tokenizer, "prompt")]
    assert texts == ["1+1=", "2+2="]
    message = r"eval_dataset\) as a \w*[dD]ict of 2 \(hard, easy\): say which, prompts=eval_dataset\['hard'\]"
    with pytest.raises(ValueError, match=message):
        find_prompts(None, kind(hard=data, easy=data), tokenizer, "prompt")
    with pytest.raises(ValueError, match=r"got prompts as a .* of 2 \(hard, easy\): say which, prompts=data\['hard'\]"):
        find_prompts(kind(hard=data, easy=data), None, tokenizer, "prompt")


def test_a_file_of_chats(tmp_path):
    tokenizer = tokenizer_with(TEMPLATE)
    rows = [{"prompt": chat(f"{a}+1="), "answer": a + 1} for a in range(3)]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [f"<user>{a}+1=\n<assistant>" for a in range(3)]
    assert [p.text for p in find_prompts(str(tmp_path / "e.jsonl"), None, tokenizer, "prompt")] == expected
