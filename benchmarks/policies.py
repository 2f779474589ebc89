"""What is measured: a policy with a LoRA adapter, completions of its own, and one AdamW step.

A real policy and GSM8K where their folders are given; else random weights of the same shape, and token ids drawn with
a seed at GSM8K's lengths. What the tokens say has no part in the times, only how many they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.options import Options
from entropy_pl import PromptDataModule, Rollout, UpdateVector, load_policy, record_update, sample_completions
from entropy_pl.policy.adapter import attach_lora, trainable_parameters
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.settings import LoraSettings
from entropy_pl.rollout import TokenStats

TEMPLATE = "Question: {question}\nResponse: <think>"
MAX_NEW_TOKENS = 150
LORA = LoraSettings(rank=16, alpha=32, target_modules="all-linear")
PROMPT_TOKENS, COMPLETION_TOKENS = (84, 30), (100, 25)  # mean and standard deviation, of GSM8K and of that policy


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2; by default the 4M-parameter policy's."""

    hidden: int = 256
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    inner: int = 704
    vocabulary: int = 2048
    context: int = 512
    tied: bool = True

    def model(self, *, lora: LoraSettings | None = LORA, ends: int = 0, **config: Any) -> Any:
        """Random weights, in training's state as ``load_policy`` returns them.

        Args:
            lora: of the adapter; None trains all.
            ends: how many tokens end a completion: their share of the vocabulary is about the chance of an end.
            config: of the Qwen2 besides.
        """
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.inner,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=self.context,
                tie_word_embeddings=self.tied,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=list(range(1, 1 + ends)) or None,
                **config,
            )
        )
        return (model if lora is None else attach_lora(model, lora)).train()


TINY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, inner=48, vocabulary=128, context=512)


@dataclass(frozen=True)
class Case:
    """A policy at θ, a batch drawn from it, and a step of an optimizer."""

    model: Any
    rollout: Rollout
    update: UpdateVector
    what: str

    @property
    def device(self) -> torch.device:
        """The model's."""
        return next(self.model.parameters()).device


def build_case(options: Options) -> Case:
    """The case that the tables of scoring and of probes are about."""
    sequences = options.pick(options.sequences, 8)
    with isolated_rng(0):
        model, tokenizer, prompts, what = build_policy(options, sequences)
        if options.policy is None:
            rollout = random_rollout(sequences, model.config.vocab_size, *(([9, 3], [6, 2]) if options.small else ()))
        else:
            rollout = sample_completions(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)
        update = adamw_step(model.to(options.device), rollout)
    model.eval()
    return Case(model, rollout.to(options.device), update, f"{what}; {described(rollout)}")


def build_policy(
    options: Options, prompts: int, *, ending: bool = True
) -> tuple[Any, PreTrainedTokenizerBase, list[str], str]:
    """Model, tokenizer, prompts, and in words what they are.

    With ``ending``, about 1 % of the tokens drawn from random weights end a completion; else next to none.
    """
    if options.policy is not None:
        model, tokenizer = load_policy(options.policy, lora=LORA)
        data = PromptDataModule("gsm8k_r1_template", options.data, TEMPLATE, e_size=prompts)
        return model, tokenizer, data.e_prompts, "the policy and the data given"
    shape = TINY if options.small else Shape()
    lengths = _lengths(prompts, (9, 3) if options.small else PROMPT_TOKENS, 4, 250)
    model = shape.model(ends=shape.vocabulary // 100 if ending else 0)
    return model, word_tokenizer(shape.vocabulary), random_prompts(lengths, shape.vocabulary), "random weights"


def described(rollout: Rollout) -> str:
    """Numbers and mean lengths."""
    return (
        f"{len(rollout)} completions of {rollout.completion_lengths.double().mean():.0f} tokens to prompts of "
        f"{rollout.prompt_lengths.double().mean():.0f} (means)"
    )


def adamw_step(model: nn.Module, rollout: Rollout, *, lr: float = 3e-4, weight_decay: float = 0.0) -> UpdateVector:
    """The second of two AdamW steps along the log-probs of eight completions' beginnings; the model stays before it."""
    trainable = trainable_parameters(model)
    optimizer = torch.optim.AdamW(trainable.values(), lr=lr, weight_decay=weight_decay)
    few = rollout.select(torch.arange(min(8, len(rollout))))
    few = replace(few, completion_ids=few.completion_ids[:, :64], completion_mask=few.completion_mask[:, :64])
    for _ in range(2):
        before = {name: p.detach().clone() for name, p in trainable.items()}
        for name, gradient in weighted_gradient(model, few, log_prob_coefficients(few), trainable).items():
            trainable[name].grad = gradient.to(trainable[name])
        with record_update(model, optimizer) as recorder:
            optimizer.step()
    for name, parameter in trainable.items():
        parameter.data = before[name]
        parameter.grad = None
    return recorder.update


def log_prob_coefficients(rollout: Rollout) -> TokenStats:
    """Of Σ log π over all tokens."""
    mask = rollout.completion_mask
    return TokenStats(mask.double(), torch.zeros(mask.shape, dtype=torch.float64, device=mask.device), mask)


def random_rollout(
    sequences: int,
    vocabulary: int,
    prompt: tuple[int, int] | list[int] = PROMPT_TOKENS,
    completion: tuple[int, int] | list[int] = COMPLETION_TOKENS,
) -> Rollout:
    """Random tokens, of normally distributed numbers: mean and standard deviation are given; from the global RNG."""
    prompts = _lengths(sequences, prompt, 4, max(250, prompt[0]))  # longer ones if meant
    completions = _lengths(sequences, completion, 2, max(MAX_NEW_TOKENS, completion[0]))
    prompt_mask = _up_to(prompts).flip(1)
    completion_mask = _up_to(completions)
    ids = [torch.randint(1, vocabulary, mask.shape) * mask for mask in (prompt_mask, completion_mask)]
    return Rollout(ids[0], prompt_mask, ids[1], completion_mask)


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """One token a word, ``w0`` to as many as there are."""
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", padding_side="left")


def random_prompts(lengths: Tensor, vocabulary: int) -> list[str]:
    """Words that :func:`word_tokenizer` reads, none of which ends a completion."""
    first = 1 + vocabulary // 100
    return [" ".join(f"w{i}" for i in torch.randint(first, vocabulary, (int(length),)).tolist()) for length in lengths]


def _lengths(count: int, mean_and_deviation: tuple[int, int] | list[int], low: int, high: int) -> Tensor:
    mean, deviation = mean_and_deviation
    return (mean + deviation * torch.randn(count)).round().long().clamp(low, high)


def _up_to(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max())) < lengths[:, None]
