"""What groups of completions teach a policy: the batch of one optimizer step, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    select_tokens,
    token_covariance,
    token_weights,
)
from entropy_pl.objectives.losses import BatchSize, OverProcesses
from entropy_pl.policy import evaluation_mode, reference_policy, trainable_parameters
from entropy_pl.policy.micro_batches import compact, default_batch_tokens, micro_batches, over_micro_batches
from entropy_pl.policy.positions import position_boundary
from entropy_pl.policy.score import completion_stats, policy_stats
from entropy_pl.rollout import Rollout, TokenStats


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """What the optimizer steps of one rollout learn from.

    Args:
        rollout: the N rows that take part; none, where other processes alone have something to learn.
        advantages: ``[N]``.
        weights: of each token in the loss, ``[N, T]``; they depend on the whole batch of all processes, not on its
            micro-batches.
        ref_logp: log-probs under the reference policy in nats, ``[N, T]``; None without a KL term.
        selected: tokens that Clip-Cov or KL-Cov chose, ``[N, T]``, bool; None without either.
        old_logp: log-probs at the sampling θ in nats, ``[N, T]``, by which they were chosen; None without either. They
            are of eval mode, where the loss's own π_old is of the first update's forward pass, dropout included.
    """

    rollout: Rollout
    advantages: Tensor
    weights: Tensor
    ref_logp: Tensor | None
    selected: Tensor | None = None
    old_logp: Tensor | None = None


@dataclass(frozen=True)
class PolicyGradient:
    """The clipped policy-gradient loss of a whole U-batch, in micro-batches that add up to it exactly.

    Args:
        loss: loss type, clip range, KL and entropy coefficients, which tokens are taught.
        advantage: how rewards become advantages within a group.
        temperature: of the distribution whose log-probs the loss is made of; None takes each rollout's own.
        max_batch_tokens: padded tokens per micro-batch; None takes what the free memory and the device suggest.
        dtype: of softmax, weights and loss.

    Raises:
        ValueError: for a setting out of range.
    """

    loss: LossSettings
    advantage: AdvantageKind = "mean_std"
    temperature: float | None = None
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
        """Advantages, token weights, reference log-probs and tokens to hold back.

        One pass over the groups for the reference policy, and one for the covariance of tokens, where the loss needs
        them. Clip-Cov draws from the global torch stream.

        Args:
            model: the policy, at the θ that sampled.
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
        if not whole.completions or (self.loss.needs_advantages and not informative):
            return None
        rewards = groups.rewards.to(self.dtype)
        advantages = group_advantages(rewards, groups.size, self.advantage) if len(groups) else rewards
        weights = token_weights(
            mask, self.loss.loss_type, self.loss.max_completion_length, whole=whole, dtype=self.dtype
        )
        if self.loss.kl_coefficient == 0:
            return self.prepared(model, rollout, advantages, weights, total=total)
        with reference_policy(model):
            ref_logp = self._logp(model, rollout)
        return self.prepared(model, rollout, advantages, weights, ref_logp=ref_logp, total=total)

    def prepared(
        self,
        model: nn.Module,
        rollout: Rollout,
        advantages: Tensor,
        weights: Tensor,
        *,
        ref_logp: Tensor | None = None,
        old_logp: Tensor | None = None,
        total: OverProcesses = lambda counts: counts,
    ) -> TrainingBatch:
        """A batch of advantages and weights at hand, with the tokens that this loss holds back.

        Args:
            model: the policy, at the θ that sampled unless ``old_logp`` is given.
            rollout: ``[N, T]``.
            advantages: ``[N]``.
            weights: of each token in the loss, ``[N, T]``.
            ref_logp: log-probs under the reference policy, ``[N, T]``.
            old_logp: log-probs at the sampling θ, ``[N, T]``; None: one pass makes them, where the loss needs them.
            total: as in :meth:`batch`.
        """
        if not self.loss.needs_covariance:
            return TrainingBatch(rollout, advantages, weights, ref_logp)
        mask = rollout.completion_mask
        old_logp = self._logp(model, rollout) if old_logp is None else old_logp
        selected = select_tokens(token_covariance(old_logp, advantages, mask, total), mask, self.loss, total)
        return TrainingBatch(rollout, advantages, weights, ref_logp, selected, old_logp)

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
        for rows, result, stats in self._micro_losses(model, batch, old_logp):
            logp[rows, : stats.logp.shape[1]] = stats.logp.detach()
            call_backward(result.loss)
            on_micro_batch(result, stats)
        return logp

    def gradient(self, model: nn.Module, batch: TrainingBatch, old_logp: Tensor | None = None) -> dict[str, Tensor]:
        """The gradient that :meth:`backward` adds, as tensors; no parameter's ``grad`` is touched.

        Args:
            model: the policy, in whatever mode and autocast the caller chose.
            batch: what to learn; of several processes, this one's part, and so is the gradient.
            old_logp: as in :meth:`backward`.

        Returns:
            By name of the trainable parameters, of their shapes. Micro-batches, each differentiated in the parameters'
            dtype, are added up in float64. A parameter without a part in the loss has zeros.
        """
        parameters = trainable_parameters(model)
        total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
        with torch.enable_grad():
            for _, result, _ in self._micro_losses(model, batch, old_logp):
                gradients = torch.autograd.grad(result.loss, list(parameters.values()), allow_unused=True)
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        total[name] += gradient
        return total

    def coefficients(
        self, batch: TrainingBatch, logp: Tensor, old_logp: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """How the loss depends on every token: its gradient is Σ_ik (a_ik ∇log π(t_ik) + b_ik ∇h_ik).

        Args:
            batch: what is learnt.
            logp: log-probs at θ in nats, ``[N, T]``, as :meth:`backward` returns them.
            old_logp: as in :meth:`backward`.

        Returns:
            a = ∂L/∂log π(t_ik), and b = ∂L/∂h_ik or None without an entropy term; ``[N, T]``, float64, of the loss in
            float64 at these log-probs.
        """

        def wide(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach().double()

        with torch.enable_grad():
            at = logp.detach().double().requires_grad_()
            # The loss is linear in h: where its derivative is taken does not matter.
            entropy = torch.zeros_like(at, requires_grad=True) if self.loss.entropy_coefficient > 0 else None
            result = policy_loss(
                at,
                at.detach() if old_logp is None else old_logp.detach().double(),
                batch.advantages.double(),
                batch.weights.double(),
                self.loss,
                wide(batch.ref_logp),
                entropy,
                batch.selected,
            )
            a, *b = torch.autograd.grad(result.loss, [at] if entropy is None else [at, entropy])
        return a, b[0] if b else None

    def _micro_losses(
        self, model: nn.Module, batch: TrainingBatch, old_logp: Tensor | None
    ) -> Iterator[tuple[Tensor, PolicyLoss, TokenStats]]:
        """Rows, loss and statistics of every micro-batch, with a graph; to be differentiated before the next one."""
        budget = self.max_batch_tokens or default_batch_tokens(model, batch.rollout, graph=True)
        for rows in micro_batches(batch.rollout, budget, position_boundary(model)):
            part = compact(batch.rollout, rows).at_temperature(self.temperature)
            width = part.completion_ids.shape[1]
            stats = policy_stats(
                model,
                part,
                dtype=self.dtype,
                entropy_gradient=self.loss.entropy_coefficient > 0,
            )
            result = policy_loss(
                stats.logp,
                stats.logp.detach() if old_logp is None else old_logp[rows, :width],
                batch.advantages[rows],
                batch.weights[rows, :width],
                self.loss,
                None if batch.ref_logp is None else batch.ref_logp[rows, :width],
                stats.entropy,
                None if batch.selected is None else batch.selected[rows, :width],
            )
            yield rows, result, stats.detach()

    @torch.no_grad()
    def _logp(self, model: nn.Module, rollout: Rollout) -> Tensor:
        """Log-probs in eval mode, in the autocast that the caller chose, ``[N, T]``."""

        def score(part: Rollout) -> tuple[Tensor]:
            return (completion_stats(model, part, self.dtype)[0],)

        with evaluation_mode(model):
            rollout = rollout.at_temperature(self.temperature)
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
