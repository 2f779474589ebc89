"""Groups of completions with their rewards: what GRPO compares.

Notation: B prompts, G completions for each, rows prompt-major: row ``p * G + g`` is completion g of prompt p.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_pl.data.batch import PromptBatch
from entropy_pl.objectives import RewardSum, zero_advantage_groups
from entropy_pl.policy import decode_completions, end_token_ids, sample_completions
from entropy_pl.rollout import Rollout, checked_temperature

ZeroAdvantage = Literal["keep", "filter", "resample"]


@dataclass(frozen=True, eq=False)
class Groups:
    """B groups of G completions.

    Args:
        rollout: ``[B · G]`` rows, prompt-major.
        rewards: weighted sum of the rewards, ``[B · G]``, float32.
        reward_parts: each reward by name, unweighted, ``[B · G]``.
        truncated: completions without an end token, ``[B · G]``, bool.
        size: G.
    """

    rollout: Rollout
    rewards: Tensor
    reward_parts: dict[str, Tensor]
    truncated: Tensor
    size: int

    def __len__(self) -> int:
        return len(self.rewards) // self.size

    @property
    def zero_advantage(self) -> Tensor:
        """Groups whose rewards are all equal, ``[B]``, bool."""
        if not len(self):
            return torch.zeros(0, dtype=torch.bool, device=self.rewards.device)
        return zero_advantage_groups(self.rewards, self.size)

    def select(self, groups: Tensor) -> Groups:
        """The groups where the mask ``[B]`` is True."""
        rows = groups.repeat_interleave(self.size)
        parts = {name: values[rows] for name, values in self.reward_parts.items()}
        return Groups(self.rollout.select(rows), self.rewards[rows], parts, self.truncated[rows], self.size)

    @staticmethod
    def concatenate(parts: list[Groups]) -> Groups:
        """All groups of at least one part, which have one size and the same rewards."""
        return Groups(
            Rollout.concatenate([part.rollout for part in parts]),
            torch.cat([part.rewards for part in parts]),
            {name: torch.cat([part.reward_parts[name] for part in parts]) for name in parts[0].reward_parts},
            torch.cat([part.truncated for part in parts]),
            parts[0].size,
        )


@dataclass(frozen=True, eq=False)
class GroupSampler:
    """Draws groups of completions and rewards them. Random numbers come from the global torch stream.

    Args:
        reward: of a completion.
        num_generations: G.
        max_new_tokens: largest number of tokens in a completion.
        temperature: of sampling.
        top_p: sample from the smallest set of tokens with this probability; 1 keeps all.
        top_k: sample from the k likeliest tokens; None keeps all.
        batch_size: completions sampled at once; None takes up to 256.
        zero_advantage: what becomes of groups whose rewards are all equal, see `informative`.
        max_resamples: rounds of resampling.

    Raises:
        ValueError: if a setting is out of range.
    """

    reward: RewardSum
    num_generations: int = 8
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    batch_size: int | None = None
    zero_advantage: ZeroAdvantage = "keep"
    max_resamples: int = 2

    def __post_init__(self) -> None:
        # The sampler checks all but G too, but only once the policy is loaded.
        least = {"num_generations": 2, "max_new_tokens": 1, "top_k": 1, "batch_size": 1, "max_resamples": 0}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise ValueError(f"expected {name} of at least {minimum}, got {value}")
        if self.zero_advantage not in get_args(ZeroAdvantage):
            raise ValueError(
                f"expected zero_advantage out of {list(get_args(ZeroAdvantage))}, got {self.zero_advantage!r}"
            )
        checked_temperature(self.temperature)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"expected top_p above 0 and at most 1, got {self.top_p}")

    def draw(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch
    ) -> Groups:
        """Answer each prompt G times; on the model's device."""
        rollout = sample_completions(
            model,
            tokenizer,
            batch.prompts,
            num_completions=self.num_generations,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            batch_size=self.batch_size,
        )
        answers = [answer for answer in batch.answers for _ in range(self.num_generations)]
        rewards, parts = self.reward(decode_completions(tokenizer, rollout), answers)
        device = rollout.completion_ids.device
        last = rollout.completion_ids.gather(1, rollout.completion_lengths[:, None] - 1).flatten()
        ends = torch.tensor(end_token_ids(model, tokenizer), dtype=last.dtype, device=device)
        return Groups(rollout, rewards.to(device), parts, ~torch.isin(last, ends), self.num_generations)

    def informative(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        drawn: Groups,
    ) -> Groups:
        """The groups to learn from.

        ``keep``: all of them. ``filter``: those whose rewards differ. ``resample``: these, and the prompts of the
        others are answered anew, in at most ``max_resamples`` rounds.

        Args:
            model: the policy.
            tokenizer: of the policy.
            batch: the B prompts.
            drawn: their groups.

        Returns:
            At most B groups, those of the first draw first; filtering and resampling may leave none.
        """
        if self.zero_advantage == "keep":
            return drawn
        kept = [drawn.select(~drawn.zero_advantage)]
        for _ in range(self.max_resamples if self.zero_advantage == "resample" else 0):
            again = drawn.zero_advantage.nonzero().flatten().tolist()
            if not again:
                break
            batch = PromptBatch([batch.prompts[i] for i in again], [batch.answers[i] for i in again])
            drawn = self.draw(model, tokenizer, batch)
            kept.append(drawn.select(~drawn.zero_advantage))
        return Groups.concatenate(kept)
