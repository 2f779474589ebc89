"""What attribution needs of the U-batch: its tokens, and how the loss that made the step depends on each of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from entropy_pl.attribution.errors import Divisor
from entropy_pl.attribution.shares import Shares
from entropy_pl.peers import Peers
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch
from entropy_pl.rollout import Rollout


@dataclass(frozen=True, eq=False)
class UpdateBatch:
    """The U-batch of one optimizer step.

    The first three are what :func:`~entropy_pl.attribution.attribute_update` asks for. A module or trainer of one's own
    supplies them by a method ``update_batch()``, called while the step is under way; the others, where it has them,
    serve predictors (``advantages``, ``old_logp``, ``weights``) and counterfactual losses (all of them).

    Args:
        rollout: all completions behind the step, ``[N, P]`` and ``[N, T]``.
        token_coefficients: ∂L/∂log π(t_ik) at the θ of before the step, ``[N, T]``, of the loss L whose gradient the
            optimizer was given, before clipping.
        gradient_scale: the factor that clipping by norm put on that gradient. None, under automatic optimization in
            Lightning: it follows from the gradient's norm before clipping, which the probe reads at the step.
        entropy_coefficients: ∂L/∂h_ik, ``[N, T]``, where the loss has an entropy term.
        divided_by: what the loss is divided by, the number of its ``completions`` or of their ``tokens``; for the error
            bar over U.
        advantages: of every completion, ``[N]``.
        old_logp: log-probs of the policy that sampled, in nats, ``[N, T]``; None: it is the policy of before the step.
        weights: of every token in the loss, ``[N, T]``.
        ref_logp: log-probs of the reference policy, ``[N, T]``.
        policy_gradient: the loss, as settings; None where it is not one of this package's.
        max_grad_norm: what the gradient's norm is clipped to; None: not clipped.

    Raises:
        ValueError: if a shape is not the rollout's.
    """

    rollout: Rollout
    token_coefficients: Tensor = field(repr=False)
    gradient_scale: float | None = 1.0
    entropy_coefficients: Tensor | None = field(default=None, repr=False)
    divided_by: Divisor = "completions"
    advantages: Tensor | None = field(default=None, repr=False)
    old_logp: Tensor | None = field(default=None, repr=False)
    weights: Tensor | None = field(default=None, repr=False)
    ref_logp: Tensor | None = field(default=None, repr=False)
    policy_gradient: PolicyGradient | None = field(default=None, repr=False)
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        shape = self.rollout.completion_mask.shape
        for name in ("token_coefficients", "entropy_coefficients", "old_logp", "weights", "ref_logp"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"expected {name} of the completions' shape {list(shape)}, got {list(value.shape)}")
        if self.advantages is not None and self.advantages.shape != shape[:1]:
            raise ValueError(f"expected one advantage per completion, [{shape[0]}], got {list(self.advantages.shape)}")

    @classmethod
    def of_step(
        cls,
        policy_gradient: PolicyGradient,
        batch: TrainingBatch,
        logp: Tensor,
        old_logp: Tensor | None = None,
        *,
        gradient_scale: float = 1.0,
        max_grad_norm: float | None = None,
    ) -> UpdateBatch:
        """Of a step on one of this package's losses.

        Args:
            policy_gradient: the loss.
            batch: what was learnt.
            logp: log-probs at the θ of before the step, ``[N, T]``, as ``PolicyGradient.backward`` returns them.
            old_logp: log-probs at the sampling θ; None: it is the θ of before the step.
            gradient_scale: the factor that clipping by norm put on the gradient.
            max_grad_norm: what it was clipped to.
        """
        token_coefficients, entropy_coefficients = policy_gradient.coefficients(batch, logp, old_logp)
        return cls(
            batch.rollout,
            token_coefficients,
            gradient_scale=gradient_scale,
            entropy_coefficients=entropy_coefficients,
            divided_by="tokens" if policy_gradient.loss.loss_type in ("dapo", "bnpo") else "completions",
            advantages=batch.advantages,
            old_logp=old_logp,
            weights=batch.weights,
            ref_logp=batch.ref_logp,
            policy_gradient=policy_gradient,
            max_grad_norm=max_grad_norm,
        )

    def gathered(self, peers: Peers) -> UpdateBatch:
        """The whole batch, where each process holds some of its rows; all of them call this."""
        if peers.size == 1:
            return self
        shares = Shares(peers)
        rollouts = peers.exchange(self.rollout.to("cpu"))

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else shares.rows(values)

        advantages = None if self.advantages is None else torch.cat(peers.exchange(self.advantages.cpu()))
        return replace(
            self,
            rollout=Rollout.concatenate(rollouts),
            token_coefficients=shares.rows(self.token_coefficients),
            entropy_coefficients=rows(self.entropy_coefficients),
            advantages=advantages,
            old_logp=rows(self.old_logp),
            weights=rows(self.weights),
            ref_logp=rows(self.ref_logp),
        )
