"""Prompts for a GRPO run: U prompts to update on, E prompts to measure entropy on, never a common one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, RandomSampler

from entropy_pl.data.registry import PromptExample, check_template, format_prompt, get_dataset


@dataclass  # not frozen: Lightning's half precision plugin rebuilds batches field by field
class PromptBatch:
    """Formatted prompts with their reference answers, one answer per prompt."""

    prompts: list[str]
    answers: list[str]

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str, **_: Any) -> PromptBatch:
        """Text has no device: the batch itself. Lightning asks for nothing more."""
        return self


class EpochShuffle(RandomSampler):
    """A permutation that depends on the seed and the epoch only: not on the global RNG, not on what ran before.

    Lightning calls ``set_epoch``, so a resumed run goes on with the order it would have had; elsewhere every pass
    is the next epoch. As a `RandomSampler` it may be replaced by Lightning's distributed one.
    """

    def __init__(self, data_source: list[PromptExample], seed: int) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(len(self)))
        random.Random(f"{self.seed}, epoch {self.epoch}").shuffle(order)
        self.epoch += 1
        return iter(order)


class PromptDataModule(lightning.LightningDataModule):
    """Prompts of a registered dataset, split into E (entropy is measured on them) and U (the policy learns from them).

    E prompts are distinct and drawn once, by ``seed``. U drops every prompt that is in E, so the two are disjoint
    even where both come from one split, or the dataset repeats itself.

    Args:
        dataset: a registered dataset: ``arithmetic_r1_template`` (generated), ``gsm8k_r1_template``, or your own.
        dataset_path: local folder of the dataset; None: the hub, or nothing to read.
        prompt_template: text around each question, must contain ``{question}``; None: the dataset's own.
        u_split: split the update prompts come from.
        e_split: split the evaluation prompts come from; may be the same.
        u_size: how many update prompts; None: all there are.
        e_size: how many evaluation prompts are kept for the probe.
        batch_size: prompts per step; each is answered by a group of completions. An incomplete last batch is dropped.
        shuffle: give the update prompts a new order in every epoch.
        seed: of the draw of E, of the order of U, and of datasets that are generated.

    Raises:
        ValueError: at construction, for an unknown dataset, a template without ``{question}`` or a size below one;
            when the prompts are read, for more E or U prompts than there are.
    """

    def __init__(
        self,
        dataset: str = "arithmetic_r1_template",
        dataset_path: str | None = None,
        prompt_template: str | None = None,
        u_split: str = "train",
        e_split: str = "test",
        u_size: int | None = None,
        e_size: int = 256,
        batch_size: int = 16,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("u_size", u_size), ("e_size", e_size), ("batch_size", batch_size)):
            if size is not None and size < 1:
                raise ValueError(f"expected {name} of at least 1, got {size}")
        self.dataset = get_dataset(dataset)
        self.template = check_template(self.dataset.template if prompt_template is None else prompt_template)
        # A checkpoint then says which prompts it was trained on. Not logged: a module may log a `seed` of its own.
        self.save_hyperparameters(logger=False)
        self.dataset_path = dataset_path
        self.u_split, self.e_split = u_split, e_split
        self.u_size, self.e_size = u_size, e_size
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Read both sets of prompts, once."""
        _ = self.u_examples

    @cached_property
    def e_examples(self) -> list[PromptExample]:
        """The E questions with their answers, distinct."""
        unique = list({example.question: example for example in self._load(self.e_split)}.values())
        if len(unique) < self.e_size:
            raise ValueError(
                f"expected e_size of at most {len(unique)}, the distinct prompts in split {self.e_split!r} of "
                f"{self.dataset.name}, got {self.e_size}"
            )
        return random.Random(self.seed).sample(unique, self.e_size)

    @cached_property
    def u_examples(self) -> list[PromptExample]:
        """The U questions with their answers, none of them in E."""
        held_out = {example.question for example in self.e_examples}
        examples = [example for example in self._load(self.u_split) if example.question not in held_out]
        wanted = self.batch_size if self.u_size is None else max(self.u_size, self.batch_size)
        if len(examples) < wanted:
            raise ValueError(
                f"expected at least {wanted} prompts to update on (batch_size={self.batch_size}, "
                f"u_size={self.u_size}), got {len(examples)}: split {self.u_split!r} of {self.dataset.name} without "
                f"the {len(held_out)} E prompts; lower u_size, batch_size or e_size"
            )
        return examples[: self.u_size]

    @property
    def e_prompts(self) -> list[str]:
        """The E prompts, formatted."""
        return [format_prompt(self.template, example.question) for example in self.e_examples]

    def train_dataloader(self) -> DataLoader[PromptExample]:
        """Batches of U prompts, as `PromptBatch`."""
        return DataLoader(
            self.u_examples,  # type: ignore[arg-type]  # a list is a map-style dataset
            batch_size=self.batch_size,
            sampler=EpochShuffle(self.u_examples, self.seed) if self.shuffle else None,
            collate_fn=self._collate,
            drop_last=True,
            # an iterator draws a seed for its workers: from here, so that the global RNG stays untouched
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _load(self, split: str) -> list[PromptExample]:
        return self.dataset.load(split, path=self.dataset_path, size=None, seed=self.seed)

    def _collate(self, examples: list[PromptExample]) -> PromptBatch:
        return PromptBatch(
            prompts=[format_prompt(self.template, example.question) for example in examples],
            answers=[example.answer for example in examples],
        )
