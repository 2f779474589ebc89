"""The GRPO family of losses, as pure functions of arrays.

Notation: N completions, T positions, m_ik the completion mask, T_i = Σ_k m_ik, ρ_ik = π(t_ik)/π_old(t_ik). The loss is

    L = Σ_ik w_ik ℓ_ik,    ℓ_ik = −min(ρ_ik A_i, clip(ρ_ik, 1 − low, 1 + high) A_i) + β k3_ik − α h_ik
                           k3_ik = π_ref/π − log(π_ref/π) − 1    (at t_ik; unbiased for KL(π ‖ π_ref), arXiv 2402.03300)
                           h_ik: entropy of the distribution that t_ik was drawn from, with its gradient

and the loss types differ in the weights w_ik alone. Options change the first term, the policy gradient's, at some
tokens (see `LossSettings`): it is left out where A_i has the other sign, or where Clip-Cov chose; where KL-Cov chose it
is −ρ_ik A_i + c |log ρ_ik|. The weights stay: they are computed once, over the whole batch of an optimizer step, which
is that of all processes that take the step together. The loss is a sum over rows, so that the losses of micro-batches
of rows, and those of processes, add up to it exactly, whatever their sizes. So do their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LossType = Literal["grpo", "dr_grpo", "dapo", "bnpo"]
"""How tokens are weighted: see :func:`token_weights`."""

AdvantageSign = Literal["both", "positive", "negative"]
"""Whose tokens have a policy-gradient term: those of all completions, or of one sign of the advantage alone."""

OverProcesses = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, which hold one of the same shape each and all come here."""


@dataclass(frozen=True)
class LossSettings:
    """What the loss is.

    Args:
        loss_type: how tokens are weighted, see `token_weights`.
        clip_low: the ratio π/π_old is clipped at 1 − clip_low from below (0 to 1).
        clip_high: the ratio is clipped at 1 + clip_high from above; larger than clip_low is DAPO's "clip higher".
        kl_coefficient: β, weight of the KL divergence to the reference policy; 0 needs no reference.
        max_completion_length: T_max, the constant that ``dr_grpo`` divides by, in tokens; other types ignore it.
        entropy_coefficient: α, weight of the entropy bonus (arXiv 1602.01783).
        advantage_sign: whose tokens have a policy-gradient term: those of all completions, or of those with A > 0 or
            A < 0 alone (arXiv 2506.01347). The weights stay, and so do the KL and entropy terms.
        clip_cov_fraction: Clip-Cov (arXiv 2505.22617): of all tokens this share, chosen at random among those whose
            covariance lies strictly inside ``clip_cov_bounds``, has no policy-gradient term; 0 switches it off.
        clip_cov_bounds: in nats (times the advantage's unit); see `objectives.covariance`.
        kl_cov_fraction: KL-Cov (same paper): the share of tokens with the largest covariance is not clipped, and pays
            for leaving the policy that sampled; 0 switches it off. The other tokens stay clipped as the settings say,
            where the paper clips none.
        kl_cov_coefficient: c, the price per nat of `|log ρ|`. Its slope at ρ = 1 is taken as 0, so that it acts from
            a rollout's second update on.

    Raises:
        ValueError: for an unknown loss type or sign, a setting out of range, ``dr_grpo`` without its constant, or
            Clip-Cov together with KL-Cov.
    """

    loss_type: LossType = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coefficient: float = 0.0
    max_completion_length: int | None = None
    entropy_coefficient: float = 0.0
    advantage_sign: AdvantageSign = "both"
    clip_cov_fraction: float = 0.0
    clip_cov_bounds: tuple[float, float] = (1.0, 5.0)
    kl_cov_fraction: float = 0.0
    kl_cov_coefficient: float = 1.0

    def __post_init__(self) -> None:
        _check_loss_type(self.loss_type, self.max_completion_length)
        if self.advantage_sign not in get_args(AdvantageSign):
            raise ValueError(
                f"expected advantage_sign out of {list(get_args(AdvantageSign))}, got {self.advantage_sign!r}"
            )
        for name in ("clip_low", "clip_cov_fraction", "kl_cov_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        for name in ("clip_high", "kl_coefficient", "entropy_coefficient", "kl_cov_coefficient"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"expected {name} to be finite and not negative, got {value}")
        object.__setattr__(self, "clip_cov_bounds", tuple(self.clip_cov_bounds))  # a config file has a list
        if len(self.clip_cov_bounds) != 2 or not self.clip_cov_bounds[0] < self.clip_cov_bounds[1]:
            raise ValueError(
                f"expected clip_cov_bounds of two numbers, the smaller one first, got {list(self.clip_cov_bounds)}"
            )
        if self.clip_cov_fraction and self.kl_cov_fraction:
            raise ValueError(
                f"expected Clip-Cov or KL-Cov, got both (clip_cov_fraction={self.clip_cov_fraction}, kl_cov_fraction="
                f"{self.kl_cov_fraction}): set one of them to 0, they would choose the same tokens for opposite ends"
            )

    @property
    def needs_covariance(self) -> bool:
        """Whether tokens are chosen by their covariance."""
        return self.clip_cov_fraction > 0 or self.kl_cov_fraction > 0

    @property
    def needs_advantages(self) -> bool:
        """Whether nothing is learnt from completions without an advantage: no other term has a gradient there."""
        return self.kl_coefficient == 0 and self.entropy_coefficient == 0


@dataclass(frozen=True, eq=False)
class PolicyLoss:
    """Loss of some rows, and sums from which metrics over all rows follow: add them up, then divide by ``num_tokens``.

    Every one is a scalar.

    Args:
        loss: scalar, to be differentiated; the rows' part of the whole loss.
        num_tokens: tokens in these rows.
        clipped_low: tokens whose ratio lies below 1 − clip_low with A < 0, so that they have no policy gradient.
        clipped_high: tokens whose ratio lies above 1 + clip_high with A > 0, likewise.
        kl_sum: Σ k3 in nats; zero without a reference.
    """

    loss: Tensor
    num_tokens: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl_sum: Tensor


@dataclass(frozen=True)
class BatchSize:
    """How much the batch of an optimizer step holds, over all processes that take the step together.

    Args:
        completions: N, those without a token included.
        tokens: Σ m.
        processes: W, those that have completions.
    """

    completions: int
    tokens: int
    processes: int = 1


def token_weights(
    mask: Tensor,
    loss_type: LossType,
    max_completion_length: int | None = None,
    *,
    whole: BatchSize | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weight of each token in the loss of one optimizer step.

    ::

        grpo      m_ik / (N T_i)     every completion counts the same
        dr_grpo   m_ik / (N T_max)   a constant: length earns nothing
        dapo      m_ik / Σ m         every token counts the same
        bnpo      m_ik / (W Σ′ m)    every token of this process's batch counts the same, and so does every process

    N and Σ m are of the whole batch, over all processes; Σ′ m is over this process's rows, W the number of processes
    that have any. ``grpo``, ``dr_grpo`` and ``dapo`` do not depend on how rows are spread over processes; ``bnpo``
    does, by its definition, and in one process it is ``dapo``.

    Args:
        mask: ``[n, T]``, True at completion tokens, over all rows of the step that this process has.
        loss_type: as above.
        max_completion_length: T_max in tokens, for ``dr_grpo``.
        whole: size of the step's batch over all processes; None: this process is alone.
        dtype: of the weights.

    Returns:
        ``[n, T]``, zero where the mask is False.

    Raises:
        ValueError: for an unknown loss type, ``dr_grpo`` without T_max, or a mask that is not two-dimensional.
    """
    _check_loss_type(loss_type, max_completion_length)
    if mask.ndim != 2:
        raise ValueError(f"expected a mask [n, T], got shape {list(mask.shape)}")
    whole = whole or BatchSize(len(mask), int(mask.sum()))
    counted = mask.to(dtype)
    if loss_type == "grpo":
        return counted / (whole.completions * counted.sum(1, keepdim=True).clamp(min=1))
    if loss_type == "dr_grpo":
        assert max_completion_length is not None
        return counted / (whole.completions * max_completion_length)
    if loss_type == "dapo":
        return counted / max(whole.tokens, 1)
    return counted / (whole.processes * counted.sum().clamp(min=1))


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    settings: LossSettings,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    selected: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss of some rows of the step's batch.

    Args:
        logp: log π(t_ik) in nats, ``[n, T]``, with a graph.
        old_logp: the same under the policy that sampled, ``[n, T]``.
        advantages: ``[n]``.
        weights: these rows of `token_weights`, ``[n, T]``; tokens of weight zero are left out, whatever they hold.
        settings: clip range, coefficients, and which tokens have a policy-gradient term.
        ref_logp: as ``logp``, under the reference policy, ``[n, T]``; with ``kl_coefficient=0`` it serves the metric
            only.
        entropy: h_ik in nats, ``[n, T]``, with a graph; not looked at with ``entropy_coefficient=0``.
        selected: tokens that Clip-Cov or KL-Cov chose, ``[n, T]``, bool; not looked at without either.

    Returns:
        The rows' part of the loss, and detached sums for metrics.

    Raises:
        ValueError: if shapes disagree, or the settings need one of the last three and it is None.
    """
    _check_arrays(logp, old_logp, advantages, weights, settings, ref_logp, entropy, selected)
    mask = weights > 0
    low, high = 1 - settings.clip_low, 1 + settings.clip_high
    advantage = advantages[:, None]
    chosen = torch.zeros_like(mask) if selected is None else selected
    taught = mask  # tokens with a policy-gradient term
    if settings.advantage_sign != "both":
        taught = taught & (advantage > 0 if settings.advantage_sign == "positive" else advantage < 0)
    if settings.clip_cov_fraction:
        taught = taught & ~chosen
    clippable = taught & ~chosen if settings.kl_cov_fraction else taught
    log_ratio = torch.where(mask, logp - old_logp.detach(), 0.0)
    ratio = torch.where(taught, log_ratio, 0.0).exp()
    token_loss = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    token_loss = torch.where(taught, torch.where(clippable, token_loss, -ratio * advantage), 0.0)
    if settings.kl_cov_fraction:
        token_loss = token_loss + settings.kl_cov_coefficient * torch.where(chosen & mask, log_ratio, 0.0).abs()
    kl = torch.zeros_like(logp)
    if ref_logp is not None:
        ref_ratio = torch.where(mask, ref_logp.detach() - logp, 0.0)
        kl = ref_ratio.exp() - ref_ratio - 1
    # with β = 0 the KL must not reach the graph: an infinite k3 would turn 0 · ∞ into NaN
    if settings.kl_coefficient > 0:
        token_loss = token_loss + settings.kl_coefficient * kl
    if settings.entropy_coefficient > 0:
        assert entropy is not None
        token_loss = token_loss - settings.entropy_coefficient * torch.where(mask, entropy, 0.0)
    return PolicyLoss(
        loss=(weights * token_loss).sum(),
        num_tokens=mask.sum(),
        clipped_low=(clippable & (ratio < low) & (advantage < 0)).sum(),
        clipped_high=(clippable & (ratio > high) & (advantage > 0)).sum(),
        kl_sum=kl.detach().sum(),
    )


def _check_arrays(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    weights: Tensor,
    settings: LossSettings,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    selected: Tensor | None,
) -> None:
    optional = {"ref_logp": ref_logp, "entropy": entropy, "selected": selected}
    given = {name: value for name, value in optional.items() if value is not None}
    shapes = [list(x.shape) for x in (logp, old_logp, weights, *given.values())]
    if logp.ndim != 2 or any(shape != shapes[0] for shape in shapes) or list(advantages.shape) != shapes[0][:1]:
        raise ValueError(
            f"expected {', '.join(['logp', 'old_logp', 'weights', *given])} of one shape [n, T] and advantages [n], "
            f"got {shapes} and {list(advantages.shape)}"
        )
    for name, setting, needed in (
        ("ref_logp", "kl_coefficient", settings.kl_coefficient > 0),
        ("entropy", "entropy_coefficient", settings.entropy_coefficient > 0),
        ("selected", "clip_cov_fraction", settings.clip_cov_fraction > 0),
        ("selected", "kl_cov_fraction", settings.kl_cov_fraction > 0),
    ):
        if needed and name not in given:
            raise ValueError(f"expected {name} with {setting}={getattr(settings, setting)}, got None")


def _check_loss_type(loss_type: str, max_completion_length: int | None) -> None:
    if loss_type not in get_args(LossType):
        raise ValueError(f"expected a loss type out of {list(get_args(LossType))}, got {loss_type!r}")
    if loss_type == "dr_grpo" and (max_completion_length is None or max_completion_length < 1):
        raise ValueError(
            f"expected max_completion_length of at least 1 for loss type 'dr_grpo', got {max_completion_length}"
        )
