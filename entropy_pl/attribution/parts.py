"""What a step's parts did to the entropy, as an object and as what a record holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import fsum, isfinite, nan
from typing import Any

from torch import Tensor

from entropy_pl.attribution.errors import FEWEST_PROMPTS, ErrorBar
from entropy_pl.estimators import EntropyChange
from entropy_pl.rollout import TokenStats

ENTROPY_TERM, OTHER_GRADIENT, OTHER_UPDATE, DIFFERENCES = "entropy_term", "gradient", "update", "differences"


@dataclass(frozen=True, eq=False)
class Attribution:
    """What a step's components, sequences and tokens did to the entropy, to first order, in nats per unit η.

    ``total`` is ``momentum + weight_decay + Σ per_token``; with the remainders it is ``first_order``.

    Args:
        per_token: of every completion token of U, ``[N_U, T_U]``, zero where there is none.
        momentum: of what the optimizer remembered of earlier gradients.
        weight_decay: of the decay.
        gradient: of this step's gradient, ⟨∇Ĥ, v_gradient⟩; the tokens are to explain it.
        first_order: of the whole step, ⟨∇Ĥ, v⟩.
        remainder: what the tokens do not explain, by name: ``entropy_term`` of the loss, which is no function of the
            tokens' log-probs; ``gradient``, the rest of it (dropout, autocast, clipping by value, other terms of the
            loss); ``update``, what the step's components leave of it (rounding of θ).
        by_sign: of the tokens whose advantage is above, below and of zero: ``positive_advantage``,
            ``negative_advantage`` and ``zero_advantage``, together Σ per_token. Empty where the advantages are not
            known.
        over_e: error bars over the E-batch, how well it is measured, of ``first_order``, ``momentum``,
            ``weight_decay``, ``gradient``, ``tokens``, ``remainder`` (the sum) and every name of ``by_sign``.
        over_u: error bars over the prompts of U, how much of it was the luck of the batch, of ``tokens`` and every name
            of ``by_sign``. Empty where U has fewer than 8 prompts.
        stats: log-probs and entropies of U's tokens at the θ of before the step, ``[N_U, T_U]``.
        confidence: of the intervals.
        prompts_of_e: independent clusters behind the error bars over E.
        prompts_of_u: likewise over U.
    """

    per_token: Tensor = field(repr=False)
    momentum: float
    weight_decay: float
    gradient: float
    first_order: float
    remainder: dict[str, float]
    by_sign: dict[str, float]
    over_e: dict[str, ErrorBar]
    over_u: dict[str, ErrorBar]
    stats: TokenStats = field(repr=False)
    confidence: float
    prompts_of_e: int
    prompts_of_u: int

    @property
    def per_sequence(self) -> Tensor:
        """Of every completion of U, ``[N_U]``."""
        return self.per_token.sum(1)

    @property
    def tokens(self) -> float:
        """Of all tokens together."""
        return float(self.per_token.sum())

    @property
    def total(self) -> float:
        """Momentum, weight decay and tokens: ``first_order`` without the remainders."""
        return self.momentum + self.weight_decay + self.tokens

    @property
    def over_u_absent(self) -> str | None:
        """Why there are no error bars over U, in words; None where there are."""
        if self.over_u:
            return None
        return (
            f"expected at least {FEWEST_PROMPTS} prompts in the U-batch for an error bar over them, got "
            f"{self.prompts_of_u}: train on more prompts per step"
        )

    def to_dict(self, eta: float, first_order: EntropyChange | None = None) -> dict[str, Any]:
        """What a record holds: plain numbers in nats of the step of size η, tokens summed.

        Args:
            eta: η of the step taken.
            first_order: the probe's own δH₁, per unit η. With it the whole is that number, and what ⟨∇Ĥ, v⟩ leaves of
                it, since its derivatives are differences, is one remainder more, ``differences``.
        """
        remainder = dict(self.remainder)
        if first_order is not None:
            remainder[DIFFERENCES] = first_order.value - self.first_order
        values = {name: getattr(self, name) for name in ("first_order", "momentum", "weight_decay", "gradient")}
        found = {name: self._plain(name, value, eta) for name, value in values.items()}
        if first_order is not None:
            whole = eta * first_order
            found["first_order"] |= {name: getattr(whole, name) for name in ("value", "stderr", "ci_low", "ci_high")}
        return found | {
            "tokens": self._plain("tokens", self.tokens, eta, of_u=True),
            "by_sign": {name: self._plain(name, value, eta, of_u=True) for name, value in self.by_sign.items()},
            "remainder": {name: eta * value for name, value in remainder.items()},
            "remainder_sum": self._plain(
                "remainder", fsum(remainder.values()), eta, shift=remainder.get(DIFFERENCES, 0.0)
            ),
            "total": eta * self.total,
            "over_u": {"prompts": self.prompts_of_u, "absent": self.over_u_absent},
        }

    def _plain(self, name: str, value: float, eta: float, *, of_u: bool = False, shift: float = 0.0) -> dict[str, Any]:
        """One estimate; ``shift`` is a part of the value that its error bar knows nothing of."""
        bar = self.over_e[name]
        low, high = sorted(eta * (end + shift) for end in (bar.ci_low, bar.ci_high))
        plain = {
            "value": eta * value,
            "stderr": abs(eta) * bar.influence,
            "stderr_jackknife": abs(eta) * bar.jackknife,
            "ci_low": low,
            "ci_high": high,
        }
        if of_u:
            luck = self.over_u.get(name, ErrorBar(nan, nan, nan, nan))
            plain |= {"stderr_u": abs(eta) * luck.influence, "stderr_u_jackknife": abs(eta) * luck.jackknife}
        return {key: number if key == "value" or isfinite(number) else None for key, number in plain.items()}
