"""What groups of completions teach a policy: the batch of one optimizer step, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entropy_pl.groups import Groups
from entropy_pl.objectives import (
    AdvantageKind,
    LossSettings,
    PolicyLoss,
    group_advantages,
    policy_loss,
    token_weights,
)
from entropy_pl.objectives.losses import BatchSize
from entropy_pl.policy import evaluation_mode, reference_policy
from entropy_pl.policy.score import compact, default_batch_tokens, micro_batches, over_micro_batches, policy_stats
from entropy_pl.rollout import Rollout, TokenStats

OverProcesses = Callable[[Tensor], Tensor]
"""The sum of a tensor over all processes, which hold one of the same shape each and all come here."""


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What the optimizer steps of one rollout learn from.

    Args:
        rollout: the N rows that take part; none, where other processes alone have something to learn.
        advantages: ``[N]``.
        weights: of each token in the loss, ``[N, T]``; they depend on the whole batch of all processes, not on its
            micro-batches.
        ref_logp: log-probs under the reference policy in nats, ``[N, T]``; None without a KL term.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logp: Tensor | None


@dataclass(frozen=True)
class PolicyGradient:
    """The clipped policy-gradient loss of a whole U-batch, in micro-batches that add up to it exactly.

    Args:
        loss: loss type, clip range, KL coefficient.
        advantage: how rewards become advantages within a group.
        temperature: of the sampling distribution, whose log-probs the loss is made of.
        max_batch_tokens: padded tokens per micro-batch; None bounds the logits' memory.
        dtype: of softmax, weights and loss.

    Raises:
        ValueError: for a setting out of range.
    """

    loss: LossSettings
    advantage: AdvantageKind = "mean_std"
    temperature: float = 1.0
    max_batch_tokens: int | None = None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        group_advantages(torch.zeros(2), 2, self.advantage)  # refuses an unknown kind
        if self.max_batch_tokens is not None and self.max_batch_tokens < 1:
            raise ValueError(
                f"expected max_batch_tokens of at least 1, or None for the default, got {self.max_batch_tokens}"
            )

    def batch(
        self, model: nn.Module, groups: Groups, total: OverProcesses = lambda counts: counts
    ) -> TrainingBatch | None:
        """Advantages, token weights and reference log-probs of the groups.

        Args:
            model: the policy.
            groups: those of this process.
            total: sums over the processes that take the step together, all of which call this method.

        Returns:
            This process's part of the step's batch; None, and then on every process, where there is nothing to learn.
        """
        rollout, mask = groups.rollout, groups.rollout.completion_mask
        mine = [len(mask), int(mask.sum()), int(len(mask) > 0), int((~groups.zero_advantage).sum())]
        *size, informative = total(torch.tensor(mine, device=mask.device)).tolist()
        whole = BatchSize(*size)
        # Without advantages a step would be momentum and weight decay alone.
        if not whole.completions or (self.loss.kl_coefficient == 0 and not informative):
            return None
        rewards = groups.rewards.to(self.dtype)
        advantages = group_advantages(rewards, groups.size, self.advantage) if len(groups) else rewards
        weights = token_weights(
            mask, self.loss.loss_type, self.loss.max_completion_length, whole=whole, dtype=self.dtype
        )
        return TrainingBatch(rollout, advantages, weights, self._reference_logp(model, rollout))

    def backward(
        self,
        model: nn.Module,
        batch: TrainingBatch,
        old_logp: Tensor | None = None,
        *,
        call_backward: Callable[[Tensor], object] = Tensor.backward,
        on_micro_batch: Callable[[PolicyLoss, TokenStats], object] = lambda loss, stats: None,
    ) -> Tensor:
        """Add the loss's gradient to the parameters' ``grad``, in whatever mode and autocast the caller chose.

        Args:
            model: the policy.
            batch: what to learn.
            old_logp: log-probs at the sampling θ in nats, ``[N, T]``; None: θ is the sampling θ.
            call_backward: gets the loss of every micro-batch.
            on_micro_batch: gets its loss with the sums for metrics, and its statistics.

        Returns:
            Log-probs at θ, ``[N, T]``.
        """
        logp = torch.zeros_like(batch.weights)
        for rows in micro_batches(batch.rollout, self.max_batch_tokens or default_batch_tokens(model)):
            part = compact(batch.rollout, rows)
            width = part.completion_ids.shape[1]
            stats = policy_stats(model, part, temperature=self.temperature, dtype=self.dtype)
            logp[rows, :width] = stats.logp.detach()
            result = policy_loss(
                stats.logp,
                stats.logp.detach() if old_logp is None else old_logp[rows, :width],
                batch.advantages[rows],
                batch.weights[rows, :width],
                self.loss,
                None if batch.ref_logp is None else batch.ref_logp[rows, :width],
            )
            call_backward(result.loss)
            on_micro_batch(result, stats)
        return logp

    @torch.no_grad()
    def _reference_logp(self, model: nn.Module, rollout: Rollout) -> Tensor | None:
        if self.loss.kl_coefficient == 0:
            return None

        def score(part: Rollout) -> tuple[Tensor]:
            stats = policy_stats(model, part, temperature=self.temperature, dtype=self.dtype)
            return (stats.logp[part.completion_mask],)

        with reference_policy(model), evaluation_mode(model):
            [logp] = over_micro_batches(model, rollout, score, outputs=1, max_batch_tokens=self.max_batch_tokens)
        return logp.to(self.dtype)


def sum_gradients(parameters: Iterable[nn.Parameter], total: OverProcesses) -> None:
    """Replace every gradient by its sum over processes.

    A gradient that is None counts as zero, unless it is None on all processes and so stays None: an optimizer then
    leaves the parameter alone, as it would in one process.

    Args:
        parameters: the same on all processes, in the same order.
        total: sums over the processes, all of which call this function.
    """
    parameters = list(parameters)
    if not parameters:
        return
    held = torch.tensor([int(p.grad is not None) for p in parameters], device=parameters[0].device)
    gradients: dict[torch.dtype, list[Tensor]] = {}  # in the order of the parameters, which a set would not keep
    for parameter, holders in zip(parameters, total(held).tolist(), strict=True):
        if holders:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.setdefault(parameter.dtype, []).append(parameter.grad)
    for same_dtype in gradients.values():  # few and large messages
        summed = total(torch.cat([gradient.flatten() for gradient in same_dtype]))
        parts = summed.split([gradient.numel() for gradient in same_dtype])
        for gradient, values in zip(same_dtype, parts, strict=True):
            gradient.copy_(values.view_as(gradient))
