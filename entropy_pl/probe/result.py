"""What a probe found, as numbers with error bars."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from entropy_pl.estimators import EntropyChange, PowerLaw


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
        eta_star: 2|⟨∇H, v⟩|/|v'∇²H v|, the η at which first and second order are equal in size; None when there is
            no curvature at all.
        eta_star_stderr: its standard error, by the delta method on the influences of both.
        sweep: one :class:`SweepPoint` per η, in ascending order.
        symmetric: one :class:`SymmetricPoint` per pair ±η of the sweep.
        power_law: log |ΔH| against log η over the sweep's η > 0: slope 1 is first order. None where no line can be
            fitted.
        lr: η of the step really taken.
        update_norm: ‖v‖.
        update_components: norm of each component of v, where the optimizer could be taken apart.
        update_gap: what the components leave unexplained, relative to ‖v‖.
        update_split_absent: why there are no components, in words; None where there are.
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
    symmetric: list[SymmetricPoint]
    power_law: PowerLaw | None
    lr: float
    update_norm: float
    update_components: dict[str, float] | None
    update_gap: float | None
    update_split_absent: str | None
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
            "symmetric": [point.to_dict() for point in self.symmetric],
            "power_law": None if self.power_law is None else asdict(self.power_law),
            "update_norm": self.update_norm,
            "update_components": self.update_components,
            "update_gap": self.update_gap,
            "update_split_absent": self.update_split_absent,
            "method": self.method,
            "difference_step": self.difference_step,
            "seconds": self.seconds,
            **self.settings,
        }
