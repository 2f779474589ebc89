"""What parts of a probe cost, and a whole one, in bare forward passes over the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.options import Options
from benchmarks.policies import Case, build_case
from benchmarks.scoring import reference
from benchmarks.tables import Table
from benchmarks.timing import interleaved
from entropy_pl import EntropyProbe, TokenStats, token_stats, token_stats_jvp
from entropy_pl.estimators import first_order_delta_entropy, snis_delta_entropy
from entropy_pl.policy.tangents import Tangents, tangents

BARE = "bare forward"
FIVE_ETAS = (0.25, 0.5, 1.0, 2.0, 4.0)  # × lr
AT_MOST = {  # what the project holds itself to
    "ΔH at one η, baseline included": 2.3,
    "each further η": 1.15,
    "δH₁ with SE, central differences alone, base from their midpoint": 2.3,
    "δH₁ with SE, central differences beside ΔH's base": 2.3,
    "δH₁ with SE, forward mode": 3.8,
    "whole probe: ΔH at 5 η + δH₁ + η* + all SE": 8.8,
}


def run(options: Options) -> list[Table]:
    """Ratios to the bare forward, beside what they should be at most."""
    case = build_case(options)
    alternatives = {BARE: reference(case), **works(case)}
    times = interleaved(alternatives, options.rounds, case.device)
    rows = [
        (
            name,
            str(times.ratio(name, BARE)),
            f"{AT_MOST[name]:g}" if name in AT_MOST else "",
            f"{times.median(name):.2f}",
        )
        for name in alternatives
    ]
    return [Table("probes", f"Probes; {case.what}", ("work", "bare forward passes", "at most", "s"), rows)]


def works(case: Case) -> dict[str, Callable[[], object]]:
    """The alternatives; what one of them needs and is not to pay for is made here."""
    model, rollout, update = case.model, case.rollout, case.update
    base = token_stats(model, rollout)
    probe = EntropyProbe(eta_multipliers=FIVE_ETAS)

    def delta_entropy(base: TokenStats, multiplier: float = 1.0) -> object:
        shifted = token_stats(model, rollout, update=update, eta=multiplier * update.lr)
        return snis_delta_entropy(base, shifted)

    def first_order(found: Tangents) -> object:
        return first_order_delta_entropy(found.base, found.first)

    def alone(**how: Any) -> object:
        return first_order_delta_entropy(*token_stats_jvp(model, rollout, update, **how))

    return {
        "ΔH at one η, baseline included": lambda: delta_entropy(token_stats(model, rollout)),
        "each further η": lambda: delta_entropy(base, 2.0),
        "δH₁ with SE, central differences alone, base from their midpoint": lambda: alone(
            method="central_difference", midpoint_base=True
        ),
        "δH₁ with SE, central differences beside ΔH's base": lambda: first_order(
            tangents(model, rollout, update, method="central_difference", base=base)
        ),
        "δH₁ with SE, central differences alone, exact base": lambda: alone(method="central_difference"),
        "δH₁ with SE, forward mode": lambda: alone(method="forward_mode"),
        "whole probe: ΔH at 5 η + δH₁ + η* + all SE": lambda: probe.measure(model, rollout, update),
    }
