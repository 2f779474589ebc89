"""The engine itself: which passes a probe takes over its E-batch, and which estimates it makes of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.attribution import (
    Attribution,
    InfluenceMatrix,
    UpdateBatch,
    attribute_update,
    influence_matrix,
    token_standard_errors,
)
from entropy_pl.estimators.reward import checked_rewards
from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.causal import refuse_merged, refuse_not_causal
from entropy_pl.policy.logits import NonFiniteError, compiled_statistics
from entropy_pl.policy.micro_batches import default_batch_tokens
from entropy_pl.policy.precision import evaluation, float64_evaluation, refuse_quantized
from entropy_pl.policy.score import head_inputs, token_stats
from entropy_pl.policy.tangents import Tangents, central_difference, resolve_method, tangents
from entropy_pl.probe.memory import what_happened
from entropy_pl.probe.reduction import baseline_of, reduce_scores
from entropy_pl.probe.result import ProbeResult
from entropy_pl.probe.scores import CounterfactualScores, HalvedStep, ProbeScores
from entropy_pl.probe.settings import ProbeSettings
from entropy_pl.probe.smoothness import CHECKED_SEQUENCES, WithheldError, checked_attribution, judge_derivatives
from entropy_pl.probe.timing import timed
from entropy_pl.rollout import Rollout, TokenStats, prompt_clusters
from entropy_pl.updates.vector import UpdateVector


@dataclass(frozen=True)
class EntropyProbe(ProbeSettings):
    """Measures ΔH(η) and its first and second order on one E-batch; its options are :class:`ProbeSettings`'.

    Raises:
        ValueError: for an option out of range.

    Example:
        probe = EntropyProbe(eta_multipliers=(0.5, 1, 2))
        result = probe.measure(model, rollout, recorder.update)   # model at θ, rollout drawn from it
        print(result.taken.true, result.taken.first_order)
    """

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[None]:
        """The precision a probe works in; draw the E-batch inside it, so that sampler and scorer agree."""
        precision = float64_evaluation(model) if self.precision == "float64" else evaluation(model)
        with precision, compiled_statistics(self.compile_statistics):
            yield

    def check(self, model: nn.Module) -> None:
        """Refuse a policy of which this probe could not be taken, before anything is drawn.

        Raises:
            ValueError: for a model that is no causal language model, an adapter that is merged, and for forward mode or
                float64 with quantized layers.
        """
        refuse_not_causal(model)
        refuse_merged(model)
        resolve_method(model, self.method)
        if self.precision == "float64":
            refuse_quantized(model, "float64", "load it unquantized, or probe in float32")

    def passes(self, lr: float) -> int:
        """Passes over E that :meth:`measure` takes: one for θ or forward mode, two for differences, one per η."""
        return 3 + len(self.sweep_etas(lr)) + self.needs_features

    def measure(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        *,
        update_batch: UpdateBatch | None = None,
        rewards: Tensor | None = None,
        counterfactuals: Iterable[tuple[str, UpdateVector]] = (),
        clusters: Tensor | None = None,
        peers: Peers = ALONE,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> ProbeResult:
        """Measure the entropy at θ and its change along the update.

        Args:
            model: the policy at θ, the parameters the E-batch was drawn from.
            rollout: the E-batch, ``[N, T]``, drawn with top_p = 1 and no top-k; log-probs and entropies are taken at
                its temperature.
            update: v.
            update_batch: the U-batch behind v; with it the change is attributed to the step's parts and tokens.
            rewards: of the E-batch's completions, ``[N]``; with them the expected reward's change is measured too.
            counterfactuals: names and other updates from the same θ, each measured at η = lr by one more pass. Made one
                by one, if they come from a generator.
            clusters: prompt of each sequence, ``[N]``; None groups equal prompts by themselves.
            peers: the run's processes, each with a share of the E-batch as its ``rollout`` (rows of ``clusters`` and of
                ``rewards``, and the U-batch, likewise): all of them call this, and all get the result of the whole
                batch. A share may be empty.
            on_pass: called with a phase's name after every pass, for progress bars.

        Raises:
            ValueError: for an E-batch no estimate can be made of, an update that is not finite, or one without
                components where it is to be attributed.
            NonFiniteError: if the policy's logits are not finite, at θ or at a θ+ηv of the sweep.
            PeerError: if another process failed.
        """
        scores = self.collect(
            model,
            rollout,
            update,
            rewards=rewards,
            counterfactuals=counterfactuals,
            clusters=clusters,
            peers=peers,
            on_pass=on_pass,
        )
        result = self.reduce(scores, update)
        if update_batch is None:
            return result
        with timed(result.seconds, "attribution", model):
            try:
                attribution = self.attribute(model, rollout, update, update_batch, scores, peers=peers, on_pass=on_pass)
            except WithheldError as reason:
                return result.warned(str(reason))
        return replace(result, attribution=attribution)

    def collect(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        *,
        rewards: Tensor | None = None,
        counterfactuals: Iterable[tuple[str, UpdateVector]] = (),
        clusters: Tensor | None = None,
        peers: Peers = ALONE,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> ProbeScores:
        """The model passes of :meth:`measure` over E, with its arguments and errors."""
        with peers.together():
            update.checked_norm()
            rollout = self.drawn(rollout)
            if rewards is not None:
                rewards = checked_rewards(rewards, len(rollout))
            settled = self._settled(model, rollout)
            scores = settled._score(model, rollout, update, peers, on_pass)
            others, failed = settled._score_counterfactuals(
                model, rollout, update, counterfactuals, scores.seconds, on_pass
            )
            scores = replace(scores, clusters=clusters, rewards=rewards, counterfactuals=others, failed=failed)
            if peers.size > 1:
                scores, rollout = scores.to("cpu"), rollout.to("cpu")
            shares = peers.exchange((scores, rollout))
        scores = ProbeScores.concatenate([share for share, _ in shares])
        if clusters is None:
            clusters = prompt_clusters(Rollout.concatenate([share for _, share in shares]))
            scores = replace(scores, clusters=clusters)
        return scores

    def attribute(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        update_batch: UpdateBatch,
        scores: ProbeScores,
        *,
        peers: Peers = ALONE,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> Attribution:
        """The attribution of :meth:`measure`, from its arguments and the scores at hand.

        Raises:
            WithheldError: if the policy is not smooth along v, or autograd does not give the slope of its forward pass.
            ValueError: for an update without components.
            PeerError: if another process failed.
        """
        judged = judge_derivatives(self, scores)
        if (reason := judged.withheld or judged.autograd) is not None:
            raise WithheldError(reason)
        with self.evaluation(model):
            attribution = attribute_update(
                model,
                rollout,
                update_batch.rollout,
                update,
                entropy_coefficients=update_batch.entropy_coefficients,
                advantages=update_batch.advantages,
                divided_by=update_batch.divided_by,
                tangent=scores.tangent,
                confidence=self.confidence,
                method=self.method,
                peers=peers,
                on_pass=on_pass,
                **self._attributing(update_batch, scores),
            )
        return checked_attribution(self, scores, baseline_of(self, scores), attribution)

    def influence_matrix(
        self, model: nn.Module, rollout: Rollout, update: UpdateVector, update_batch: UpdateBatch, scores: ProbeScores
    ) -> InfluenceMatrix:
        """The influence of each completion of U on each of E, from the arguments of :meth:`attribute`; one process.

        A forward and a backward pass of every sequence by itself.

        Raises:
            ValueError: for an update without preconditioner, or a gradient that does not fit into a block.
        """
        with self.evaluation(model):
            return influence_matrix(
                model, rollout, update_batch.rollout, update, **self._attributing(update_batch, scores)
            )

    def token_standard_errors(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        update_batch: UpdateBatch,
        scores: ProbeScores,
        *,
        blocks: int = 8,
        update_base: TokenStats | None = None,
    ) -> Tensor:
        """Error bars over E of every token's attributed change, ``[N_U, T_U]``, per unit η; one process.

        Args:
            model: with ``rollout``, ``update``, ``update_batch`` and ``scores`` the arguments of :meth:`attribute`.
            rollout: the E-batch.
            update: v.
            update_batch: the U-batch.
            scores: of the E-batch.
            blocks: of E, that are attributed apart.
            update_base: statistics of U at θ, if they are at hand.

        Raises:
            ValueError: for an update without preconditioner, or fewer than two blocks.
        """
        with self.evaluation(model):
            return token_standard_errors(
                model,
                rollout,
                update_batch.rollout,
                update,
                blocks=blocks,
                update_base=update_base,
                method=self.method,
                **self._attributing(update_batch, scores),
            )

    def _attributing(self, update_batch: UpdateBatch, scores: ProbeScores) -> dict[str, Any]:
        """What every kind of attribution is told of loss, estimate and scoring."""
        if update_batch.gradient_scale is None:
            raise ValueError(
                "expected a U-batch with the factor that clipping put on its gradient, got gradient_scale=None, which "
                "can be found out under automatic optimization in Lightning alone: give it, or 1.0 without clipping"
            )
        return {
            "token_coefficients": update_batch.token_coefficients,
            "gradient_scale": update_batch.gradient_scale,
            "base": scores.base,
            "baseline": baseline_of(self, scores),
            "clusters": scores.clusters,
            **self.estimate,
            **self.scoring,
            "temperature": self.temperature,
        }

    def _settled(self, model: nn.Module, rollout: Rollout) -> EntropyProbe:
        """This probe with one token budget for all its passes: what they round alike cancels between them."""
        if self.max_batch_tokens is not None:
            return self
        with self.evaluation(model):
            return replace(self, max_batch_tokens=default_batch_tokens(model, rollout))

    def _score(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        peers: Peers,
        on_pass: Callable[[str], None],
    ) -> ProbeScores:
        """The passes over this process's share."""
        seconds: dict[str, float] = {}
        features = None
        shifted = {}
        with self.evaluation(model):
            with timed(seconds, "tangents", model):
                tangent, differences = self._tangents(model, rollout, update, peers, on_pass)
            with timed(seconds, "check", model):
                halved = self._halved(model, rollout, update, tangent.step, peers)
            if self.needs_features:
                with timed(seconds, "features", model):
                    features = head_inputs(model, rollout, max_batch_tokens=self.max_batch_tokens)
                on_pass("features")
            with timed(seconds, "sweep", model):
                for eta in self.sweep_etas(update.lr):
                    try:
                        shifted[eta] = token_stats(model, rollout, update=update, eta=eta, **self.scoring)
                    except NonFiniteError as error:
                        raise NonFiniteError(f"{error} (this was at η = {eta:.3g})") from error
                    on_pass("sweep")
        assert tangent.second is not None
        return ProbeScores(
            tangent.base,
            tangent.first,
            tangent.second,
            shifted,
            None,
            features,
            tangent.method,
            tangent.step,
            seconds,
            differences=differences,
            halved=halved,
            temperature=rollout.temperature,
        )

    def _score_counterfactuals(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        counterfactuals: Iterable[tuple[str, UpdateVector]],
        seconds: dict[str, float],
        on_pass: Callable[[str], None],
    ) -> tuple[dict[str, CounterfactualScores], dict[str, str]]:
        """E after other steps; one of them that fails must not cost what was measured of the step taken."""
        found: dict[str, CounterfactualScores] = {}
        failed: dict[str, str] = {}
        with timed(seconds, "counterfactuals", model):
            for name, other in counterfactuals:
                try:
                    with self.evaluation(model):
                        stats = token_stats(model, rollout, update=other, eta=update.lr, **self.scoring)
                except Exception as error:
                    failed[name] = what_happened(error)
                    warnings.warn(f"counterfactual {name!r} could not be measured. {failed[name]}", stacklevel=2)
                    continue
                norm = other.norm()
                cosine = other.dot(update) / (norm * update.norm()) if norm and update.norm() else None
                found[name] = CounterfactualScores(stats, norm, cosine)
                on_pass("counterfactuals")
        if not found:
            del seconds["counterfactuals"]
        return found, failed

    def reduce(self, scores: ProbeScores, update: UpdateVector) -> ProbeResult:
        """The estimates of :meth:`measure`, from scores at hand; no model is needed.

        Args:
            scores: of the whole E-batch, or of some of its sequences.
            update: v, for its norms and its learning rate.

        Raises:
            ValueError: for scores no estimate can be made of, or a critic without features.
        """
        return reduce_scores(self, scores, update)

    def _tangents(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        peers: Peers,
        on_pass: Callable[[str], None],
    ) -> tuple[Tangents, TokenStats | None]:
        """First and second derivatives: forward mode has no cheap second order, so differences supply it.

        Beside those of forward mode also the first ones by differences, which cost nothing more.
        """
        options = {**self.scoring, "peers": peers, "on_pass": on_pass}
        tangent = tangents(model, rollout, update, method=self.method, **options)
        if tangent.second is not None:
            return tangent, None
        differences = tangents(model, rollout, update, method="central_difference", base=tangent.base, **options)
        return replace(tangent, second=differences.second, step=differences.step), differences.first

    def _halved(
        self, model: nn.Module, rollout: Rollout, update: UpdateVector, step: float | None, peers: Peers
    ) -> HalvedStep | None:
        """Differences at half the step, of as many sequences as it takes to see whether they are the same."""
        share = min(len(rollout), -(-CHECKED_SEQUENCES // peers.size))
        if not step or not share:
            return None
        rows = torch.arange(len(rollout)) < share
        part = rollout.select(rows.to(rollout.prompt_ids.device))
        first = central_difference(model, part, update, step / 2, **self.scoring)
        return HalvedStep(rows.to(first.mask.device), first)
