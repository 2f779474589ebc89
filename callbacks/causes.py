"""The causes of a step's entropy change, looked for in a run: tokens, other losses, and the reward it was paid for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution import Attribution, InfluenceMatrix, UpdateBatch, counterfactual_update
from entropy_pl.estimators import EntropyChange
from entropy_pl.estimators.reward import checked_rewards
from entropy_pl.objectives import counterfactual_names
from entropy_pl.peers import Peers
from entropy_pl.policy.rng import derived_seed, isolated_rng
from entropy_pl.policy.sample import decode_completions
from entropy_pl.probe import EntropyProbe, ProbeScores, WithheldError, what_happened
from entropy_pl.records import Json
from entropy_pl.registry import did_you_mean
from entropy_pl.reporting import AttributedTokens
from entropy_pl.reporting.attributing import attribution_record, noted
from entropy_pl.rollout import Rollout
from entropy_pl.updates.record import UpdateRecorder
from entropy_pl.updates.vector import UpdateVector


@dataclass(frozen=True)
class Causes:
    """Which causes of a step's entropy change are looked for.

    Args:
        attribution: attribute it to the step's components and to every token of the U-batch, where the run supplies it.
        influence_matrix: measure the influence of each U-completion on each E-completion, with error bars.
        token_error_blocks: blocks of E that give every token an error bar; 0 gives none.
        counterfactuals: losses whose step is measured beside the one taken.

    Raises:
        ValueError: for an unknown loss, or a single block.
    """

    attribution: bool = True
    influence_matrix: bool = False
    token_error_blocks: int = 0
    counterfactuals: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.token_error_blocks < 0 or self.token_error_blocks == 1:
            raise ValueError(f"expected token_error_blocks of at least 2, or 0 for none, got {self.token_error_blocks}")
        if not self.attribution and (self.influence_matrix or self.token_error_blocks):
            raise ValueError("expected attribution: true with influence_matrix or token_error_blocks, got false")
        names = counterfactual_names()
        for name in self.counterfactuals:
            if name not in names:
                raise ValueError(
                    f"expected counterfactuals out of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
                )

    @property
    def needs_batch(self) -> bool:
        """Whether the U-batch is asked for."""
        return self.attribution or bool(self.counterfactuals)


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


@dataclass(frozen=True, eq=False)
class CausesOfStep:
    """The search at one step. What cannot be found, or goes wrong, costs nothing else: ``absent`` says why.

    Args:
        model: the policy.
        tokenizer: of the policy.
        probe: that measures the step.
        causes: what is looked for.
        sources: what the run says of itself.
        peers: the run's processes; all of them call every method.
        seed: of the run's probing.
        step: the optimizer step.
        absent: what was asked for and is not there, and why.
        warnings: what a reader must know of it, sentences.
    """

    model: nn.Module
    tokenizer: Any
    probe: EntropyProbe
    causes: Causes
    sources: RunSources
    peers: Peers
    seed: int
    step: int
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def update_batch(self) -> UpdateBatch | None:
        """The U-batch, if every process has its part; to be called while the step is under way."""
        if not self.causes.needs_batch:
            return None
        batch, why = None, "the run does not supply its U-batch: give its module a method update_batch()"
        if self.sources.update_batch is not None:
            try:
                batch = self.sources.update_batch()
                why = "the run did not supply the U-batch of this step"
            except Exception as error:
                why = f"the run could not supply its U-batch. {what_happened(error)}"
        if not all(self.peers.exchange(batch is not None)):
            self.absent["attribution"] = why if batch is None else "another process did not supply its U-batch"
            return None
        return batch

    def rewards(self, prompts: list[str], rollout: Rollout) -> Tensor | None:
        """Of this process's completions, ``[n]``, if every process knows theirs.

        Args:
            prompts: of every completion.
            rollout: this process's share of E.
        """
        rewards, why = None, "the run does not say what a completion of E is worth: give reward="
        if self.sources.rewards is not None:
            try:
                asked = [prompts, decode_completions(self.tokenizer, rollout)]
                if self.sources.rewards_take_ids:
                    rows = zip(rollout.completion_ids.cpu(), rollout.completion_mask.cpu(), strict=True)
                    asked.append([ids[mask].tolist() for ids, mask in rows])
                with isolated_rng(derived_seed(self.seed, f"rewards of step {self.step}")):
                    found = self.sources.rewards(*asked) if prompts else []
                rewards = None if found is None else checked_rewards(found, len(rollout))
            except Exception as error:
                why = f"the run could not reward E's completions. {what_happened(error)}"
        if not all(self.peers.exchange(rewards is not None)):
            self.absent["reward"] = why if rewards is None else "another process could not reward its completions"
            return None
        return rewards

    def counterfactuals(
        self, batch: UpdateBatch | None, recorder: UpdateRecorder
    ) -> Iterator[tuple[str, UpdateVector]]:
        """Updates of the other losses, made when they are asked for."""
        names = self.causes.counterfactuals
        if names and (batch is None or self.peers.size > 1):
            why = "there is no U-batch to make them of" if batch is None else "they need a run of one process"
            self.absent["counterfactuals"] = why
            return
        dtype = getattr(torch, self.probe.precision)
        for name in names:
            assert batch is not None
            seed = derived_seed(self.seed, f"counterfactual {name} of step {self.step}")
            try:
                with isolated_rng(seed), self.probe.evaluation(self.model):
                    update = counterfactual_update(self.model, batch, name, recorder.step_with, dtype=dtype)
            except Exception as error:
                self.absent[f"counterfactuals/{name}"] = what_happened(error)
            else:
                yield name, update

    def attribute(
        self,
        rollout: Rollout,
        update: UpdateVector,
        batch: UpdateBatch | None,
        scores: ProbeScores,
        first_order: EntropyChange,
        on_pass: Callable[[str], None],
    ) -> tuple[Json, AttributedTokens | None]:
        """Who moved the entropy, as a record's keys and token by token.

        Args:
            rollout: this process's share of E.
            update: v.
            batch: this process's part of U.
            scores: of the whole E.
            first_order: the probe's δH₁ of them, per unit η.
            on_pass: called after every pass.
        """
        if batch is None or not self.causes.attribution:
            return {}, None
        try:
            with self.peers.together():
                attribution = self.probe.attribute(
                    self.model, rollout, update, batch, scores, peers=self.peers, on_pass=on_pass
                )
                whole = batch.gathered(self.peers)
                self.peers.exchange(None)
            matrix, stderr = self._priced_apart(rollout, update, batch, scores, attribution)
            found, tokens = attribution_record(
                attribution,
                whole,
                self.tokenizer,
                step=self.step,
                lr=update.lr,
                unit=self.probe.normalize,
                first_order=first_order,
                matrix=matrix,
                stderr=stderr,
            )
            if whole.advantages is None:
                self.absent["predictors"] = "the U-batch has no advantages"
        except WithheldError as reason:
            self.absent["attribution"] = str(reason)
            self.warnings.append(str(reason))
            return {}, None
        except Exception as error:
            self.absent["attribution"] = what_happened(error)
            return {}, None
        return found, tokens

    def _priced_apart(
        self,
        rollout: Rollout,
        update: UpdateVector,
        batch: UpdateBatch,
        scores: ProbeScores,
        attribution: Attribution,
    ) -> tuple[InfluenceMatrix | None, Tensor | None]:
        """The E×U matrix and the tokens' error bars, where they were asked for."""
        asked = {
            "influence_matrix": self.causes.influence_matrix,
            "token_error_blocks": self.causes.token_error_blocks > 0,
        }
        if self.peers.size > 1:
            self.absent.update({name: "it needs a run of one process" for name, wanted in asked.items() if wanted})
            return None, None
        matrix = stderr = None
        if asked["influence_matrix"]:
            with noted(self.absent, "influence_matrix"):
                matrix = self.probe.influence_matrix(self.model, rollout, update, batch, scores)
        if asked["token_error_blocks"]:
            with noted(self.absent, "token_error_blocks"):
                blocks = self.causes.token_error_blocks
                stderr = self.probe.token_standard_errors(
                    self.model, rollout, update, batch, scores, blocks=blocks, update_base=attribution.stats
                )
        return matrix, stderr
