"""Sums and differences of numbers below a hundred: a dataset that needs no download and is never wrong."""

from __future__ import annotations

import random
import zlib
from typing import Literal, get_args

from entropy_pl.data.registry import R1_TEMPLATE, PromptExample, register_dataset

Split = Literal["train", "validation", "test"]
NUMBERS = range(100)


@register_dataset("arithmetic_r1_template", template=R1_TEMPLATE)
def load_arithmetic(split: str, *, path: str | None, size: int | None, seed: int) -> list[PromptExample]:
    """Generate questions such as ``What is 37 + 45?``; no difference is negative.

    There are 15,050 questions: about 80 % are ``train``, 10 % ``validation`` and 10 % ``test``. A question belongs to
    one split whatever the seed, so that a policy trained under one seed is not tested on its training questions
    under another.

    Args:
        split: ``train``, ``validation`` or ``test``.
        path: must be None, there is nothing to read.
        size: how many questions; None: all of the split.
        seed: of their order, and so of which ones a smaller ``size`` keeps.

    Returns:
        Distinct questions with their answers.

    Raises:
        ValueError: if the split is unknown, or a path is given.
    """
    if split not in get_args(Split):
        raise ValueError(f"expected a split out of {list(get_args(Split))}, got {split!r}")
    if path is not None:
        raise ValueError(f"expected no dataset_path, arithmetic questions are generated, got {path!r}")
    examples = [example for example in _all_examples() if _split_of(example.question) == split]
    random.Random(seed).shuffle(examples)
    return examples[:size]


def _all_examples() -> list[PromptExample]:
    return [
        example
        for a in NUMBERS
        for b in NUMBERS
        for example in (
            PromptExample(f"What is {a} + {b}?", str(a + b)),
            *([PromptExample(f"What is {a} - {b}?", str(a - b))] if a >= b else []),
        )
    ]


def _split_of(question: str) -> Split:
    bucket = zlib.crc32(question.encode()) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"
