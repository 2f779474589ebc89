"""What the probe finds in a Lightning run, and what it refuses before the first step."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from foreign import PROMPTS, ForeignModule, fit, probe
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny import build_model, build_tokenizer
from torch import nn
from transformers import GenerationConfig

from entropy_pl.monitor.discovery import refuse_sharded, truncated_sampling
from entropy_pl.monitor.prompts import count_common, prompt_texts
from entropy_pl.monitor.rendering import Rendering

LARGER = build_tokenizer("".join(map(chr, range(256, 400))) + "0123456789+=")  # than the policy's vocabulary


def test_streams_are_left_alone(tmp_path):
    """A dataset without an end: of U, nothing is known; of E, it is refused."""

    def rows() -> Any:
        while True:
            yield {"prompt": "1+1="}

    endless = IterableDataset.from_generator(rows)
    tokenizer = build_tokenizer()
    assert count_common(PROMPTS, endless, Rendering(tokenizer), "prompt") is None
    with pytest.raises(ValueError, match=r"that can be counted, got a stream \(IterableDataset\): take"):
        prompt_texts(endless, tokenizer)


def test_a_template_that_refuses_a_chat():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    chats = [[{"role": "user", "content": "1+1="}]]
    with pytest.raises(ValueError, match=r"the tokenizer's template takes, got prompt 0: roles must alternate"):
        prompt_texts(chats, tokenizer)
    assert count_common(PROMPTS, chats, Rendering(tokenizer), "prompt") is None  # the run's own business


def test_prompts_in_other_forms(tmp_path):
    """Chats, rows, a dataset's column and files of them give the texts that strings would."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    texts = [f"{a}+{b}=" for a in range(3) for b in range(3)]
    chats = [[{"role": "user", "content": text}] for text in texts]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in texts))
    for given, column in (
        (texts, "prompt"),
        (chats, "prompt"),
        ([{"prompt": chat} for chat in chats], "prompt"),
        (Dataset.from_dict({"question": texts}), "question"),
        (Dataset.from_dict({"prompt": chats}), "prompt"),
        (str(tmp_path / "e.jsonl"), "question"),
    ):
        assert prompt_texts(given, tokenizer, column) == texts
    begun = [*chats[0], {"role": "assistant", "content": "The answer"}]
    assert prompt_texts([begun], tokenizer) == ["0+0=The answer"]


def test_e_prompts_that_are_learnt_are_a_warning_and_in_the_record(tmp_path):
    class Texts(ForeignModule):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            tokens = self.tokenizer(batch["prompt"], return_tensors="pt", padding=True)["input_ids"]
            return self.policy(input_ids=tokens, labels=tokens).loss

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(Dataset.from_dict({"prompt": PROMPTS[:9] + ["9+9="]}), batch_size=5)

    callback = probe(every_n_steps=5)
    with pytest.warns(UserWarning, match="9 of 36 E prompts are prompts that this run trains on"):
        fit(Texts(), tmp_path, callback)
    assert [r["e_prompts"]["in_u"] for r in callback.records] == [9, 9]
    answered = [f"{prompt}7" for prompt in PROMPTS[:5]] + ["5+", "5+6"]  # supervised: prompt and answer in one text
    assert count_common(PROMPTS, answered, Rendering(build_tokenizer()), "prompt") == 5
    unknown = probe(every_n_steps=5)
    fit(ForeignModule(), tmp_path, unknown)  # trains on tensors of tokens
    assert [r["e_prompts"]["in_u"] for r in unknown.records] == [None, None]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_alone_is_refused(tmp_path, stage):
    class Evaluates(ForeignModule):
        def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None: ...

        test_step = validation_step
        val_dataloader = test_dataloader = ForeignModule.train_dataloader

    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}
    trainer = Trainer(callbacks=[probe()], max_steps=1, limit_val_batches=1, limit_test_batches=1, **options)
    with pytest.warns(UserWarning, match=rf"a run that trains, got trainer.{stage}\(\): .* entropy-pl measure"):
        getattr(trainer, stage)(Evaluates(), verbose=False)
    trainer.fit(Evaluates())  # validated first, as many are
    assert len(trainer.callbacks[0].records) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="expected a run that trains")
        getattr(trainer, stage)(Evaluates(), verbose=False)  # after a training it is nobody's mistake


@pytest.mark.parametrize("options", [{"steps": 0}, {"limit_train_batches": 0}, {"max_epochs": 0, "steps": -1}])
def test_a_fit_that_takes_no_step_is_refused(tmp_path, options):
    with pytest.raises(MisconfigurationException, match=r"got trainer.fit\(\) without a step to take: the probe"):
        fit(ForeignModule(), tmp_path, probe(), **options)


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_sharded_runs_are_refused(tmp_path, strategy):
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[probe()])
    trainer.strategy.__class__ = strategy  # which itself wants a GPU
    with pytest.raises(
        MisconfigurationException,
        match=rf"the whole policy, got {strategy.__name__}: .*checkpoint_path and checkpoint.after_checkpoint_path",
    ):
        trainer.callbacks[0].on_fit_start(trainer, ForeignModule())


def test_a_sharded_policy_is_refused_whatever_the_strategy():
    class DTensor(torch.Tensor):
        """Stands for torch.distributed's, which wants a device mesh."""

    policy = build_model()
    policy.lm_head.weight = nn.Parameter(policy.lm_head.weight.data.as_subclass(DTensor))
    with pytest.raises(ValueError, match=r"the whole policy, got lm_head.weight as a shard: probe a run whose"):
        refuse_sharded(policy, None)


def test_what_it_costs_is_said_in_advance(tmp_path, capsys):
    fit(ForeignModule(), tmp_path, probe(), steps=1)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("entropy probe: ")]
    assert "every 2 optimizer steps, 16 completions of up to 5 tokens, 7 passes over them, sampling included" in line
    assert "; memory beside the run's: " in line


@pytest.mark.parametrize("kept_as", ["attribute", "hparams", "generation_kwargs", "generation_config"])
def test_a_run_that_samples_from_a_truncated_distribution(tmp_path, kept_as):
    class Truncates(ForeignModule):
        def __init__(self, top_k: int = 20, temperature: float = 0.7) -> None:
            super().__init__()
            self.temperature = temperature
            if kept_as == "attribute":
                self.top_k = top_k
            elif kept_as == "hparams":
                self.save_hyperparameters()
            elif kept_as == "generation_kwargs":
                self.generation_kwargs = {"top_k": top_k}
            else:
                self.generation_config = GenerationConfig(top_k=top_k)

    callback = probe(every_n_steps=5)
    with pytest.warns(UserWarning, match="the run samples with top_k=20, the probe without"):
        fit(Truncates(), tmp_path, callback, steps=1)
    [warning] = callback.records[0]["warnings"]
    assert "whole distribution at temperature 0.7, not of the truncated one" in warning


@pytest.mark.parametrize(
    ("owners", "said"),
    [
        ([{"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}], None),  # TRL's own
        ([{"top_k": -1}], None),  # vLLM's way to say all
        ([{"top_k": None, "top_p": 1}], None),
        ([{"top_p": torch.tensor(0.5), "top_k": True, "min_p": print}], None),  # none of them is an option
        ([{"top_p": 1.0}, {"top_p": 0.9}], None),  # the first one wins: TRL's generation_kwargs
        ([{}, {"top_p": 0.9}], "top_p=0.9, the probe"),
        ([{"repetition_penalty": 1.05, "min_p": 0.1}], "min_p=0.1, repetition_penalty=1.05, the probe"),
        ([{"no_repeat_ngram_size": 3}], "no_repeat_ngram_size=3"),
        ([{"presence_penalty": -0.5}], "presence_penalty=-0.5"),
    ],
)
def test_which_options_truncate(owners, said):
    found = truncated_sampling(owners, 1.0)
    assert (found is None) if said is None else (found is not None and said in found)


class TwoPolicies(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.critic = build_model(1)


class NoPolicy(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Linear(2, 2)


class NoTokenizer(ForeignModule):
    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = None


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (TwoPolicies, {}, r"one Hugging Face or PEFT model in TwoPolicies, got critic, policy: name the policy"),
        (NoPolicy, {}, r"one Hugging Face or PEFT model in NoPolicy, got none"),
        (
            ForeignModule,
            {"policy": "polcy"},
            "policy at 'polcy' of ForeignModule, but there is no 'polcy'; did you mean 'policy'",
        ),
        (ForeignModule, {"prompts": "1+1="}, "expected a list of prompts, or a file .*, got the string '1.1='"),
        (ForeignModule, {"policy": "tokenizer"}, "Hugging Face or PEFT model at 'tokenizer'"),
        (NoTokenizer, {}, "a tokenizer as tokenizer or processing_class of NoTokenizer"),
        (ForeignModule, {"prompts": None}, "E prompts, got none"),
        (ForeignModule, {"prompts": []}, "at least 16 E prompts .* got 0"),
        (ForeignModule, {"num_sequences": 99}, "at least 99 E prompts .* got 36"),
        (ForeignModule, {"num_sequences": 16, "completions_per_prompt": 3}, "multiple of completions_per_prompt"),
        (ForeignModule, {"num_sequences": 1}, "at least 2 E prompts"),
        (ForeignModule, {"prompts": [*PROMPTS, "1" * 70]}, "context of 64 tokens, got 70 prompt tokens"),
        (
            ForeignModule,
            {"tokenizer": LARGER},
            "token ids below",
        ),
        (ForeignModule, {"output_directory": __file__}, "a folder for the probe's records that can be written to"),
    ],
)
def test_bad_attachments_are_refused_before_the_first_step(tmp_path, module, options, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(), tmp_path, probe(**options))


def test_two_probes_in_one_run_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match="expected one EntropyProbeCallback in a run, got two"):
        fit(ForeignModule(), tmp_path, probe(), probe(seed=1))


def test_a_frozen_reference_is_not_the_policy(tmp_path):
    class WithReference(ForeignModule):
        def __init__(self) -> None:
            super().__init__()
            self.reference = build_model(1).requires_grad_(False)

    callback = probe(every_n_steps=5)
    fit(WithReference(), tmp_path, callback)
    assert callback.records[-1]["status"] == "ok"


def test_a_new_run_in_an_old_folder_says_so(tmp_path):
    settings = {"output_directory": str(tmp_path / "probe"), "every_n_steps": 5}
    fit(ForeignModule(), tmp_path, probe(**settings), steps=1)
    with pytest.warns(UserWarning, match=r"records.jsonl holds records of an earlier run, and this one begins anew"):
        fit(ForeignModule(), tmp_path, probe(**settings), steps=1)


def test_a_named_policy_among_two_is_probed(tmp_path):
    callback = probe(policy="policy", every_n_steps=5)
    fit(TwoPolicies(), tmp_path, callback)
    assert callback.records[-1]["status"] == "ok"


@pytest.mark.parametrize(
    "options",
    [{"every_n_steps": -1}, {"normalize": "words"}, {"etas": [0.0]}, {"temperature": 0.0}, {"precision": "bfloat16"}],
)
def test_bad_options_are_refused_at_construction(options):
    with pytest.raises(MisconfigurationException, match="expected"):
        probe(**options)
