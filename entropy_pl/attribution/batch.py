"""What attribution needs of the U-batch: its tokens, and how the loss that made the step depends on each of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from entropy_pl.attribution.errors import Divisor
from entropy_pl.attribution.shares import Shares
from entropy_pl.peers import Peers
from entropy_pl.policy_gradient import PolicyGradient
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
            Lightning: the probe takes it from the step, the gradient's norm after clipping over the one before.
        entropy_coefficients: ∂L/∂h_ik, ``[N, T]``, where the loss has an entropy term.
        divided_by: what the loss is divided by, the number of its ``completions`` or of their ``tokens``; for the error
            bar over U.
        advantages: of every completion, ``[N]``.
        old_logp: log-probs of the policy that sampled, in nats, ``[N, T]``; None: it is the policy of before the step.
        weights: of every token in the loss, ``[N, T]``.
        ref_logp: log-probs of the reference policy, ``[N, T]``.
        policy_gradient: the loss, as settings; None where it is not one of this package's.
        max_grad_norm: what the gradient's norm is clipped to; None: not clipped.
        selected: tokens that a covariance intervention chose, ``[N, T]``.

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
    selected: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = self.rollout.completion_mask.shape
        for name in ("token_coefficients", "entropy_coefficients", "old_logp", "weights", "ref_logp", "selected"):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(f"expected {name} of the completions' shape {list(shape)}, got {list(value.shape)}")
        if self.advantages is not None and self.advantages.shape != shape[:1]:
            raise ValueError(f"expected one advantage per completion, [{shape[0]}], got {list(self.advantages.shape)}")

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
            selected=rows(self.selected),
        )
