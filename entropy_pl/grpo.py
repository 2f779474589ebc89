"""Group relative policy optimization as a LightningModule: sample, reward, compare within the group, step.

What is simple here, on purpose:

* The loop is plain autograd on whole copies of the policy: one device, or DDP.
* Every update of a rollout uses all of it: ``updates_per_rollout`` counts epochs over the rollout, not mini-batches.
* The policy that sampled is the policy at the first update, and its log-probs are read off that update's own forward
  pass. They are of the full distribution at the sampling temperature: ``top_p`` and ``top_k`` narrow the sampling
  alone, so that with them the ratio π/π_old still starts at 1 but sampled tokens are not quite π's.
* The reference policy is the same model with its adapter off.
* Completions cut off at ``max_new_tokens`` are scored and trained on like the others.

The random numbers of a rollout depend on the seed, on the number of rollouts before it and on the process's rank, and
on nothing else: a resumed run draws what it would have drawn, and callbacks cannot change it.

Under DDP every process answers prompts of its own, and W processes take the step that one process would take on all
their completions together::

    L = Σ_r Σ_ik w_ik ℓ_ik,    ∇L = Σ_r ∇L_r    (r: process; the sums within are over its completions i and tokens k)

where the weights w_ik are normalised over the completions of all processes (see `objectives.losses`; ``bnpo`` is
defined by process). Each process adds up the gradients of its own micro-batches, as many as they are, and one sum over
processes follows before the step. DDP's own averaging, which wants equally many backward passes everywhere, is off.
Whatever decides what comes next is summed over processes first: whether there is something to learn, and so whether a
step is taken, a rollout was idle, the run is over. A process that has nothing to learn when another has takes the
step all the same, with a gradient of zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torchmetrics import MeanMetric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_pl.attribution import UpdateBatch
from entropy_pl.data.batch import PromptBatch
from entropy_pl.data.datamodule import PromptDataModule
from entropy_pl.data.registry import format_prompt
from entropy_pl.groups import Groups, GroupSampler, ZeroAdvantage
from entropy_pl.objectives import AdvantageKind, AdvantageSign, LossSettings, LossType, PolicyLoss, RewardSum
from entropy_pl.policy import (
    Policy,
    PolicySettings,
    isolated_rng,
    load_policy_from,
    reference_policy,
    trainable_parameters,
)
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch, sum_gradients
from entropy_pl.progress import parts_shown
from entropy_pl.rollout import TokenStats
from entropy_pl.strategies import holds_whole_policy
from entropy_pl.updates.clipping import clip_factor

METRICS = (
    "reward",
    "completion_length",
    "truncated_fraction",
    "zero_advantage_fraction",
    "entropy",
    "kl",
    "clip_fraction",
    "grad_norm",
    "lr",
)


class GRPOModule(LightningModule):
    """GRPO and its relatives (Dr. GRPO, DAPO, BNPO) on a causal language model, usually with a LoRA adapter.

    One training step takes a batch of prompts, samples a group of G completions for each, turns their rewards into
    advantages over the group, and takes ``updates_per_rollout`` optimizer steps on the clipped policy-gradient loss.
    See ``objectives`` for the formulas. Under ``Trainer(strategy="ddp")`` the batch of a step is that of all processes.

    Logged once per rollout, under ``train/``, over all processes: reward (weighted sum) and reward_<name>,
    completion_length (tokens), truncated_fraction (completions without an end token) and zero_advantage_fraction
    (groups of equal rewards), all of the first draw, before filtering or resampling; entropy (nats per trained token,
    at the sampling θ), kl (nats per token, where there is a reference), clip_fraction, grad_norm (before clipping) and
    lr, as means over the updates.

    Args:
        policy: the policy to load; from code also a ready `Policy`, which is used as it is.
        num_generations: G, completions per prompt; at least 2.
        max_new_tokens: largest number of tokens in a completion.
        temperature: of sampling, and of the log-probs in the loss.
        top_p: sample from the smallest set of tokens with this probability; 1 keeps all.
        top_k: sample from the k likeliest tokens; None keeps all.
        rewards: names of registered rewards (`format`, `numeric_answer`, or your own).
        reward_weights: one per reward; None: 1 each.
        advantage: `mean_std` (GRPO), `mean` (Dr. GRPO) or `leave_one_out` (RLOO).
        loss_type: how tokens are weighted: `grpo`, `dr_grpo`, `dapo` or `bnpo`.
        clip_low: the ratio of new to old probability is clipped at 1 - clip_low.
        clip_high: and at 1 + clip_high.
        kl_coefficient: weight of the KL divergence to the reference policy (adapter off); 0 needs no reference.
        entropy_coefficient: weight of the entropy bonus, the mean entropy of the tokens (averaged as `loss_type` says);
            0 has none.
        advantage_sign: completions of which advantages the policy gradient is of: `both`, `positive` or `negative`. The
            others count in the loss's average, and in its KL and entropy terms.
        clip_cov_fraction: Clip-Cov (arXiv 2505.22617): this share of the tokens, drawn anew for every rollout among
            those whose covariance of log-prob and advantage lies inside clip_cov_bounds, has no policy gradient; 0
            switches it off, the paper's is 0.0002. It costs one more pass over the rollout.
        clip_cov_bounds: smallest and largest covariance, in nats.
        kl_cov_fraction: KL-Cov (same paper): the share of tokens with the largest covariance that pays for leaving the
            policy that sampled, unclipped; 0 switches it off, the paper's is 0.002. It costs one more pass, and without
            a second update per rollout it changes nothing.
        kl_cov_coefficient: their price, per nat of `|log(π/π_old)|`.
        updates_per_rollout: optimizer steps on each rollout.
        max_batch_tokens: padded tokens per forward pass in training; bounds memory, does not change the result (but for
            dropout's masks). None bounds the logits' memory.
        sample_batch_size: completions sampled at once; None takes up to 256.
        zero_advantage: what becomes of groups whose rewards are all equal. `keep`: they count in the loss's average
            (and in the KL term). `filter`: they are dropped, and the average is over the rest. `resample`: their
            prompts are answered anew, up to max_resamples times, then what is left is dropped. Drawing until rewards
            differ favours prompts of middling difficulty. A rollout without any advantage takes no optimizer step,
            unless it is kept and there is a KL or an entropy term. Each process filters and resamples for itself.
        max_resamples: rounds of resampling.
        max_idle_rollouts: training stops, and says so, after this many rollouts in a row without an advantage: the
            rewards are all equal, nothing is learnt, and `max_steps` would never come.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        optimizer: gets the trainable parameters, never the frozen base model.
        scheduler: of the learning rate, stepped once per optimizer step; None keeps it constant.
        seed: of the new adapter and of all sampling.

    Raises:
        ValueError: for a setting out of range, an unknown name, or weights that do not pair up with the rewards.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(
        self,
        policy: PolicySettings,  # not `| Policy`: the command line could then not show the settings one by one
        num_generations: int = 8,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        rewards: list[str] = ["format", "numeric_answer"],  # noqa: B006  # never written to
        reward_weights: list[float] | None = None,
        advantage: AdvantageKind = "mean_std",
        loss_type: LossType = "grpo",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        kl_coefficient: float = 0.0,
        entropy_coefficient: float = 0.0,
        advantage_sign: AdvantageSign = "both",
        clip_cov_fraction: float = 0.0,
        clip_cov_bounds: tuple[float, float] = (1.0, 5.0),
        kl_cov_fraction: float = 0.0,
        kl_cov_coefficient: float = 1.0,
        updates_per_rollout: int = 1,
        max_batch_tokens: int | None = None,
        sample_batch_size: int | None = None,
        zero_advantage: ZeroAdvantage = "keep",
        max_resamples: int = 2,
        max_idle_rollouts: int = 50,
        max_grad_norm: float | None = 1.0,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        scheduler: LRSchedulerCallable | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # a checkpoint lacks the frozen base; `on_load_checkpoint` asks for the rest
        self.save_hyperparameters(ignore=["policy", "optimizer", "scheduler"])
        _check(updates_per_rollout, max_idle_rollouts, max_grad_norm, seed)
        reward = RewardSum(rewards, reward_weights)
        self.sampler = GroupSampler(
            reward,
            num_generations,
            max_new_tokens,
            temperature,
            top_p,
            top_k,
            sample_batch_size,
            zero_advantage,
            max_resamples,
        )
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        loss = LossSettings(
            loss_type,
            clip_low,
            clip_high,
            kl_coefficient,
            max_completion_length=max_new_tokens,
            entropy_coefficient=entropy_coefficient,
            advantage_sign=advantage_sign,
            clip_cov_fraction=clip_cov_fraction,
            clip_cov_bounds=clip_cov_bounds,
            kl_cov_fraction=kl_cov_fraction,
            kl_cov_coefficient=kl_cov_coefficient,
        )
        self.policy_gradient = PolicyGradient(loss, advantage, temperature, max_batch_tokens)
        self.updates_per_rollout = updates_per_rollout
        self.max_grad_norm = max_grad_norm
        self.optimizer, self.scheduler = optimizer, scheduler
        self.seed = seed
        self.max_idle_rollouts = max_idle_rollouts
        self.rollouts_done = self.idle_rollouts = 0
        self.metrics = nn.ModuleDict(
            {name: MeanMetric() for name in (*METRICS, *(f"reward_{name}" for name in reward.rewards))}
        )
        self._restored: Mapping[str, Tensor] = {}
        self._taken: tuple[TrainingBatch, Tensor | None, Tensor] | None = None  # what the step under way is made of
        self._gradient_norm: Tensor | None = None  # before clipping
        self._policy_settings = policy
        if isinstance(policy, Policy):
            self.model, self.tokenizer = policy

    # ------------------------------------------------------------------------------------------------ setting up

    def setup(self, stage: str) -> None:
        """Refuse what the loop cannot do."""
        _check_strategy(self.trainer.strategy)

    def configure_model(self) -> None:
        """Load the policy, once."""
        if not hasattr(self, "model"):
            with isolated_rng(self.seed):  # a new adapter is drawn at random
                self.model, self.tokenizer = load_policy_from(self._policy_settings)
        if self.policy_gradient.loss.kl_coefficient > 0:
            with reference_policy(self.model):
                pass  # a policy without a reference is refused now, not after the first rollout

    def configure_optimizers(self) -> Any:
        """The optimizer over the trainable parameters, which are held in float32 whatever the Trainer's precision."""
        for name, parameter in trainable_parameters(self.model).items():
            if parameter.dtype in (torch.bfloat16, torch.float16):  # half-precision weights swallow small updates
                parameter.data = parameter.data.float()
                if f"model.{name}" in self._restored:  # rounded on its way here
                    parameter.data.copy_(self._restored[f"model.{name}"])
        self._restored = {}
        optimizer = self.optimizer(trainable_parameters(self.model).values())
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise MisconfigurationException(
                "expected a scheduler that steps without a metric, got ReduceLROnPlateau: use CosineAnnealingLR, say"
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --------------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """Dropout, if there is any, is active in the loss; sampling switches it off for itself."""
        self.model.train()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One rollout and the optimizer steps on it."""
        shown = getattr(self.trainer.progress_bar_callback, "is_enabled", False)
        with isolated_rng(self._rollout_seed()), self._local_gradients(), parts_shown(shown):
            training_batch = self._collect(batch)
            self._count_idle(training_batch is None)
            if training_batch is not None:
                old_logp = None
                for _ in range(self.updates_per_rollout):
                    if self.trainer.global_step == self.trainer.max_steps:
                        break
                    logp = self._update(training_batch, old_logp)
                    old_logp = logp if old_logp is None else old_logp
        self.rollouts_done += 1
        self._log_metrics()

    def _rollout_seed(self) -> int:
        rank = self.trainer.global_rank
        entropy = [self.seed, self.rollouts_done, *([rank] if rank else [])]  # rank 0 draws what one process draws
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    @contextmanager
    def _local_gradients(self) -> Iterator[None]:
        """Keep DDP from averaging gradients in every backward pass, of which processes have different numbers."""
        wrapped = self.trainer.strategy.model
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext():
            yield

    def _over_processes(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place; all must come here. One process has it already."""
        return cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="sum"))

    def _count_idle(self, idle: bool) -> None:
        self.idle_rollouts = self.idle_rollouts + 1 if idle else 0
        if self.idle_rollouts >= self.max_idle_rollouts:
            rank_zero_warn(
                f"training stops at optimizer step {self.trainer.global_step}: {self.idle_rollouts} rollouts in a row "
                "had no group with different rewards. The task may be too hard or too easy for the policy, or its "
                "entropy is gone; raise max_idle_rollouts to go on looking"
            )
            self.trainer.should_stop = True

    def _collect(self, batch: PromptBatch) -> TrainingBatch | None:
        """Answer the prompts, deal with groups that teach nothing, and prepare the loss.

        None, in all processes: none has anything to learn.
        """
        with self._outside_autocast():  # which would cast every weight anew for every token
            groups = self.sampler.draw(self.model, self.tokenizer, batch)
            self._log_draw(groups)
            groups = self.sampler.informative(self.model, self.tokenizer, batch, groups)
        return self.policy_gradient.batch(self.model, groups, self._over_processes)

    def _update(self, batch: TrainingBatch, old_logp: Tensor | None) -> Tensor:
        """Take one optimizer step.

        Args:
            batch: what to learn.
            old_logp: log-probs at the sampling θ in nats, ``[N, T]``; None: θ is the sampling θ.

        Returns:
            Log-probs at the θ before the step, ``[N, T]``.
        """
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()

        def backward(loss: Tensor) -> None:
            with self._outside_autocast():
                self.manual_backward(loss)

        def record(result: PolicyLoss, stats: TokenStats) -> None:
            tokens = result.num_tokens
            if old_logp is None:
                self._record("entropy", stats.entropy.sum() / tokens, tokens)
            if batch.ref_logp is not None:
                self._record("kl", result.kl_sum / tokens, tokens)
            self._record("clip_fraction", (result.clipped_low + result.clipped_high) / tokens, tokens)

        logp = self.policy_gradient.backward(self.model, batch, old_logp, call_backward=backward, on_micro_batch=record)
        if not len(batch.rollout):  # a gradient scaler refuses to step before it has scaled a loss
            backward(torch.zeros((), device=self.device, requires_grad=True))
        if self.trainer.world_size > 1:
            # here, and not in the hook below: by then a scaler has looked for overflow, and all must find the same
            sum_gradients(trainable_parameters(self.model).values(), self._over_processes)
        self._record("lr", max(float(group["lr"]) for group in optimizer.param_groups))
        self._taken = batch, old_logp, logp
        try:
            with self._outside_autocast():
                optimizer.step()
        finally:
            self._taken = self._gradient_norm = None
        scheduler = self.lr_schedulers()
        if isinstance(scheduler, LRScheduler):
            scheduler.step()
        return logp

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip the gradients: here they are complete, over all processes, and, under 16-mixed, no longer scaled."""
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        norm = nn.utils.clip_grad_norm_(trainable_parameters(self.model).values(), limit)
        self._gradient_norm = norm
        if norm.isfinite():  # under 16-mixed an overflow skips the step
            self._record("grad_norm", norm)

    # ------------------------------------------------------------------------------------------------ what probes ask

    def update_batch(self) -> UpdateBatch | None:
        """This process's part of the batch behind the optimizer step under way, and how its loss depends on each token.

        To be called from a hook on the optimizer's step; None at any other time. Nothing is kept for it but references,
        and nothing is read from the device before it is called.
        """
        if self._taken is None or self._gradient_norm is None:
            return None
        batch, old_logp, logp = self._taken
        limit = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        scale = clip_factor(self._gradient_norm, limit)
        return UpdateBatch.of_step(
            self.policy_gradient,
            batch,
            logp,
            old_logp,
            gradient_scale=float(scale),
            max_grad_norm=self.max_grad_norm,
        )

    def rewards_of(self, prompts: list[str], completions: list[str]) -> Tensor | None:
        """The run's reward, the weighted sum, of completions of E prompts.

        Args:
            prompts: formatted, one per completion.
            completions: decoded, without special tokens.

        Returns:
            ``[N]``, float32, on the CPU. None where the Trainer has no `PromptDataModule`, or it does not know the
            answer to a prompt, since the prompt is not one of its E prompts.

        Raises:
            ValueError: if the lengths differ.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if not isinstance(datamodule, PromptDataModule):
            return None
        answers = {format_prompt(datamodule.template, e.question): e.answer for e in datamodule.e_examples}
        if not answers.keys() >= set(prompts):
            return None
        total, _ = self.sampler.reward(completions, [answers[prompt] for prompt in prompts])
        return total

    @contextmanager
    def _outside_autocast(self) -> Iterator[None]:
        """Sampling in the weights' own precision; backward, step and hooks as under automatic optimization."""
        default = torch.get_default_dtype()  # bfloat16 under bf16-true
        torch.set_default_dtype(torch.float32)
        try:
            with torch.autocast(self.device.type, enabled=False):
                yield
        finally:
            torch.set_default_dtype(default)

    # ---------------------------------------------------------------------------------------------------- logging

    def _log_draw(self, groups: Groups) -> None:
        """Log what the rollout is like; before the first step, so that hooks on the step find it."""
        for name, values in groups.reward_parts.items():
            self._record(f"reward_{name}", values)
        self._record("reward", groups.rewards)
        self._record("completion_length", groups.rollout.completion_lengths)
        self._record("truncated_fraction", groups.truncated)
        self._record("zero_advantage_fraction", groups.zero_advantage)
        self._log_metrics()

    def _record(self, name: str, value: Tensor | float, weight: Tensor | float = 1.0) -> None:
        cast(MeanMetric, self.metrics[name]).update(value, weight)

    def _log_metrics(self) -> None:
        """Log every metric that has seen something in any process, and start it afresh.

        ``step`` is the loggers' x-axis: the last optimizer step taken, counted from 0 as the probe counts them, where
        Lightning's own would be the number of batches.
        """
        self.log("step", float(max(self.trainer.global_step - 1, 0)), on_step=True, on_epoch=False)
        metrics = [cast(MeanMetric, metric) for metric in self.metrics.values()]
        # Not by their own `compute`: a process without anything to learn has not seen what the others have.
        sums = self._over_processes(torch.stack([torch.stack([m.mean_value, m.weight]) for m in metrics]))
        seen = (sums[:, 1] > 0).tolist()
        for name, metric, (value, weight), anything in zip(self.metrics, metrics, sums, seen, strict=True):
            metric.reset()
            if anything:
                self.log(f"train/{name}", value / weight, on_step=True, on_epoch=False, prog_bar=name == "reward")

    # ------------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trainable parameters only: the frozen base is where it was loaded from, and that is kept too."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: state[key] for key in self._trainable_keys()}
        if isinstance(self._policy_settings, PolicySettings):
            checkpoint["policy"] = asdict(self._policy_settings)
        checkpoint["rollouts_done"] = self.rollouts_done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that every trainable parameter is there.

        Raises:
            ValueError: if the checkpoint is of another policy, or of other LoRA settings: other names or shapes.
        """
        self.configure_model()  # `load_from_checkpoint` comes here first
        saved, wanted = set(checkpoint["state_dict"]), set(self._trainable_keys())
        if saved != wanted:
            raise ValueError(
                f"expected a checkpoint with the policy's {len(wanted)} trainable parameters, got one that lacks "
                f"{len(wanted - saved)} of them and has {len(saved - wanted)} others, e.g. {min(saved ^ wanted)}: "
                "resume with the policy and LoRA settings it was saved with"
            )
        current = {f"model.{name}": parameter for name, parameter in trainable_parameters(self.model).items()}
        for key, value in checkpoint["state_dict"].items():
            if value.shape != current[key].shape:
                raise ValueError(
                    f"expected a checkpoint of parameters in the policy's shapes, got {list(value.shape)} instead of "
                    f"{list(current[key].shape)} for {key}: resume with the policy and LoRA settings it was saved with"
                )
        self._restored = checkpoint["state_dict"]
        self.rollouts_done = checkpoint["rollouts_done"]

    def _trainable_keys(self) -> list[str]:
        return [f"model.{name}" for name in trainable_parameters(self.model)]


def _check_strategy(strategy: Strategy) -> None:
    if not (holds_whole_policy(strategy) or isinstance(strategy, SingleDeviceStrategy)):
        raise MisconfigurationException(
            f"expected one device, or DDP on several, got {type(strategy).__name__}: GRPOModule wants the whole policy "
            "on every device; set Trainer(strategy='ddp'), or devices=1 and strategy='auto'"
        )
    # Both are for DDP's own averaging of gradients, which is off: the one fails in it, the other would never be called.
    static = getattr(strategy, "_ddp_kwargs", {}).get("static_graph", False)
    if static or getattr(strategy, "_ddp_comm_hook", None) is not None:
        raise MisconfigurationException(
            f"expected DDP without {'static_graph' if static else 'ddp_comm_hook'}, got one with it: GRPOModule sums "
            "gradients over processes itself, once a step; leave it out of DDPStrategy(...)"
        )


def _check(
    updates_per_rollout: int,
    max_idle_rollouts: int,
    max_grad_norm: float | None,
    seed: int,
) -> None:
    if max_idle_rollouts < 1:
        raise ValueError(f"expected max_idle_rollouts of at least 1, got {max_idle_rollouts}")
    if updates_per_rollout < 1:
        raise ValueError(f"expected updates_per_rollout of at least 1, got {updates_per_rollout}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"expected max_grad_norm above 0, or None for no clipping, got {max_grad_norm}")
    if seed < 0:
        raise ValueError(f"expected a seed of at least 0, got {seed}")
