"""E prompts in whatever form a run keeps them, as texts ready for the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from entropy_pl.policy.rng import isolated_rng

DEFAULT_COLUMN = "prompt"


def prompt_texts(prompts: Any, tokenizer: PreTrainedTokenizerBase, column: str = DEFAULT_COLUMN) -> list[str]:
    """The texts that a policy is given to complete.

    Args:
        prompts: strings; chats (lists of messages, dicts with ``role`` and ``content``), which go through the
            tokenizer's chat template, up to where the assistant's turn begins; rows (dicts) that hold either in
            ``column``; a dataset with such a column, or the path of a file with one: JSON lines, CSV or Parquet.
        tokenizer: whose chat template is meant.
        column: of a dataset, or of rows.

    Raises:
        ValueError: for something else, no such column, or a chat without a template.
        FileNotFoundError: if there is no such file.
    """
    prompts = read_prompts(prompts)
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):
        raise ValueError(
            f"expected prompts as a list of strings, a list of chats or a dataset, got {type(prompts).__name__}"
        )
    columns = getattr(prompts, "column_names", None)
    if not hasattr(prompts, "__len__"):
        raise ValueError(
            f"expected prompts that can be counted, got a stream ({type(prompts).__name__}): take(n) of it"
        )
    if columns is None:
        rows = list(prompts)
    elif column in columns:
        rows = list(prompts[column])  # type: ignore[index]  # a dataset
    else:
        raise ValueError(
            f"expected a column {column!r} in the dataset of prompts, got {list(columns)}: prompt_column='...'"
        )
    return [_text(prompt, index, tokenizer, column) for index, prompt in enumerate(rows)]


def find_prompts(given: Any, kept: Any, tokenizer: PreTrainedTokenizerBase, column: str) -> list[str]:
    """The prompts given, or else those that the run keeps for evaluation.

    Raises:
        ValueError: if there are none, or as :func:`prompt_texts`.
    """
    return prompt_texts(given_or_kept(given, kept), tokenizer, column)


def given_or_kept(given: Any, kept: Any) -> Any:
    """The prompts given, or else those that the run keeps for evaluation, in the form they have.

    Raises:
        ValueError: if there are none.
    """
    if given is None and kept is None:
        raise ValueError(
            "expected E prompts, got none: give prompts=, strings, chats or a dataset that the run does not train on, "
            "or let the run keep some, as e_prompts of its datamodule or eval_dataset of its trainer"
        )
    return kept if given is None else given


def read_prompts(prompts: Any) -> Any:
    """The dataset in the file, where prompts are the path of one; anything else as it is.

    Raises:
        ValueError: for a file of another kind.
        FileNotFoundError: if there is no such file.
    """
    return _read(os.fspath(prompts)) if isinstance(prompts, str | os.PathLike) else prompts


class PromptRows:
    """The rows that prompts came from, found again by their texts.

    Args:
        prompts: as for :func:`prompt_texts`, a file read.
        texts: what it made of all of them.
        column: of a dataset, or of rows.
    """

    def __init__(self, prompts: Any, texts: Sequence[str], column: str = DEFAULT_COLUMN) -> None:
        self._prompts, self._column = prompts, column
        self._places: dict[str, list[int]] = {}
        for place, text in enumerate(texts):
            self._places.setdefault(text, []).append(place)

    def __getitem__(self, text: str) -> dict[str, Any]:
        """The row of a prompt, its prompt as ``prompt``; of a prompt without a row, that alone.

        Raises:
            ValueError: for a prompt of several rows that are not the same.
            KeyError: for one that is not among the texts.
        """
        row, *others = (self._row(place) for place in self._places[text])
        if any(other != row for other in others):
            raise ValueError(f"expected one row for each E prompt, got {len(others) + 1} that differ for {text!r}")
        return row

    def _row(self, place: int) -> dict[str, Any]:
        row = self._prompts[place]
        if not isinstance(row, Mapping):
            return {DEFAULT_COLUMN: row}
        return {**row, DEFAULT_COLUMN: row[self._column]}


def count_common(
    prompts: Sequence[str], update_prompts: Any, tokenizer: PreTrainedTokenizerBase, column: str
) -> int | None:
    """How many of the E prompts are U prompts too; None where the run's data does not tell its prompts.

    A text that only begins with the prompt counts: supervised data holds prompt and answer in one.

    Args:
        prompts: E, as texts.
        update_prompts: whatever the run trains on: anything :func:`prompt_texts` understands, or something else.
        tokenizer: of the policy.
        column: of a dataset.
    """
    table = hasattr(update_prompts, "column_names") and hasattr(update_prompts, "__len__")
    if not (isinstance(update_prompts, list | tuple) or table):
        return None  # a stream, or rows made as they are asked for: reading it would be felt by the run
    try:
        with isolated_rng():  # a dataset may transform its rows at random
            learnt = sorted(prompt_texts(update_prompts, tokenizer, column))
    except Exception:  # tensors of tokens, say; whatever it is, it is the run's own business
        return None
    following = ((prompt, bisect_left(learnt, prompt)) for prompt in prompts)  # texts it begins are next in order
    return sum(place < len(learnt) and learnt[place].startswith(prompt) for prompt, place in following)


def fingerprint(prompts: Iterable[str]) -> str:
    """Tells two sets of prompts apart: the first 16 hexadecimal digits of a SHA-256."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()[:16]


def _read(path: str) -> Any:
    from datasets import load_dataset  # seconds that other forms need not pay

    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    kind = kinds.get(os.path.splitext(path)[1])
    if kind is None:
        shown = path if len(path) <= 40 else f"{path[:40]}…"
        raise ValueError(
            f"expected a list of prompts, or a file of them ({', '.join(kinds)}), got the string {shown!r}"
        )
    if not os.path.isfile(path):
        raise FileNotFoundError(f"expected a file of prompts, got {path}, no such file")
    return load_dataset(kind, data_files=path, split="train")


def _text(prompt: Any, index: int, tokenizer: PreTrainedTokenizerBase, column: str) -> str:
    if isinstance(prompt, Mapping) and "role" not in prompt:
        if column not in prompt:
            raise ValueError(f"expected {column!r} in every row of prompts, row {index} has {list(prompt)}")
        prompt = prompt[column]
    if isinstance(prompt, str):
        return prompt
    if not is_chat(prompt):
        raise ValueError(
            f"expected prompt {index} as a string or a chat, [{{'role': ..., 'content': ...}}, ...], got "
            f"{type(prompt).__name__}"
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"expected a tokenizer with a chat template for the chat in prompt {index}, got {type(tokenizer).__name__} "
            "without one: set tokenizer.chat_template, or give prompts as strings"
        )
    continued = prompt[-1]["role"] == "assistant"  # the policy goes on with what is there of its turn
    try:
        return str(
            tokenizer.apply_chat_template(
                prompt, tokenize=False, add_generation_prompt=not continued, continue_final_message=continued
            )
        )
    except TemplateError as error:
        raise ValueError(f"expected a chat that the tokenizer's template takes, got prompt {index}: {error}") from error


def is_chat(prompt: Any) -> bool:
    """Whether it is a list of messages, each with a role and a content."""
    return (
        isinstance(prompt, Sequence)
        and len(prompt) > 0
        and all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in prompt)
    )
