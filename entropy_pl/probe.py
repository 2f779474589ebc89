"""The one engine: a policy, an E-rollout drawn from it, and an update, turned into a :class:`ProbeResult`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from entropy_pl.estimators import (
    EntropyChange,
    entropy_estimate,
    first_order_delta_entropy,
    second_order_delta_entropy,
    snis_delta_entropy,
)
from entropy_pl.estimators.estimate import standard_error
from entropy_pl.estimators.snis import Integrand, Measure, Normalize, Weighting
from entropy_pl.policy.precision import evaluation, float64_evaluation
from entropy_pl.policy.score import token_stats
from entropy_pl.policy.tangents import Method, Tangents, tangents
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.vector import UpdateVector

Precision = Literal["float32", "float64"]
RECORDED_SETTINGS = (
    "normalize",
    "weighting",
    "integrand",
    "clip_log_weight",
    "confidence",
    "temperature",
    "precision",
)


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One step size of the sweep.

    Args:
        eta: η; ΔH(η) is the entropy at θ+ηv minus the entropy at θ.
        taken: whether this is the step the optimizer really took (η = lr).
        true: ΔH(η) by self-normalized importance sampling, nats.
        first_order: δH₁(η), nats, from the same E-batch.
    """

    eta: float
    taken: bool
    true: EntropyChange
    first_order: EntropyChange

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, influences left out."""
        return {
            "eta": self.eta,
            "taken": self.taken,
            "true": self.true.to_dict(),
            "first_order": self.first_order.to_dict(),
        }


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What one probe found.

    Args:
        entropy: H(π_θ), nats per token or per sequence.
        first_order: ⟨∇H, v⟩, per unit η.
        second_order: v'∇²H v, per unit η².
        eta_star: 2|⟨∇H, v⟩|/|v'∇²H v|, the η at which first and second order are equal in size; None when there is
            no curvature at all.
        eta_star_stderr: its standard error, by the delta method on the influences of both.
        sweep: one :class:`SweepPoint` per η, in ascending order.
        lr: η of the step really taken.
        update_norm: ‖v‖.
        update_components: norm of each component of v, where the optimizer could be taken apart.
        update_gap: what the components leave unexplained, relative to ‖v‖.
        method: how the first derivatives were made.
        difference_step: h of the central difference behind the derivatives, in η.
        seconds: wall time per phase.
        settings: the estimator's options, as given.
    """

    entropy: EntropyChange
    first_order: EntropyChange
    second_order: EntropyChange
    eta_star: float | None
    eta_star_stderr: float | None
    sweep: list[SweepPoint]
    lr: float
    update_norm: float
    update_components: dict[str, float] | None
    update_gap: float | None
    method: str
    difference_step: float | None
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def taken(self) -> SweepPoint:
        """The point of the sweep at the step really taken.

        Raises:
            LookupError: if the update had no learning rate to call a step.
        """
        for point in self.sweep:
            if point.taken:
                return point
        raise LookupError("the sweep holds no step really taken: the update's learning rate is zero")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: what a record holds of a probe."""
        return {
            "lr": self.lr,
            "entropy": self.entropy.to_dict(),
            "first_order": self.first_order.to_dict(),
            "second_order": self.second_order.to_dict(),
            "eta_star": self.eta_star,
            "eta_star_stderr": self.eta_star_stderr,
            "sweep": [point.to_dict() for point in self.sweep],
            "update_norm": self.update_norm,
            "update_components": self.update_components,
            "update_gap": self.update_gap,
            "method": self.method,
            "difference_step": self.difference_step,
            "seconds": self.seconds,
            **self.settings,
        }


@dataclass(frozen=True)
class EntropyProbe:
    """Measures ΔH(η) and its first and second order on one E-batch.

    Args:
        etas: absolute step sizes to measure at, besides the multiples below.
        eta_multipliers: step sizes as multiples of the update's lr. The step really taken is always among them.
        normalize: ``per_token`` or ``per_sequence``.
        weighting: ``prefix`` (less variance) or ``sequence`` (classical SNIS).
        integrand: ``rao_blackwell`` or ``surprisal``.
        clip_log_weight: bound on the absolute log weight; None leaves the estimate unbiased to O(1/N).
        confidence: of every interval.
        temperature: of the sampling distribution E was drawn from.
        method: how tangents are made: ``auto``, ``forward_mode`` or ``central_difference``.
        precision: ``float32``, or ``float64`` for the whole forward pass.
        max_batch_tokens: padded tokens per micro-batch; None bounds the logits' memory.

    Raises:
        ValueError: for an option out of range.

    Example:
        probe = EntropyProbe(eta_multipliers=(0.5, 1, 2))
        result = probe.measure(model, rollout, recorder.update)   # model at θ, rollout drawn from it
        print(result.taken.true, result.taken.first_order)
    """

    etas: Sequence[float] = ()
    eta_multipliers: Sequence[float] = (0.5, 1.0, 2.0)
    normalize: Normalize = "per_token"
    weighting: Weighting = "prefix"
    integrand: Integrand = "rao_blackwell"
    clip_log_weight: float | None = None
    confidence: float = 0.95
    temperature: float = 1.0
    method: Method = "auto"
    precision: Precision = "float32"
    max_batch_tokens: int | None = None

    def __post_init__(self) -> None:
        Measure(self.normalize, self.weighting, self.integrand, self.clip_log_weight)
        for name in ("etas", "eta_multipliers"):
            for eta in getattr(self, name):
                if not math.isfinite(eta) or eta == 0:
                    raise ValueError(f"expected every number in {name} finite and not 0, got {eta}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature > 0, got {self.temperature}")
        if self.precision not in ("float32", "float64"):
            raise ValueError(f"expected precision 'float32' or 'float64', got {self.precision!r}")

    def sweep_etas(self, lr: float) -> list[float]:
        """The step sizes of a sweep at this learning rate, ascending, lr itself included."""
        taken = [lr] if lr else []
        return sorted({*map(float, self.etas), *(lr * m for m in self.eta_multipliers if lr), *taken})

    def evaluation(self, model: nn.Module) -> AbstractContextManager[None]:
        """The precision a probe works in; draw the E-batch inside it, so that sampler and scorer agree."""
        return float64_evaluation(model) if self.precision == "float64" else evaluation(model)

    def passes(self, lr: float) -> int:
        """Passes over E that :meth:`measure` takes: one for θ or forward mode, two for differences, one per η."""
        return 3 + len(self.sweep_etas(lr))

    def measure(
        self,
        model: nn.Module,
        rollout: Rollout,
        update: UpdateVector,
        *,
        clusters: Tensor | None = None,
        on_pass: Callable[[str], None] = lambda phase: None,
    ) -> ProbeResult:
        """Measure the entropy at θ and its change along the update.

        Args:
            model: the policy at θ, the parameters the E-batch was drawn from.
            rollout: the E-batch, ``[N, T]``, drawn at this probe's temperature with top_p = 1 and no top-k.
            update: v.
            clusters: prompt of each sequence, ``[N]``; None groups equal prompts by themselves.
            on_pass: called with a phase's name after every pass over E, for progress bars.

        Raises:
            ValueError: for an E-batch no estimate can be made of.
            NonFiniteError: if the policy's logits are not finite, at θ or at a θ+ηv of the sweep.
        """
        if clusters is None:
            clusters = prompt_clusters(rollout)
        seconds: dict[str, float] = {}
        with self.evaluation(model):
            with timed(seconds, "tangents", model):
                tangent, curvature = self._tangents(model, rollout, update, on_pass)
            shared: dict[str, Any] = {
                "normalize": self.normalize,
                "integrand": self.integrand,
                "clusters": clusters,
                "confidence": self.confidence,
            }
            options = {**shared, "weighting": self.weighting}
            first = first_order_delta_entropy(tangent.base, tangent.first, **options)
            second = second_order_delta_entropy(tangent.base, tangent.first, curvature, **options)
            sweep = []
            with timed(seconds, "sweep", model):
                for eta in self.sweep_etas(update.lr):
                    shifted = self._stats(model, rollout, update, eta)
                    on_pass("sweep")
                    true = snis_delta_entropy(tangent.base, shifted, clip_log_weight=self.clip_log_weight, **options)
                    sweep.append(SweepPoint(eta, eta == update.lr, true, first.scaled(eta)))
        eta_star, eta_star_stderr = _eta_star(first, second, clusters)
        return ProbeResult(
            entropy=entropy_estimate(tangent.base, **shared),
            first_order=first,
            second_order=second,
            eta_star=eta_star,
            eta_star_stderr=eta_star_stderr,
            sweep=sweep,
            lr=update.lr,
            update_norm=update.norm(),
            update_components=None
            if update.components is None
            else {name: UpdateVector(part, update.lr).norm() for name, part in update.components.items()},
            update_gap=update.gap(),
            method=tangent.method,
            difference_step=tangent.step,
            seconds=seconds,
            settings={name: getattr(self, name) for name in RECORDED_SETTINGS},
        )

    def _stats(self, model: nn.Module, rollout: Rollout, update: UpdateVector, eta: float) -> TokenStats:
        return token_stats(
            model,
            rollout,
            update=update,
            eta=eta,
            temperature=self.temperature,
            max_batch_tokens=self.max_batch_tokens,
        )

    def _tangents(
        self, model: nn.Module, rollout: Rollout, update: UpdateVector, on_pass: Callable[[str], None]
    ) -> tuple[Tangents, TokenStats]:
        """First and second derivatives: forward mode has no cheap second order, so differences supply it."""

        def made_by(method: Method, base: TokenStats | None) -> Tangents:
            return tangents(
                model,
                rollout,
                update,
                temperature=self.temperature,
                method=method,
                base=base,
                max_batch_tokens=self.max_batch_tokens,
                on_pass=on_pass,
            )

        tangent = made_by(self.method, None)
        if tangent.second is None:
            differences = made_by("central_difference", tangent.base)
            tangent = replace(tangent, second=differences.second, step=differences.step)
        assert tangent.second is not None
        return tangent, tangent.second


def prompt_clusters(rollout: Rollout) -> Tensor | None:
    """Which sequences share a prompt, ``[N]``; None where none do."""
    ids = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1)
    _, clusters = ids.unique(dim=0, return_inverse=True)
    return clusters if int(clusters.max()) + 1 < len(rollout) else None


def _eta_star(
    first: EntropyChange, second: EntropyChange, clusters: Tensor | None
) -> tuple[float | None, float | None]:
    """η* = 2|a|/|b| and its standard error, from the influences of a and b (delta method)."""
    if not first.value or not second.value:
        return (0.0 if second.value else None), None
    eta_star = 2 * abs(first.value) / abs(second.value)
    influence = eta_star * (first.influence / first.value - second.influence / second.value)
    return eta_star, standard_error(influence, clusters)[0]


@contextmanager
def timed(seconds: dict[str, float], phase: str, model: nn.Module) -> Iterator[None]:
    """Bill the block's wall time to a phase, the work queued on the model's GPU included."""

    def now() -> float:
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()  # kernels are queued: without this the next phase would be billed
        return time.perf_counter()

    start = now()
    yield
    seconds[phase] = now() - start
