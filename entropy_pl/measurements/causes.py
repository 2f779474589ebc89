"""The causes of the step's entropy change: its tokens, other losses, and the reward that it was paid for.

What cannot be found, or goes wrong, costs nothing else of a measurement: it is left out, and ``absent`` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from entropy_pl.attribution import counterfactual_update
from entropy_pl.estimators import EntropyChange
from entropy_pl.estimators.reward import checked_rewards
from entropy_pl.measurements.settings import MeasurementSettings, PrecisionSettings
from entropy_pl.measurements.update import MeasuredUpdate, gradient_precision, same_choice_of_tokens
from entropy_pl.objectives import RewardSum
from entropy_pl.policy import decode_completions
from entropy_pl.probe import ProbeScores, WithheldError
from entropy_pl.records import Json
from entropy_pl.reporting import AttributedTokens
from entropy_pl.reporting.attributing import attribution_record, noted
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateVector

OF_A_PAIR = "the difference of two checkpoints has no U-batch: measure one checkpoint with its optimizer's state"


@dataclass(frozen=True, eq=False)
class Causes:
    """The search of one measurement.

    Args:
        model: the policy.
        tokenizer: of the policy.
        settings: of the measurement.
        update: v, with the U-batch behind it.
        absent: what was asked for and is not there, and why.
        warnings: what a reader must know of it, sentences.
    """

    model: nn.Module
    tokenizer: Any
    settings: MeasurementSettings
    update: MeasuredUpdate
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def rewards(self, rollout: Rollout, answers: Sequence[str]) -> Tensor | None:
        """Of E's completions, ``[N]``, by the rewards that U has.

        Args:
            rollout: the E-batch.
            answers: the reference answer of every completion.
        """
        reward = RewardSum(self.settings.update.rewards, self.settings.update.reward_weights)
        try:
            return checked_rewards(reward(decode_completions(self.tokenizer, rollout), list(answers))[0], len(rollout))
        except Exception as error:  # a reward is anybody's function
            self.absent["reward"] = _said(error)
            return None

    def counterfactuals(self) -> Iterator[tuple[str, UpdateVector]]:
        """Updates of the other losses, made when they are asked for, as this step's own gradient was made."""
        names, batch, step_with = self.settings.attribution.counterfactuals, self.update.batch, self.update.step_with
        if batch is None or step_with is None:
            self.absent.update({"counterfactuals": OF_A_PAIR} if names else {})
            return
        assert batch.policy_gradient is not None
        precision = _without_float16(self.settings.precision)
        for name in names:
            try:
                with gradient_precision(self.model, precision), same_choice_of_tokens(self.settings):
                    dtype = batch.policy_gradient.dtype
                    update = counterfactual_update(self.model, batch, name, step_with, dtype=dtype)
            except Exception as error:
                self.absent[f"counterfactuals/{name}"] = _said(error)
            else:
                yield name, update

    def attribute(
        self, rollout: Rollout, scores: ProbeScores, first_order: EntropyChange, on_pass: Callable[[str], None]
    ) -> tuple[Json, AttributedTokens | None]:
        """Who moved the entropy, as keys of the results and token by token.

        Args:
            rollout: the E-batch.
            scores: of it.
            first_order: the probe's δH₁ of them, per unit η.
            on_pass: called with a phase's name after every pass.
        """
        asked, batch, vector = self.settings.attribution, self.update.batch, self.update.vector
        if not asked.enabled:
            return {}, None
        if batch is None:
            self.absent["attribution"] = OF_A_PAIR
            return {}, None
        probe = self.settings.probe()
        matrix = stderr = None
        try:
            attribution = probe.attribute(self.model, rollout, vector, batch, scores, on_pass=on_pass)
            if asked.influence_matrix:
                with noted(self.absent, "influence_matrix"):
                    matrix = probe.influence_matrix(self.model, rollout, vector, batch, scores)
                on_pass("influence matrix")
            if asked.token_error_blocks:
                blocks = asked.token_error_blocks
                with noted(self.absent, "token_error_blocks"):
                    stderr = probe.token_standard_errors(
                        self.model, rollout, vector, batch, scores, blocks=blocks, update_base=attribution.stats
                    )
                on_pass("error bars of tokens")
            return attribution_record(
                attribution,
                batch,
                self.tokenizer,
                step=self.update.facts["step"],
                lr=vector.lr,
                unit=probe.normalize,
                first_order=first_order,
                matrix=matrix,
                stderr=stderr,
            )
        except WithheldError as reason:
            self.absent["attribution"] = str(reason)
            self.warnings.append(str(reason))
            return {}, None
        except Exception as error:
            self.absent["attribution"] = _said(error)
            return {}, None


def _without_float16(precision: PrecisionSettings) -> PrecisionSettings:
    """Float32 in its place: without a scaled loss, which these gradients are not of, the small of them is lost."""
    chosen = precision.update_vector
    if not chosen.use_amp or chosen.amp_dtype != "float16":
        return precision
    return replace(precision, update_vector=replace(chosen, use_amp=False))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
