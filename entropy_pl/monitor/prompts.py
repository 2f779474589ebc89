"""E prompts in whatever form a run keeps them: read, rendered, and found among those it trains on."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from entropy_pl.monitor.rendering import Prompt, Rendering, is_chat
from entropy_pl.policy.rng import isolated_rng

__all__ = [
    "DEFAULT_COLUMN",
    "Prompt",
    "PromptRows",
    "Rendering",
    "count_common",
    "find_prompts",
    "fingerprint",
    "given_or_kept",
    "is_chat",
    "prompt_texts",
    "prompts_in",
    "read_prompts",
    "row_of",
]

DEFAULT_COLUMN = "prompt"


def prompts_in(prompts: Any, column: str = DEFAULT_COLUMN) -> list[Any]:
    """The prompts of a set of them: strings and chats, neither rendered nor encoded.

    Args:
        prompts: strings; chats (lists of messages, dicts with ``role`` and ``content``); rows (dicts) that hold either
            in ``column``; a dataset with such a column, or a dict of one such; or the path of a file with one: JSON
            lines, CSV or Parquet.
        column: of a dataset, or of rows.

    Raises:
        ValueError: for something else, or no such column.
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
    return [_of_row(row, index, column) for index, row in enumerate(rows)]


def prompt_texts(prompts: Any, tokenizer: PreTrainedTokenizerBase, column: str = DEFAULT_COLUMN) -> list[str]:
    """The texts that a policy is given to complete.

    Args:
        prompts: as for :func:`prompts_in`; chats go through the chat template, up to where the assistant's turn begins.
        tokenizer: whose chat template is meant.
        column: of a dataset, or of rows.

    Raises:
        ValueError: as :func:`prompts_in`, or for a chat that cannot be rendered.
        FileNotFoundError: if there is no such file.
    """
    rendering = Rendering(tokenizer)
    return [rendering.text(prompt, index) for index, prompt in enumerate(prompts_in(prompts, column))]


def find_prompts(given: Any, kept: Any, tokenizer: PreTrainedTokenizerBase, column: str) -> list[Prompt]:
    """The prompts given, or else those that the run keeps for evaluation.

    Raises:
        ValueError: if there are none, or as :func:`prompt_texts`.
    """
    with isolated_rng(0):  # a dataset may transform its rows at random: in every process, and if resumed, alike
        return Rendering(tokenizer).prompts(prompts_in(given_or_kept(given, kept), column))


def given_or_kept(given: Any, kept: Any) -> Any:
    """The prompts given, or else those that the run keeps for evaluation: a file read, of a dict the one set in it.

    Raises:
        ValueError: if there are none, or several sets.
        FileNotFoundError: if there is no such file.
    """
    if given is None and kept is None:
        raise ValueError(
            "expected E prompts, got none: give prompts=, strings, chats or a dataset that the run does not train on, "
            "or let the run keep some, as e_prompts of its datamodule or eval_dataset of its trainer"
        )
    if given is None:
        return read_prompts(kept, "the run's evaluation data (its trainer's eval_dataset)", "eval_dataset")
    return read_prompts(given)


def read_prompts(prompts: Any, whose: str = "prompts", name: str = "data") -> Any:
    """The dataset in the file, where prompts are the path of one; the one set in a dict of one; else as it is.

    Args:
        prompts: in any form.
        whose: they are, for messages.
        name: of them in code, for messages.

    Raises:
        ValueError: for a file of another kind, or a dict of several sets.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(prompts, str | os.PathLike):
        return _read(os.fspath(prompts))
    if not isinstance(prompts, Mapping) or any(isinstance(part, str | Mapping) for part in prompts.values()):
        return prompts
    if len(prompts) != 1:  # as of a DatasetDict: which of them is meant, only the user knows
        first = next(iter(prompts), "...")
        raise ValueError(
            f"expected one set of E prompts, got {whose} as a {type(prompts).__name__} of {len(prompts)} "
            f"({', '.join(map(str, prompts))}): say which, prompts={name}[{first!r}]"
        )
    return next(iter(prompts.values()))


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
        return row_of(self._prompts, place, self._column)


def row_of(prompts: Any, place: int, column: str) -> dict[str, Any]:
    """The row of a set of prompts, its prompt as ``prompt``; of a prompt without a row, that alone."""
    row = prompts[place]
    if not isinstance(row, Mapping):
        return {DEFAULT_COLUMN: row}
    return {**row, DEFAULT_COLUMN: row[column]}


def count_common(prompts: Sequence[str], update_prompts: Any, rendering: Rendering, column: str) -> int | None:
    """How many of the E prompts are U prompts too; None where the run's data does not tell its prompts.

    A text that only begins with the prompt counts: supervised data holds prompt and answer in one.

    Args:
        prompts: E, as texts.
        update_prompts: whatever the run trains on: anything :func:`prompts_in` understands, or something else.
        rendering: that made the texts.
        column: of a dataset.
    """
    table = hasattr(update_prompts, "column_names") and hasattr(update_prompts, "__len__")
    if not (isinstance(update_prompts, list | tuple) or table):
        return None  # a stream, or rows made as they are asked for: reading it would be felt by the run
    try:
        with isolated_rng():  # a dataset may transform its rows at random
            raw = prompts_in(update_prompts, column)
            learnt = sorted(rendering.text(prompt, index) for index, prompt in enumerate(raw))
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


def _of_row(prompt: Any, index: int, column: str) -> Any:
    if isinstance(prompt, Mapping) and "role" not in prompt:
        if column not in prompt:
            raise ValueError(f"expected {column!r} in every row of prompts, row {index} has {list(prompt)}")
        return prompt[column]
    return prompt
