"""What a probe found, as numbers with error bars."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from entropy_pl.attribution import Attribution
from entropy_pl.estimators import EntropyChange, PowerLaw, Ratio


@dataclass(frozen=True, eq=False)
class SweepPoint:
    """One step size of the sweep.

    Args:
        eta: η; ΔH(η) is the entropy at θ+ηv minus the entropy at θ.
        taken: whether this is the step the optimizer really took (η = lr).
        true: ΔH(η) by self-normalized importance sampling, nats.
        first_order: δH₁(η), nats, from the same E-batch.
        reward_true: ΔJ(η), the change of the expected reward, by the same estimator; None without rewards.
        reward_first_order: δJ₁(η) likewise.
    """

    eta: float
    taken: bool
    true: EntropyChange
    first_order: EntropyChange
    reward_true: EntropyChange | None = None
    reward_first_order: EntropyChange | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, influences left out; no rewards, no keys for them."""
        return {"eta": self.eta, "taken": self.taken} | _estimates(
            true=self.true,
            first_order=self.first_order,
            reward_true=self.reward_true,
            reward_first_order=self.reward_first_order,
        )


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """What another step of the same size, from the same θ and on the same U-batch, would have done.

    Args:
        true: ΔH after it, nats.
        difference: of it and the step taken, from the same E-batch; None if that was not measured.
        reward_true: ΔJ after it; None without rewards.
        reward_difference: likewise.
        update_norm: ‖v′‖ of its update.
        cosine: of the angle between v′ and v; None where one is zero.
    """

    true: EntropyChange
    difference: EntropyChange | None
    reward_true: EntropyChange | None
    reward_difference: EntropyChange | None
    update_norm: float
    cosine: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, influences left out."""
        return {"update_norm": self.update_norm, "cosine": self.cosine} | _estimates(
            true=self.true,
            difference=self.difference,
            reward_true=self.reward_true,
            reward_difference=self.reward_difference,
        )


@dataclass(frozen=True, eq=False)
class SymmetricPoint:
    """A pair ±η, taken apart into odd and even orders.

    Args:
        eta: η > 0.
        first: [ΔH(η) − ΔH(−η)]/2η = ⟨∇H, v⟩ + O(η²), nats per unit η.
        second: [ΔH(η) + ΔH(−η)]/η² = v'∇²H v + O(η²), nats per unit η².
    """

    eta: float
    first: EntropyChange
    second: EntropyChange

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, influences left out."""
        return {"eta": self.eta, "first": self.first.to_dict(), "second": self.second.to_dict()}


@dataclass(frozen=True, eq=False)
class ProbeResult:
    """What one probe found.

    Args:
        entropy: H(π_θ), nats per token or per sequence.
        first_order: ⟨∇H, v⟩, per unit η.
        second_order: v'∇²H v, per unit η².
        eta_star: ``2|⟨∇H, v⟩|/|v'∇²H v|``, the η at which first and second order are equal in size; None when there is
            no curvature at all, NaN where the derivatives are withheld.
        eta_star_ci_low: lower end of its interval, by Fieller's set (:func:`entropy_pl.estimators.eta_star`).
        eta_star_ci_high: upper end; None where it is unbounded: the curvature is not told from zero.
        sweep: one :class:`SweepPoint` per η, in ascending order.
        symmetric: one :class:`SymmetricPoint` per pair ±η of the sweep.
        power_law: ``log |ΔH|`` against log η over the sweep's η > 0: slope 1 is first order. None where no line can be
            fitted.
        lr: η of the step really taken.
        update_norm: ‖v‖.
        update_components: norm of each component of v, where the optimizer could be taken apart.
        update_gap: what the components leave unexplained, relative to ‖v‖.
        update_split_absent: why there are no components, in words; None where there are.
        method: how the first derivatives were made.
        difference_step: h of the central difference behind the derivatives, in η.
        difference_error: how far the first order at h is from that at h/2, per unit η, over the sequences that were
            checked: an estimate of what taking differences adds to its error. 0 of forward mode.
        roughness: sd(ψ(h) − ψ(h/2))/sd(ψ(h)) of its influences; above 0.1 the policy is not smooth along v.
        expected_reward: J(π_θ), the mean reward of E; None without rewards.
        exchange_rate: ΔH/ΔJ of the step really taken, nats per unit of reward; None without rewards.
        attribution: who moved the entropy; None where no U-batch was given.
        counterfactuals: name → what another step would have done.
        seconds: wall time per phase.
        settings: the estimator's options, as given.
        warnings: what a reader must know before believing the numbers, a sentence each.
    """

    entropy: EntropyChange
    first_order: EntropyChange
    second_order: EntropyChange
    eta_star: float | None
    eta_star_ci_low: float | None
    eta_star_ci_high: float | None
    sweep: list[SweepPoint]
    symmetric: list[SymmetricPoint]
    power_law: PowerLaw | None
    lr: float
    update_norm: float
    update_components: dict[str, float] | None
    update_gap: float | None
    update_split_absent: str | None
    method: str
    difference_step: float | None
    difference_error: float | None = None
    roughness: float | None = None
    expected_reward: EntropyChange | None = None
    exchange_rate: Ratio | None = None
    attribution: Attribution | None = None
    counterfactuals: dict[str, Counterfactual] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

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

    @property
    def untrustworthy_from(self) -> float | None:
        """The smallest ``|η|`` of the sweep at which ΔH must not be believed; None where there is none.

        See :attr:`entropy_pl.estimators.EntropyChange.trustworthy`.
        """
        return min((abs(point.eta) for point in self.sweep if not point.true.trustworthy), default=None)

    def warned(self, *reasons: str) -> ProbeResult:
        """The same result with further warnings, each once."""
        return replace(self, warnings=tuple(dict.fromkeys((*self.warnings, *reasons))))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers: what a record holds of a probe."""
        return {
            "warnings": list(self.warnings),
            "lr": self.lr,
            "entropy": self.entropy.to_dict(),
            "first_order": self.first_order.to_dict(),
            "second_order": self.second_order.to_dict(),
            "eta_star": self.eta_star if self.eta_star is not None and math.isfinite(self.eta_star) else None,
            "eta_star_ci_low": self.eta_star_ci_low,
            "eta_star_ci_high": self.eta_star_ci_high,
            "sweep": [point.to_dict() for point in self.sweep],
            "untrustworthy_from": self.untrustworthy_from,
            "symmetric": [point.to_dict() for point in self.symmetric],
            "power_law": None if self.power_law is None else asdict(self.power_law),
            "update_norm": self.update_norm,
            "update_components": self.update_components,
            "update_gap": self.update_gap,
            "update_split_absent": self.update_split_absent,
            "method": self.method,
            "difference_step": self.difference_step,
            "difference_error": self.difference_error,
            "roughness": self.roughness,
            "expected_reward": None if self.expected_reward is None else self.expected_reward.to_dict(),
            "exchange_rate": None if self.exchange_rate is None else self.exchange_rate.to_dict(),
            "attribution": None if self.attribution is None else self.attribution.to_dict(self.lr, self.first_order),
            "counterfactuals": {name: found.to_dict() for name, found in self.counterfactuals.items()},
            "seconds": self.seconds,
            **self.settings,
        }


def _estimates(**estimates: EntropyChange | None) -> dict[str, Any]:
    return {name: estimate.to_dict() for name, estimate in estimates.items() if estimate is not None}
