r"""Datasets by name: a loader of questions with their answers, and the prompt template they are asked in.

A dataset of one's own is one decorated function, in any module that is imported before the datamodule is built::

    @register_dataset("my_questions", template="Question: {question}\nResponse: <think>")
    def load_my_questions(split, *, path, size, seed):
        return [PromptExample("How many legs has a spider?", "8")]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from entropy_pl.registry import Registry

QUESTION_FIELD = "{question}"
R1_TEMPLATE = "Question: {question}\nResponse: <think>"


@dataclass(frozen=True)
class PromptExample:
    """A question and its reference answer, both as text.

    Args:
        question: what stands in the template's place of ``{question}``.
        answer: what rewards compare a completion with.
    """

    question: str
    answer: str


class DatasetLoader(Protocol):
    """Reads one split: ``path`` is a local folder (None: wherever the dataset lives), ``size`` at most so many rows."""

    def __call__(self, split: str, *, path: str | None, size: int | None, seed: int) -> list[PromptExample]:
        """The questions of a split, with their answers."""


@dataclass(frozen=True)
class PromptDataset:
    """A registered dataset: its name, its loader and its default prompt template.

    Args:
        name: what configs call it.
        load: reads a split (:class:`~entropy_pl.data.registry.DatasetLoader`).
        template: default prompt template; contains ``{question}``.
    """

    name: str
    load: DatasetLoader
    template: str


_DATASETS: Registry[PromptDataset] = Registry("dataset")


def check_template(template: str) -> str:
    """Return ``template`` if it has a place for the question.

    Raises:
        ValueError: if ``{question}`` is not in it.
    """
    if QUESTION_FIELD not in template:
        raise ValueError(f"expected a prompt template that contains {QUESTION_FIELD}, got {template!r}")
    return template


def format_prompt(template: str, question: str) -> str:
    """The prompt for a question; braces other than ``{question}`` stay as they are, in template and question."""
    return template.replace(QUESTION_FIELD, question)


def register_dataset(name: str, *, template: str) -> Callable[[DatasetLoader], DatasetLoader]:
    """Make a loader available under a name.

    Args:
        name: what configs call the dataset.
        template: default prompt template; contains ``{question}``.

    Returns:
        A decorator that returns the loader unchanged.

    Raises:
        ValueError: if the name is taken by another dataset, or the template has no ``{question}``.
    """
    check_template(template)

    def register(loader: DatasetLoader) -> DatasetLoader:
        _DATASETS.add(name, PromptDataset(name, loader, template))
        return loader

    return register


def available_datasets() -> list[str]:
    """Registered names, sorted.

    Returns:
        What `get_dataset` and a config's `data.dataset` understand.
    """
    return _DATASETS.names()


def get_dataset(name: str) -> PromptDataset:
    """Look a dataset up.

    Args:
        name: as registered.

    Raises:
        ValueError: if the name is not registered; the message names the nearest one and all there are.
    """
    return _DATASETS.get(name)
