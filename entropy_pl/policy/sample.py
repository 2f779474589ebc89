"""Sample completions from a policy, exactly from the distribution that the scorer will assume.

That distribution is ``softmax(logits / temperature)``, unless ``top_p`` or ``top_k`` is asked for. Checkpoints carry
sampling habits of their own (Qwen2.5's ``generation_config.json`` brings ``top_k=20`` and a repetition penalty), which
``generate`` merges into whatever it is given: they are set aside here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from entropy_pl.policy.decode import decode
from entropy_pl.policy.generated import GeneratedLogProbs
from entropy_pl.policy.logits import why_not_finite
from entropy_pl.policy.positions import position_boundary
from entropy_pl.policy.precision import computes_in_half, evaluation_mode
from entropy_pl.policy.wrapper import base_of, wrapper_kept
from entropy_pl.progress import part
from entropy_pl.rollout import Rollout, checked_temperature

MAX_ROWS = 256
"""Rows sampled at once at most when ``batch_size`` is not given."""

CPU_ROWS = 128
"""The same on a CPU, where the cache of more rows costs more than the fewer steps save."""


def default_rows(device: torch.device) -> int:
    """Rows sampled at once at most when ``batch_size`` is not given."""
    return CPU_ROWS if device.type == "cpu" else MAX_ROWS


@torch.no_grad()
def sample_completions(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    *,
    num_completions: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    batch_size: int | None = None,
    generated: GeneratedLogProbs | None = None,
) -> Rollout:
    """Draw completions with a KV cache; the model and its settings are left as they were, also after an error.

    Random numbers come from the global torch RNG: wrap the call in ``isolated_rng`` to seed or to isolate it. At every
    token each row that is still in the batch gets its own, so which ones a row gets depends on the other rows, on when
    they finish, and on ``batch_size``; the same seed and arguments on the same device give the same completions. A
    completion ends with the first of the model's or the tokenizer's EOS tokens, which its mask counts, or after
    ``max_new_tokens``; finished rows soon leave the batch (see `decode`).

    Args:
        model: the policy, its adapter on or off as it is; sampled in eval mode, a PEFT model by its own ``generate``.
        tokenizer: of the policy; a BOS token is added where the tokenizer adds one and the text does not have it.
        prompts: texts, or token ids to begin with as they are, in the order wanted. Internally they are batched by
            length, the longest first.
        num_completions: G, completions per prompt.
        max_new_tokens: largest number of tokens T in a completion.
        temperature: divides the logits.
        top_p: keeps the smallest set of tokens whose probability reaches this; 1 keeps all.
        top_k: keeps the k likeliest tokens; None keeps all, 1 decodes greedily.
        batch_size: rows sampled at once; None takes up to 256, on a CPU up to 128.
        generated: keeps the log-probs of a few completions as they were when they were drawn.

    Returns:
        ``len(prompts) * G`` rows on the model's device, prompt-major: row ``p * G + g`` is completion g of prompt p.
        Columns that no row uses are trimmed.

    Raises:
        ValueError: if an argument is out of range, a prompt has no token, or prompt and completion do not fit the
            model's context.
        FloatingPointError: if the model's logits are not finite.
    """
    _check_arguments(prompts, num_completions, max_new_tokens, temperature, top_p, top_k, batch_size)
    generator = base_of(model)
    begun = prompt_tokens(tokenizer, prompts)
    _check_tokens(generator, begun)
    _check_context(generator, begun, max_new_tokens)

    ends = end_token_ids(model, tokenizer)
    pad = next(token for token in (tokenizer.pad_token_id, *ends, 0) if token is not None)
    config = GenerationConfig(
        do_sample=True,
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=top_k or 0,  # 0 is off; None would mean Transformers' own default of 50
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    rows = [tokens for tokens in begun for _ in range(num_completions)]
    by_length = sorted(
        range(len(rows)), key=lambda row: -len(rows[row])
    )  # the longest first: memory runs out at once or not
    device = generator.device
    size = batch_size or default_rows(device)
    prompt_width = len(rows[by_length[0]])
    prompt_ids = torch.full((len(rows), prompt_width), pad, dtype=torch.long, device=device)
    prompt_mask = torch.zeros_like(prompt_ids, dtype=torch.bool)
    completion_ids = torch.full((len(rows), max_new_tokens), pad, dtype=torch.long, device=device)
    if generated is not None:
        generated.begin(by_length, max_new_tokens, device, computes_in_half(model))

    batches = _batches(by_length, [len(row) for row in rows], size, position_boundary(model))
    with (
        evaluation_mode(model),
        wrapper_kept(model),
        _neutral_generation_config(generator),
        part("sampling", len(batches) * max_new_tokens, "token") as bar,
    ):
        for number, index in enumerate(batches):
            ids, mask = _left_pad([rows[row] for row in index], pad, device)
            finite = _FiniteLogits(device)
            processors = LogitsProcessorList([finite, _Moves(bar)])
            watch = None if generated is None else generated.watch(index, mask, temperature)
            if watch is not None:
                processors.append(watch)
            new = decode(model, ids, mask, config, processors, watch)
            bar.update((number + 1) * max_new_tokens - bar.n)  # all rows may end early
            if not finite.all_finite:
                raise FloatingPointError(
                    f"expected finite logits while sampling {len(index)} completions, got NaN or infinity: "
                    f"{why_not_finite(model)}; the policy has diverged, go on from an earlier checkpoint"
                )
            prompt_ids[index, prompt_width - ids.shape[1] :] = ids
            prompt_mask[index, prompt_width - ids.shape[1] :] = mask
            completion_ids[index, : new.shape[1]] = new

    completion_mask = _up_to_first_end(completion_ids, ends)
    width = int(completion_mask.any(0).sum())
    completion_ids = completion_ids.masked_fill(~completion_mask, pad)
    return Rollout(prompt_ids, prompt_mask, completion_ids[:, :width], completion_mask[:, :width], temperature)


def check_prompts(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
) -> int:
    """Refuse prompts that :func:`sample_completions` would refuse, before anything is sampled.

    Returns:
        Tokens of the longest prompt.

    Raises:
        ValueError: if a prompt has no token or one the model does not know, or prompt and completion do not fit its
            context.
    """
    tokens, generator = prompt_tokens(tokenizer, prompts), base_of(model)
    _check_tokens(generator, tokens)
    _check_context(generator, tokens, max_new_tokens)
    return max(map(len, tokens))


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Sequence[int]]) -> list[list[int]]:
    """The token ids that a completion of each prompt follows: of a text the tokenizer's, else the ids as they are.

    Args:
        tokenizer: the policy's; it adds the special tokens that it adds to any text, but no second BOS.
        prompts: texts, or token ids.

    Returns:
        A list of ids for each prompt.

    Raises:
        ValueError: if a prompt has no token.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    encoded = iter(tokenizer(texts, return_attention_mask=False)["input_ids"] if texts else ())
    bos = tokenizer.bos_token_id
    found: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        ids = next(encoded) if isinstance(prompt, str) else list(prompt)
        if isinstance(prompt, str) and bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]  # a template wrote BOS into the text, and the tokenizer another before it
        if not ids:
            raise ValueError(
                f"expected at least one token in every prompt, got none from prompt {index}, {prompt!r}: "
                "leave it out or give it text the tokenizer knows"
            )
        found.append(ids)
    return found


def decode_completions(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> list[str]:
    """The completions as text, ``[N]`` strings: masked positions and special tokens left out.

    Args:
        tokenizer: the policy's.
        rollout: the completions, ``[N, T]``.

    Returns:
        N strings.
    """
    return [
        str(tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids, mask in zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
    ]


def end_token_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion, sorted: the model's (there may be several) and the tokenizer's own.

    Args:
        model: the policy, for its generation config.
        tokenizer: the policy's.

    Returns:
        Token ids; none where neither names one.
    """
    generation_config = getattr(base_of(model), "generation_config", None)
    configured = getattr(generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list | tuple) else [configured])}
    return sorted(int(token) for token in ends - {None})


class _FiniteLogits(LogitsProcessor):
    """Notes rows whose distribution is undefined and makes them harmless until the batch is done.

    On CUDA, ``multinomial`` of such a row would trip a device-side assertion, which ends the process's use of the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # The largest logit is NaN if any is, +inf if any is, and -inf only if all are.
        bad = ~scores.amax(-1, keepdim=True).isfinite()
        self._bad |= bad.any()
        return scores.masked_fill(bad, 0.0)

    @property
    def all_finite(self) -> bool:
        return not bool(self._bad)


class _Moves(LogitsProcessor):
    """Moves a bar by one at every token position, and leaves the logits alone."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._bar.update()
        return scores


@contextmanager
def _neutral_generation_config(generator: PreTrainedModel) -> Iterator[None]:
    """Set aside the checkpoint's sampling habits, which ``generate`` merges into every field left at None."""
    own = generator.generation_config
    generator.generation_config = GenerationConfig()
    try:
        yield
    finally:
        generator.generation_config = own


def _batches(order: list[int], lengths: list[int], size: int, boundary: int | None) -> list[list[int]]:
    """Rows that are sampled together: so many at most, and none with one of another position regime."""
    groups = [order]
    if boundary is not None:  # the longest come first
        groups = [[row for row in order if (lengths[row] > boundary) == long] for long in (True, False)]
    return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _left_pad(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[B, P]`` of rows padded on the left to the longest."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def _up_to_first_end(ids: Tensor, ends: list[int]) -> Tensor:
    """``[N, T]`` bool: True up to and including the first end token. Never by pad id: it may be EOS, or be sampled."""
    is_end = torch.isin(ids, torch.tensor(ends, dtype=ids.dtype, device=ids.device))
    return is_end.cumsum(1) - is_end.long() == 0


def _check_arguments(
    prompts: Sequence[str | Sequence[int]],
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    batch_size: int | None,
) -> None:
    if isinstance(prompts, str):
        raise ValueError("expected a list of prompts, got one string: put it in a list")
    if not prompts:
        raise ValueError("expected at least one prompt to sample from, got an empty list")
    counts = {
        "num_completions": num_completions,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "top_k": top_k,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"expected {name} of at least 1, got {value}")
    checked_temperature(temperature)
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"expected top_p in (0, 1], got {top_p}")


def _check_tokens(generator: PreTrainedModel, prompt_tokens: list[list[int]]) -> None:
    """An id without an embedding would end in an index error, on CUDA in a device-side assertion."""
    embeddings = len(cast("nn.Embedding", generator.get_input_embeddings()).weight)
    for index, ids in enumerate(prompt_tokens):
        if max(ids) >= embeddings or min(ids) < 0:
            wrong = max(ids) if max(ids) >= embeddings else min(ids)
            raise ValueError(
                f"expected token ids below {embeddings}, as many as the model embeds, got {wrong} in "
                f"prompt {index}: the tokenizer and the model do not belong together"
            )


def _check_context(generator: PreTrainedModel, prompt_tokens: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(generator.config.get_text_config(), "max_position_embeddings", None)
    index = max(range(len(prompt_tokens)), key=lambda i: len(prompt_tokens[i]))
    length = len(prompt_tokens[index])
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"expected prompt and completion to fit the model's context of {limit} tokens, got {length} prompt tokens "
            f"+ {max_new_tokens} new tokens = {length + max_new_tokens} for prompt {index}: "
            "shorten the prompt or lower max_new_tokens"
        )
