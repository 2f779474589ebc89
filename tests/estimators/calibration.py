"""How often every interval holds the truth: ``python tests/estimators/calibration.py [--write docs/reliability.md]``.

The truth is the enumerated one (`enumeration.py`), the samples are 2,000 draws of N completions of the same policy.
`test_calibration.py` asserts the shares of which this makes a table.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from enumeration import Enumeration
from resampling import Policy, Samples, coverage
from rich.console import Console
from samples import (
    ETA,
    INTEGRAND,
    NORMALIZE,
    OPTIONS,
    WEIGHTING,
    exact_curvature,
    exact_reward,
    exact_reward_slope,
)
from torch import Tensor

from benchmarks.tables import Table, write_tables
from entropy_pl.attribution import ErrorBar, influence_matrix, matrix
from entropy_pl.attribution.errors import error_over_u, loss_sizes
from entropy_pl.estimators import (
    Agreement,
    EntropyChange,
    FiellerSet,
    agreement,
    entropy_estimate,
    eta_star,
    fieller_set,
    first_order_coefficients,
    first_order_delta_entropy,
    first_order_delta_reward,
    interval,
    jackknife_standard_error,
    linear_combination,
    low_variance_delta_entropy,
    ratio,
    reward_baseline,
    reward_estimate,
    second_order_delta_entropy,
    snis_delta_entropy,
    snis_delta_reward,
    symmetric_difference,
)
from entropy_pl.estimators.estimate import student_t
from entropy_pl.probe import EntropyProbe
from entropy_pl.probe.scores import ProbeScores
from entropy_pl.rollout import TokenStats

RESAMPLES = 2000  # a share of 95 % has a standard deviation of 0.5 % then
SIZES = (64, 256)
# Of η*: seeds of a policy and of its update, and what is lost in noise at N = 256 (standard errors from zero).
DIRECTIONS = {
    "policy 1, v 1 (slope 19, curvature 6)": (1, 1),
    "policy 2, v 2 (6, 11)": (2, 2),
    "policy 2, v 25 (9, curvature 0.4)": (2, 25),
    "policy 5, v 20 (6, curvature 0.4)": (5, 20),
    "policy 5, v 23 (18, curvature 0.7)": (5, 23),
    "policy 3, v 23 (slope 0.6, 10)": (3, 23),
}
RESAMPLES_OF_LARGE = 1000  # at N = 1,024: 0.7 %
COLUMNS = (*SIZES, 1024)
PER_PROMPT = 4  # completions, where a prompt has several
CLIP = 0.3  # log weights have a standard deviation of 0.3: one in three is clipped
DEFAULT = {"normalize": "per_token", "weighting": "prefix", "integrand": "rao_blackwell"}
Interval = tuple[float, float]


@dataclass(frozen=True)
class Case:
    """One interval of one estimator under one set of options.

    Args:
        what: the estimator.
        option: in words.
        truth: by enumeration.
        intervals: of every batch.
        confidence: nominal.
        per_prompt: completions of each prompt.
        sizes: N.
        off: N at which the share is known to lie outside the band → why. The document says so.
        seeds: of the policy and of its update.
        at_least: whether it may hold the truth more often than it says.
    """

    what: str
    option: str
    truth: Callable[[Policy], float]
    intervals: Callable[[Samples], list[Interval] | list[FiellerSet]]
    confidence: float = 0.95
    per_prompt: int = 1
    sizes: tuple[int, ...] = SIZES
    off: dict[int, str] = field(default_factory=dict)
    seeds: tuple[int, int] = (1, 1)
    at_least: bool = False

    def __str__(self) -> str:
        return f"{self.what}, {self.option}"

    def band(self, size: int) -> Interval:
        """What is asked for: 92.5–97.5 % of nominal 95 % at N = 256, and of others as much as half of what is left.

        At N = 64, 92–97 %: the estimates are still a little skewed.
        """
        reach = min(0.025, (1 - self.confidence) / 2)
        low, high = self.confidence - reach, 1.0 if self.at_least else self.confidence + reach
        return (low, high) if size > 64 else (low - 0.005, high)

    def share(self, samples: Samples) -> float:
        """That holds the truth."""
        truth, found = self.truth(samples.policy), self.intervals(samples)
        if isinstance(found[0], FiellerSet):
            return sum(truth in these for these in found) / len(found)
        return coverage(found, truth)


# ---------------------------------------------------------------------------------------------------------- the truth


def entropy(normalize: str, eta: float = 0.0) -> Callable[[Policy], float]:
    return lambda policy: policy.enumeration.exact_entropy(normalize, eta)


def change(normalize: str = "per_token", eta: float = ETA) -> Callable[[Policy], float]:
    return lambda policy: entropy(normalize, eta)(policy) - entropy(normalize)(policy)


def slope(normalize: str = "per_token") -> Callable[[Policy], float]:
    return lambda policy: policy.enumeration.exact_slope(normalize)


def curvature(normalize: str = "per_token") -> Callable[[Policy], float]:
    return lambda policy: exact_curvature(policy.enumeration, normalize)


def quotient(policy: Policy) -> float:
    return slope()(policy) / curvature()(policy)


def exact_eta_star(policy: Policy) -> float:
    return 2 * abs(quotient(policy))


def reward_change(policy: Policy) -> float:
    exact = (exact_reward(policy.enumeration, policy.rewards, eta) for eta in (ETA, 0.0))
    return next(exact) - next(exact)


def reward_slope(policy: Policy) -> float:
    return exact_reward_slope(policy.enumeration, policy.rewards)


def clipped_change(normalize: str, weighting: str) -> Callable[[Policy], float]:
    """What is estimated under clipped weights, in loops over all completions: not the change of the entropy."""

    def truth(policy: Policy) -> float:
        base, shifted, p = policy.stats["base"], policy.stats["shifted"], policy.probabilities

        def reduced(stats: TokenStats) -> float:
            total, length = 0.0, 0.0
            for k in range(base.mask.shape[1]):
                sums = np.zeros(3)
                for i in range(len(p)):
                    until = k if weighting == "prefix" else base.mask.shape[1]
                    log_weight = sum(float(stats.logp[i, j] - base.logp[i, j]) for j in range(until) if base.mask[i, j])
                    weight = float(p[i]) * math.exp(min(max(log_weight, -CLIP), CLIP))
                    alive = float(base.mask[i, k])
                    sums += weight * np.array([alive * float(stats.entropy[i, k]), alive, 1.0])
                total, length = total + sums[0] / sums[2], length + sums[1] / sums[2]
            return total / length if normalize == "per_token" else total

        return reduced(shifted) - reduced(base)

    return truth


def over_tokens(policy: Policy, ranks: bool) -> float:
    """The correlation, over all tokens that the policy writes, of the two arrays that `agreement` compares."""
    mask = policy.stats["base"].mask
    weight = policy.probabilities[:, None].expand(mask.shape)[mask].numpy()
    x, y = (values[mask].numpy() for values in compared(policy))

    def rank(values: np.ndarray) -> np.ndarray:
        below = np.array([weight[values < v].sum() + 0.5 * weight[values == v].sum() for v in values])
        return below / weight.sum()

    if ranks:
        x, y = rank(x), rank(y)
    x, y = (values - np.average(values, weights=weight) for values in (x, y))
    covariance = np.average(x * y, weights=weight)
    return float(covariance / math.sqrt(np.average(x**2, weights=weight) * np.average(y**2, weights=weight)))


def compared(policy: Policy) -> tuple[Tensor, Tensor]:
    """Two functions of every token that have something in common: its log-prob, and how that moves."""
    return policy.stats["base"].logp, policy.stats["first"].logp + 2 * policy.stats["first_of_other"].entropy


# ------------------------------------------------------------------------------------------------------- the intervals


def ends(estimates: list[EntropyChange]) -> list[Interval]:
    return [(estimate.ci_low, estimate.ci_high) for estimate in estimates]


def plain(estimate: Callable[..., Any], *names: str, **options: Any) -> Callable[[Samples], list[Interval]]:
    return lambda samples: ends(samples.estimates(estimate, *names, **options))


def with_baseline(kind: str, **options: Any) -> Callable[[Samples], list[EntropyChange]]:
    """δH₁ per unit η."""
    gae_lambda = {"gae_lambda": options.pop("gae_lambda")} if "gae_lambda" in options else {}

    def estimates(samples: Samples) -> list[EntropyChange]:
        baseline = samples.baseline(kind, **gae_lambda, **options)
        return samples.estimates(first_order_delta_entropy, "base", "first", baseline=baseline, **options)

    return estimates


def rewarded(kind: str) -> Callable[[Samples], list[Interval]]:
    def intervals(samples: Samples) -> list[Interval]:
        baseline = None if kind == "none" else samples.baseline(kind, reward_baseline)
        found = samples.estimates(first_order_delta_reward, "base", "first", rewarded=True, baseline=baseline)
        return ends(found)

    return intervals


def combined(
    combine: Callable[..., Any], *parts: Callable[[Samples], list[EntropyChange]]
) -> Callable[[Samples], list[Any]]:
    """A combination of estimates, batch by batch."""

    def combinations(samples: Samples) -> list[Any]:
        every = [part(samples) for part in parts]
        return [combine(*of_batch) for of_batch in zip(*every, strict=True)]

    return combinations


def estimates_of(estimate: Callable[..., Any], *names: str, **options: Any) -> Callable[[Samples], list[EntropyChange]]:
    return lambda samples: samples.estimates(estimate, *names, **options)


def ends_of(combinations: Callable[[Samples], list[EntropyChange]]) -> Callable[[Samples], list[Interval]]:
    return lambda samples: ends(combinations(samples))


def low_variance(kind: str) -> Callable[[Samples], list[Interval]]:
    def combine(true: EntropyChange, matched: EntropyChange, low: EntropyChange) -> EntropyChange:
        return low_variance_delta_entropy(true, matched, low, ETA)

    return ends_of(combined(combine, TRUE, FIRST, with_baseline(kind, **DEFAULT)))


def symmetric(part: int) -> Callable[[Samples], list[Interval]]:
    def combine(plus: EntropyChange, minus: EntropyChange) -> EntropyChange:
        return symmetric_difference(plus, minus, ETA)[part]

    return ends_of(combined(combine, TRUE, estimates_of(snis_delta_entropy, "base", "backward")))


def fieller(samples: Samples) -> list[Interval]:
    """Of the exchange rate ΔH/ΔJ; all of the line where it is unbounded."""
    found = combined(ratio, TRUE, estimates_of(snis_delta_reward, "base", "shifted", rewarded=True))(samples)
    return [(r.ci_low, r.ci_high) if r.bounded else (-math.inf, math.inf) for r in found]


def orders(samples: Samples) -> list[tuple[EntropyChange, EntropyChange]]:
    """Slope and curvature, made once for both of the following."""
    found: list[Any] = samples.once("orders", lambda: list(zip(FIRST(samples), SECOND(samples), strict=True)))
    return found


def signed_sets(samples: Samples) -> list[FiellerSet]:
    """Of slope over curvature."""
    return [fieller_set(*of_batch) for of_batch in orders(samples)]


def eta_stars(samples: Samples) -> list[Interval]:
    """Of η*; an end that is unbounded holds everything."""
    found = [eta_star(*of_batch) for of_batch in orders(samples)]
    return [(low, math.inf if high is None else high) for _, low, high in found]


def difference_of_steps(samples: Samples) -> list[Interval]:
    """As of a counterfactual: another step against the one taken."""

    def combine(other: EntropyChange, taken: EntropyChange) -> EntropyChange:
        return linear_combination([(1.0, other), (-1.0, taken)])

    return ends_of(combined(combine, estimates_of(snis_delta_entropy, "base", "other"), TRUE))(samples)


def jackknifed(groups: int | None) -> Callable[[Samples], list[Interval]]:
    """ΣH/ΣT, the entropy per token, written as one quotient: the jackknife asks for no influences."""

    def intervals(samples: Samples) -> list[Interval]:
        base, found = samples.policy.stats["base"], []
        per_row = torch.stack([base.entropy.sum(1), base.mask.sum(1).double()], 1).numpy()
        count = samples.rows.shape[1] if samples.clusters is None else int(samples.clusters.max()) + 1
        reach = student_t(0.95, groups or count)
        for rows in samples.rows.numpy():
            drawn = per_row[rows]

            def value(kept: Tensor, drawn: np.ndarray = drawn) -> float:
                total = drawn[kept.numpy()].sum(0)
                return float(total[0] / total[1])

            stderr = jackknife_standard_error(value, len(rows), clusters=samples.clusters, groups=groups)
            whole = drawn.sum(0)
            found.append((whole[0] / whole[1] - reach * stderr, whole[0] / whole[1] + reach * stderr))
        return found

    return intervals


def agreeing(name: str) -> Callable[[Samples], list[Interval]]:
    def compare(samples: Samples) -> list[Agreement]:
        mask = samples.policy.stats["base"].mask
        x, y = compared(samples.policy)
        return [agreement(x[rows], y[rows], mask[rows], clusters=samples.clusters) for rows in samples.rows]

    def intervals(samples: Samples) -> list[Interval]:
        found = samples.once("agreement", lambda: compare(samples))
        return [(getattr(one, f"{name}_ci_low"), getattr(one, f"{name}_ci_high")) for one in found]

    return intervals


def added_by(policy: Policy, positive: bool) -> Tensor:
    """What every completion would add to a sum; of A > 0 alone, those that have it."""
    moved = policy.stats["first"].logp.sum(1)
    return moved * policy.advantages.clamp(min=0.0) if positive else moved * policy.rewards


def luck_of_u(divided_by: str, kind: str, positive: bool = False) -> Callable[[Samples], list[Interval]]:
    """Σ_u A_u of a loss divided by Z: A_u = a_u/Z, a_u what a completion would add to a sum."""

    def measure(samples: Samples) -> list[tuple[float, ErrorBar]]:
        base, found = samples.policy.stats["base"], []
        added = added_by(samples.policy, positive)
        for rows in samples.rows:
            sizes = loss_sizes(base.mask[rows], divided_by)
            per_sequence = added[rows] / sizes.sum()
            found.append((float(per_sequence.sum()), error_over_u(per_sequence, sizes, samples.clusters)))
        return found

    def intervals(samples: Samples) -> list[Interval]:
        count = samples.rows.shape[1] if samples.clusters is None else int(samples.clusters.max()) + 1
        measured = samples.once(("U", divided_by, positive), lambda: measure(samples))
        return [interval(value, getattr(bar, kind), count, 0.95) for value, bar in measured]

    return intervals


def loss_of_all(divided_by: str, positive: bool = False) -> Callable[[Policy], float]:
    """Of infinitely many prompts: E[a]/E[z]."""

    def truth(policy: Policy) -> float:
        p, added = policy.probabilities, added_by(policy, positive)
        length = policy.stats["base"].mask.sum(1).double()
        return float((p * added).sum() / ((p * length).sum() if divided_by == "tokens" else 1.0))

    return truth


def of_part(exact: str, one_sided: str) -> Callable[[Samples], list[Interval]]:
    """The change along a part of the step, exact, with the error bar that one-sided derivatives give it."""

    def intervals(samples: Samples) -> list[Interval]:
        values, rough = (samples.estimates(first_order_delta_entropy, "base", name) for name in (exact, one_sided))
        return [
            interval(one.value, other.stderr, len(samples.rows[0]), 0.95)
            for one, other in zip(values, rough, strict=True)
        ]

    return intervals


def column_of_the_matrix(samples: Samples) -> list[Interval]:
    """δH_u of a completion u whose step is v: ⟨∇s_ik, v⟩ and ⟨∇h_ik, v⟩ are at hand, and no gradient is made here."""
    found, enumeration = [], samples.policy.enumeration
    update = replace(enumeration.update, preconditioner=enumeration.update.direction)
    for number, rows in enumerate(samples.rows):
        base, first = samples.batch(number, "base", "first")

        def kernel(*_: Any, base: TokenStats = base, first: TokenStats = first, **__: Any) -> tuple[Tensor, Tensor]:
            of_h = first_order_coefficients(base)
            counts = TokenStats(base.logp, base.mask.double(), base.mask)
            of_t = first_order_coefficients(counts, normalize="per_sequence")
            per_row = len(base) * (of_h.logp * first.logp + of_h.entropy * first.entropy).sum(1, keepdim=True)
            return -per_row, -(of_t.logp * first.logp).sum().reshape(1, 1)

        with patch.multiple(
            matrix,
            gradient_kernel=kernel,
            length_gradient=lambda *_: {name: torch.zeros(1) for name in update.direction},
            influence_matrix_cost=lambda *_, **__: None,
        ):
            of_batch = influence_matrix(
                enumeration.model,
                enumeration.rollout.select(rows),
                enumeration.rollout.select(torch.arange(1)),
                update,
                token_coefficients=torch.zeros(1, enumeration.rollout.completion_mask.shape[1]),
                base=base,
                clusters=torch.arange(len(rows)),  # the prompts are drawn anew for every completion
            )
        found.append(interval(float(of_batch.per_sequence[0]), float(of_batch.stderr[0]), len(rows), 0.95))
    return found


# ------------------------------------------------------------------------------------------------------------ the cases

TRUE = estimates_of(snis_delta_entropy, "base", "shifted")
FIRST = estimates_of(first_order_delta_entropy, "base", "first")
SECOND = estimates_of(second_order_delta_entropy, "base", "first", "second")


def named(*options: str) -> str:
    return ", ".join(f"`{option}`" for option in options)


def cases() -> Iterator[Case]:
    """Every estimator with an interval, under every option."""
    for normalize, integrand in itertools.product(NORMALIZE, INTEGRAND):
        options: dict[str, Any] = {"normalize": normalize, "integrand": integrand}
        yield Case("H", named(*options.values()), entropy(normalize), plain(entropy_estimate, "base", **options))
    orders: list[tuple[str, Any, Callable[[str], Callable[[Policy], float]], tuple[str, ...]]] = [
        ("ΔH", snis_delta_entropy, change, ("base", "shifted")),
        ("δH₁", first_order_delta_entropy, slope, ("base", "first")),
        ("v'∇²Hv", second_order_delta_entropy, curvature, ("base", "first", "second")),
    ]
    for what, estimate, truth, names in orders:
        for normalize, weighting, integrand in OPTIONS:
            options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
            yield Case(what, named(*options.values()), truth(normalize), plain(estimate, *names, **options))
    for kind in ("position", "critic"):
        for normalize, weighting, integrand in OPTIONS:
            if kind == "critic" and weighting == "sequence":
                continue  # the same numbers as `prefix` with that critic, which is tested where critics are
            options = {"normalize": normalize, "weighting": weighting, "integrand": integrand}
            found = ends_of(with_baseline(kind, **options))
            sizes = (256,) if kind == "critic" and options != DEFAULT else SIZES  # for speed: 2,000 fits a size
            yield Case(f"δH₁, baseline {kind}", named(*options.values()), slope(normalize), found, sizes=sizes)
        yield Case(f"ΔH, baseline {kind}", "first orders exchanged", change(), low_variance(kind))
    for normalize, weighting in itertools.product(NORMALIZE, WEIGHTING):
        options = {"normalize": normalize, "weighting": weighting}
        yield Case(
            "ΔH, weights clipped",
            f"{named(*options.values())}; of the clipped functional",
            clipped_change(normalize, weighting),
            plain(snis_delta_entropy, "base", "shifted", clip_log_weight=CLIP, **options),
        )
    reward_options: dict[str, Any] = {"rewarded": True}
    yield Case(
        "J",
        "",
        lambda policy: exact_reward(policy.enumeration, policy.rewards, 0.0),
        plain(reward_estimate, "base", **reward_options),
    )
    yield Case("ΔJ", "", reward_change, plain(snis_delta_reward, "base", "shifted", **reward_options))
    for kind in ("none", "position", "critic"):
        sizes = (256,) if kind == "critic" else SIZES
        yield Case("δJ₁", f"baseline {kind}", reward_slope, rewarded(kind), sizes=sizes)
    yield Case(
        "ΔH/ΔJ",
        "Fieller's interval",
        lambda policy: change()(policy) / reward_change(policy),
        fieller,
        off={64: "one in eight is unbounded, and holds everything"},
    )
    odd = [lambda policy: (change()(policy) - change(eta=-ETA)(policy)) / (2 * ETA)]
    even = [lambda policy: (change()(policy) + change(eta=-ETA)(policy)) / ETA**2]
    for part, (name, [truth_of_part]) in enumerate((("odd part", odd), ("even part", even))):
        yield Case("ΔH at ±η", name, truth_of_part, symmetric(part))
    yield Case(
        "ΔH of another step − ΔH",
        "as of a counterfactual",
        lambda policy: change()(Policy(policy.other)) - change()(policy),
        difference_of_steps,
    )
    for words, seeds in DIRECTIONS.items():
        of_these: dict[str, Any] = {"seeds": seeds, "sizes": COLUMNS}
        yield Case("δH₁ over v'∇²Hv", f"Fieller's set, {words}", quotient, signed_sets, **of_these)
        yield Case("η*", f"its interval, {words}", exact_eta_star, eta_stars, **of_these, at_least=True)
    for confidence in (0.8, 0.99):
        for what, estimate, truth, names in orders:
            found = plain(estimate, *names, confidence=confidence)
            yield Case(what, f"defaults, confidence {confidence}", truth("per_token"), found, confidence)
    for what, estimate, truth, names in [("H", entropy_estimate, entropy, ("base",)), *orders]:
        found = plain(estimate, *names)
        yield Case(
            what, f"defaults, {PER_PROMPT} completions a prompt", truth("per_token"), found, per_prompt=PER_PROMPT
        )
    yield Case(
        "δH₁, baseline critic",
        f"defaults, {PER_PROMPT} completions a prompt",
        slope(),
        ends_of(with_baseline("critic", **DEFAULT)),
        per_prompt=PER_PROMPT,
        sizes=(256,),
    )
    for per_prompt in (1, PER_PROMPT):
        of_prompt = f"{per_prompt} completion{'s' if per_prompt > 1 else ''} a prompt"
        groups: dict[str, int | None] = {"20 groups": 20}
        if per_prompt > 1:
            groups["one group per prompt"] = None
        for words, count in groups.items():
            found = jackknifed(count)
            yield Case(
                "jackknife of ΣH/ΣT", f"{words}, {of_prompt}", entropy("per_token"), found, per_prompt=per_prompt
            )
        for name in ("pearson", "spearman"):
            yield Case(
                f"agreement, {name}",
                of_prompt,
                lambda policy, ranks=name == "spearman": over_tokens(policy, ranks),
                agreeing(name),
                per_prompt=per_prompt,
                sizes=SIZES if per_prompt == 1 else (256,),
            )
    for divided_by, kind in itertools.product(("completions", "tokens"), ("influence", "jackknife")):
        yield Case(
            f"attribution over U, {kind}",
            f"loss divided by {divided_by}, {PER_PROMPT} completions a prompt",
            loss_of_all(divided_by),
            luck_of_u(divided_by, kind),
            per_prompt=PER_PROMPT,
        )
    for kind in ("influence", "jackknife"):
        yield Case(
            f"attribution over U, {kind}",
            f"A > 0 of a loss divided by tokens, {PER_PROMPT} completions a prompt",
            loss_of_all("tokens", positive=True),
            luck_of_u("tokens", kind, positive=True),
            per_prompt=PER_PROMPT,
            off={64: "16 prompts of a skewed quantity: of one sign there are no others that cancel"},
        )
    yield Case("attribution over E", "one-sided tangents, first order", slope(), of_part("first", "one_sided"))
    yield Case(
        "attribution over E",
        "one-sided tangents, A > 0",
        lambda policy: policy.positive.exact_slope("per_token"),
        of_part("first_of_positive", "one_sided_of_positive"),
    )
    yield Case("E×U matrix, δH_u over E", "defaults", slope(), column_of_the_matrix, sizes=(256,))


CASES = list(cases())
FORGOTTEN = Case(
    "H",
    f"{PER_PROMPT} completions a prompt, and clusters forgotten",
    entropy("per_token"),
    plain(entropy_estimate, "base", clusters=None),
    per_prompt=PER_PROMPT,
)


class Draws:
    """The samples of every policy and size, drawn once."""

    def __init__(self) -> None:
        self._policies: dict[tuple[int, int], Policy] = {}
        self._drawn: dict[Any, Samples] = {}

    def __call__(
        self, size: int, per_prompt: int = 1, count: int = RESAMPLES, seeds: tuple[int, int] = (1, 1)
    ) -> Samples:
        policy = self._policies.setdefault(seeds, Policy(Enumeration.make(*seeds)))
        count = min(count, RESAMPLES_OF_LARGE) if size > max(SIZES) else count
        key = (size, per_prompt, count, seeds)
        if key not in self._drawn:
            self._drawn[key] = Samples.draw(policy, count, size, per_prompt)
        return self._drawn[key]

    def of(self, case: Case, size: int) -> Samples:
        """Those that a case is about."""
        return self(size, case.per_prompt, seeds=case.seeds)


@dataclass(frozen=True)
class Gae:
    """δH₁ with the baseline gae at λ = 0.5, whose critic's noise the influences leave out, at N = 256.

    Args:
        influence: share of intervals from influences alone that hold the estimate's own expectation.
        probe: share of a probe's, whose error bar holds a jackknife with the critic fitted anew.
        size: a probe's standard error, as a multiple of the estimates' spread.
    """

    influence: float
    probe: float
    size: float


GAE_RESAMPLES = 250  # each fits 21 critics; a share of 95 % has a standard deviation of 1.4 % then


def gae(samples: Samples) -> Gae:
    probe = EntropyProbe(baseline="gae", gae_lambda=0.5, jackknife_groups=10, eta_multipliers=())
    plain_estimates = with_baseline("gae", gae_lambda=0.5, **DEFAULT)(samples)
    found = []
    for number, rows in enumerate(samples.rows):
        base, first, second = samples.batch(number, "base", "first", "second")
        features = samples.policy.features[rows][base.mask]
        scores = ProbeScores(base, first, second, {}, None, features, "forward_mode", None)
        found.append(probe.reduce(scores, samples.policy.enumeration.update).first_order)
    values = np.array([estimate.value for estimate in found])
    error = math.sqrt(np.mean([estimate.stderr**2 for estimate in found]))
    return Gae(
        coverage(ends(plain_estimates), values.mean()), coverage(ends(found), values.mean()), error / values.std()
    )


def table() -> Table:
    """Of every case, at every N."""
    draws, rows = Draws(), []
    for case in CASES:
        shares = {size: case.share(draws.of(case, size)) for size in case.sizes}
        cells = [f"{100 * shares[size]:.1f}" if size in shares else "" for size in COLUMNS]
        marked = [cell + " (off)" if size in case.off else cell for size, cell in zip(COLUMNS, cells, strict=True)]
        rows.append((case.what, case.option, f"{100 * case.confidence:g}", *marked))
    title = f"Share of {RESAMPLES:,} intervals that hold the enumerated truth, %"
    found = gae(draws(256, count=GAE_RESAMPLES))
    note = (
        f"`gae`, λ = 0.5, of its own (biased) expectation, {GAE_RESAMPLES} resamples at N = 256: "
        f"{100 * found.probe:.1f} % of a probe's intervals, which hold the jackknife of the critic "
        f"({100 * found.influence:.1f} % of those from influences alone); a probe's standard error is "
        f"{found.size:.2f} of the estimates' spread."
    )
    return Table(
        "calibration", title, ("of", "option", "nominal", *(f"N = {size:,}" for size in COLUMNS)), rows, (note,)
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table between its markers")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    made = table()
    Console(width=None if Console().is_terminal else 160).print(made.rich())
    if chosen.write:
        write_tables(chosen.write, [made])


if __name__ == "__main__":
    main()
