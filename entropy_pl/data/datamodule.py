"""Prompts for a GRPO run: U prompts to update on, E prompts to measure entropy on, never a common one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import lightning
import torch
from torch.utils.data import DataLoader, DistributedSampler

from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.registry import PromptExample, check_template, format_prompt, get_dataset


class EpochOrder(DistributedSampler[PromptExample]):
    """An order that depends on the seed and the epoch only: not on the global RNG, not on what ran before.

    Of W processes number r takes places r, r + W, r + 2W, … of it: together they are, step by step, at the prompts
    where one process with W times the batch size would be. No place is taken twice in an epoch; the last few, where
    they do not go round, are left out.

    Lightning calls ``set_epoch``, so a resumed run goes on with the order it would have had; elsewhere every pass
    is the next epoch. Under DDP Lightning leaves a `DistributedSampler` alone. The one it would put in the place of
    another sampler repeats prompts, knows nothing of this seed, and shuffles whether asked to or not.
    """

    def __iter__(self) -> Iterator[int]:  # type: ignore[override]  # of places: torch's stubs say it yields examples
        order = list(range(len(self.dataset)))  # type: ignore[arg-type]
        if self.shuffle:
            random.Random(f"{self.seed}, epoch {self.epoch}").shuffle(order)
        self.epoch += 1
        return iter(order[self.rank : self.total_size : self.num_replicas])


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
        batch_size: prompts per step and process; each is answered by a group of completions. Processes have different
            prompts. Prompts at the end of an epoch that do not make a batch for every process are dropped.
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
        chosen = examples[: self.u_size]
        processes, _ = self._process()
        wanted = max(self.batch_size * processes, self.u_size or 0)
        if len(chosen) < wanted:
            raise ValueError(
                f"expected at least {wanted} prompts to update on (batch_size={self.batch_size}, {processes} "
                f"process{'es' if processes > 1 else ''}, u_size={self.u_size}), got {len(chosen)}: split "
                f"{self.u_split!r} of {self.dataset.name} without the {len(held_out)} E prompts; change u_size, or "
                "lower batch_size or e_size"
            )
        return chosen

    @property
    def e_prompts(self) -> list[str]:
        """The E prompts, formatted."""
        return [format_prompt(self.template, example.question) for example in self.e_examples]

    @property
    def u_prompts(self) -> list[str]:
        """The U prompts, formatted."""
        return [format_prompt(self.template, example.question) for example in self.u_examples]

    def train_dataloader(self) -> DataLoader[PromptExample]:
        """Batches of U prompts, as `PromptBatch`."""
        processes, rank = self._process()
        examples: Any = self.u_examples  # a list is a map-style dataset
        return DataLoader(
            examples,
            batch_size=self.batch_size,
            sampler=EpochOrder(examples, processes, rank, shuffle=self.shuffle, seed=self.seed, drop_last=True),
            collate_fn=self._collate,
            drop_last=True,
            # an iterator draws a seed for its workers: from here, so that the global RNG stays untouched
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _process(self) -> tuple[int, int]:
        """How many processes there are, and which one this is; outside a Trainer it is alone."""
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _load(self, split: str) -> list[PromptExample]:
        return self.dataset.load(split, path=self.dataset_path, size=None, seed=self.seed)

    def _collate(self, examples: list[PromptExample]) -> PromptBatch:
        return PromptBatch(
            prompts=[format_prompt(self.template, example.question) for example in examples],
            answers=[example.answer for example in examples],
        )
