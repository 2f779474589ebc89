"""The measurement of one step, from the E-batch to the attribution: the same in a run and of a checkpoint.

Callers differ in where the parameters before the step, the rewards and the U-batch come from. What is measured of
them, in which order, and what happens when a part of it fails, is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from entropy_pl.attribution import Attribution, InfluenceMatrix, UpdateBatch
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.generated import GeneratedLogProbs
from entropy_pl.probe.engine import EntropyProbe
from entropy_pl.probe.memory import what_happened
from entropy_pl.probe.result import ProbeResult
from entropy_pl.probe.sampler_gate import SamplerGate
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.probe.settings import AttributionSettings
from entropy_pl.probe.smoothness import WithheldError
from entropy_pl.probe.timing import timed
from entropy_pl.rollout import Rollout
from entropy_pl.updates.vector import UpdateVector


@dataclass(frozen=True, eq=False)
class AttributedStep:
    """Which tokens and components moved the entropy.

    Args:
        attribution: per unit η.
        batch: the U-batch of all processes.
        matrix: the influence of each completion of U on each of E, per unit η; None where it was not asked for.
        token_stderr: standard error of every token's change over E, ``[N_U, T_U]``, per unit η; None likewise.
    """

    attribution: Attribution
    batch: UpdateBatch
    matrix: InfluenceMatrix | None
    token_stderr: Tensor | None


@dataclass(frozen=True, eq=False)
class MeasuredStep:
    """What was found of one step.

    Args:
        result: the estimates.
        scores: of the whole E-batch, of which they were made.
        attributed: None where no attribution was asked for, or ``absent`` says why there is none.
    """

    result: ProbeResult
    scores: ProbeScores
    attributed: AttributedStep | None


@dataclass(eq=False)
class StepMeasurement:
    """Measures one step. What was asked for and fails costs nothing else: ``absent`` says why it is not there.

    Args:
        model: the policy at the parameters before the step.
        probe: what is measured of the step.
        settings: what its attribution consists of.
        peers: the run's processes, which all call every method.
        absent: what was asked for and is not there, and why.
        warnings: what a reader must know of it, sentences.
        seconds: wall time per phase.
    """

    model: nn.Module
    probe: EntropyProbe
    settings: AttributionSettings
    peers: Peers = ALONE
    absent: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def draw(self, gate: SamplerGate, sample: Callable[[GeneratedLogProbs], Rollout]) -> Rollout:
        """Draw the E-batch, and compare the sampler's log-probs with the scorer's.

        Args:
            gate: of the run: it has seen the E-batches before this one.
            sample: draws this process's share, and fills what it is given with a few sequences' log-probs.

        Raises:
            SamplerMismatchError: if sampler and scorer are two policies, in any process.
            NonFiniteError: if a logit is NaN or +inf.
        """
        gate.refuse_again()
        generated = GeneratedLogProbs()
        with self.probe.evaluation(self.model):
            rollout = sample(generated)
            budget = self.probe.max_batch_tokens
            gap = gate.check(self.model, rollout, generated, max_batch_tokens=budget, peers=self.peers)
        if gap is None:
            self.absent["sampler_gap"] = "what drew E does not say with which log-probs"
        return rollout

    def measure(
        self,
        rollout: Rollout,
        update: UpdateVector,
        *,
        rewards: Tensor | None = None,
        update_batch: UpdateBatch | None = None,
        counterfactual: Callable[[str], UpdateVector] | None = None,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> MeasuredStep:
        """Score the E-batch, make the estimates and attribute the change.

        Args:
            rollout: this process's share of the E-batch, ``[n, T]``.
            update: v.
            rewards: of its completions, ``[n]``; None: no expected reward is measured.
            update_batch: this process's part of the U-batch; None: nothing is attributed.
            counterfactual: from a loss's name to the update that it would have made; None where there are none.
            on_pass: called with a phase's name after every pass.

        Raises:
            ValueError: as :meth:`.EntropyProbe.measure`; so are ``NonFiniteError`` and ``PeerError``.
        """
        scores = self.probe.collect(
            self.model,
            rollout,
            update,
            rewards=rewards,
            counterfactuals=() if counterfactual is None else self._counterfactuals(counterfactual),
            peers=self.peers,
            on_pass=on_pass,
        )
        self.absent.update({f"counterfactuals/{name}": why for name, why in scores.failed.items()})
        result = self.probe.reduce(scores, update)
        attributed = None
        if update_batch is not None and self.settings.enabled:
            with timed(self.seconds, "attribution", self.model):
                attributed = self._attributed(rollout, update, update_batch, scores, on_pass)
        return MeasuredStep(result, scores, attributed)

    def _counterfactuals(self, make: Callable[[str], UpdateVector]) -> Iterator[tuple[str, UpdateVector]]:
        """Updates of other losses, each made when its pass over E is due."""
        for name in self.settings.counterfactuals:
            update = None
            with noted(self.absent, f"counterfactuals/{name}"):
                update = make(name)
            if update is not None:
                yield name, update

    def _attributed(
        self,
        rollout: Rollout,
        update: UpdateVector,
        batch: UpdateBatch,
        scores: ProbeScores,
        on_pass: Callable[[str], None],
    ) -> AttributedStep | None:
        try:
            with self.peers.together():
                attribution = self.probe.attribute(
                    self.model, rollout, update, batch, scores, peers=self.peers, on_pass=on_pass
                )
                whole = batch.gathered(self.peers)
                self.peers.exchange(None)
        except WithheldError as reason:
            self.absent["attribution"] = str(reason)
            self.warnings.append(str(reason))
            return None
        except Exception as error:
            self.absent["attribution"] = what_happened(error)
            return None

        asked = {"influence_matrix": self.settings.influence_matrix, "token_error_blocks": self.settings.with_errors}
        if self.peers.size > 1:
            self.absent.update({name: "it needs a run of one process" for name, wanted in asked.items() if wanted})
            return AttributedStep(attribution, whole, None, None)
        matrix = stderr = None
        if asked["influence_matrix"]:
            with noted(self.absent, "influence_matrix"):
                matrix = self.probe.influence_matrix(self.model, rollout, update, batch, scores)
            on_pass("influence matrix")
        if asked["token_error_blocks"]:
            blocks = self.settings.token_error_blocks
            with noted(self.absent, "token_error_blocks"):
                stderr = self.probe.token_standard_errors(
                    self.model, rollout, update, batch, scores, blocks=blocks, update_base=attribution.stats
                )
            on_pass("error bars of tokens")
        return AttributedStep(attribution, whole, matrix, stderr)


@contextmanager
def noted(absent: dict[str, str], what: str) -> Iterator[None]:
    """Keep an error inside from ending anything else: ``absent[what]`` says what happened."""
    try:
        yield
    except Exception as error:
        absent[what] = what_happened(error)
