"""What a run can say of itself, beside its policy: the U-batch of a step, and what completions are worth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from entropy_pl.attribution import UpdateBatch
from entropy_pl.estimators.reward import checked_rewards
from entropy_pl.peers import Peers
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import decode_completions
from entropy_pl.probe import what_happened
from entropy_pl.rollout import Rollout


@dataclass(frozen=True)
class RunSources:
    """What a run can say of itself, beside its policy, where it can.

    Args:
        update_batch: the U-batch of the step under way; called from the optimizer's hook.
        rewards: from prompts and completions, texts, to a reward each; None where it does not know.
        rewards_take_ids: whether ``rewards`` takes the completions' token ids, lists, as a third argument.
    """

    update_batch: Callable[[], UpdateBatch | None] | None = None
    rewards: Callable[..., Any] | None = None
    rewards_take_ids: bool = False

    def batch_of_step(self, peers: Peers, absent: dict[str, str]) -> UpdateBatch | None:
        """Return the U-batch, if every process has its part; to be called while the step is under way.

        Args:
            peers: the run's processes, which all call this.
            absent: is told why there is none.
        """
        batch, why = None, "the run does not supply its U-batch: give its module a method update_batch()"
        if self.update_batch is not None:
            try:
                batch = self.update_batch()
                why = "the run did not supply the U-batch of this step"
            except Exception as error:
                why = f"the run could not supply its U-batch. {what_happened(error)}"
        if not all(peers.exchange(batch is not None)):
            absent["attribution"] = why if batch is None else "another process did not supply its U-batch"
            return None
        return batch

    def rewards_of(
        self, prompts: list[str], rollout: Rollout, tokenizer: Any, seed: int, peers: Peers, absent: dict[str, str]
    ) -> Tensor | None:
        """Return the rewards of this process's completions, ``[n]``, if every process knows theirs.

        Args:
            prompts: of every completion.
            rollout: this process's share of E.
            tokenizer: of the policy.
            seed: of the random numbers that rewards may draw.
            peers: the run's processes, which all call this.
            absent: is told why there are none.
        """
        rewards, why = None, "the run does not say what a completion of E is worth: give reward="
        if self.rewards is not None:
            try:
                asked = [prompts, decode_completions(tokenizer, rollout)]
                if self.rewards_take_ids:
                    rows = zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
                    asked.append([ids[mask].tolist() for ids, mask in rows])
                with isolated_rng(seed):
                    found = self.rewards(*asked) if prompts else []
                rewards = None if found is None else checked_rewards(found, len(rollout))
            except Exception as error:
                why = f"the run could not reward E's completions. {what_happened(error)}"
        if not all(peers.exchange(rewards is not None)):
            absent["reward"] = why if rewards is None else "another process could not reward its completions"
            return None
        return rewards
