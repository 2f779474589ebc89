"""Optimizer steps on a U-batch whose loss is written as a loop, with everything attribution is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from tiny import build_model
from torch import Tensor, nn

from entropy_pl.policy.precision import float64_evaluation
from entropy_pl.rollout import Rollout
from entropy_pl.updates import UpdateVector, record_update

N, G, T = 6, 3, 5  # completions, of a prompt each G, tokens
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "adam_l2": lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, dampening=0.3, weight_decay=0.1),
}


@dataclass
class Step:
    """One step, taken: the model is at the θ of before it."""

    model: nn.Module
    e: Rollout
    u: Rollout
    update: UpdateVector
    coefficients: Tensor
    scale: float
    loss: Loss


def random_rollout(rows: int, per_prompt: int, seed: int, vocabulary: int = 20, width: int = T) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(4, vocabulary, (rows // per_prompt, 4), generator=generator)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    return Rollout(
        prompts.repeat_interleave(per_prompt, 0),
        torch.ones(rows, 4, dtype=torch.bool),
        torch.randint(4, vocabulary, (rows, width), generator=generator) * mask,
        mask,
    )


def log_probs(model: nn.Module, rollout: Rollout) -> Tensor:
    """log π of every completion token, [N, T], one plain forward pass: prompts have no padding here."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    logits = model(input_ids=ids).logits[:, rollout.prompt_ids.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(2, rollout.completion_ids[..., None])[..., 0]


@dataclass
class Loss:
    """The GRPO family's loss, token by token, clipped at 1 ± 0.2."""

    old: Tensor
    ref: Tensor
    advantages: Tensor
    mask: Tensor
    loss_type: str
    beta: float

    def term(self, logp: Tensor, i: int, k: int) -> Tensor:
        """ℓ_ik, given the log-prob of that token."""
        ratio = (logp - self.old[i, k]).exp()
        term = -torch.minimum(ratio * self.advantages[i], ratio.clamp(0.8, 1.2) * self.advantages[i])
        log_ratio = self.ref[i, k] - logp
        term = term + self.beta * (log_ratio.exp() - log_ratio - 1)
        count, length = len(self.mask), int(self.mask[i].sum())
        return term / {"grpo": count * length, "dr_grpo": count * T, "dapo": int(self.mask.sum())}[self.loss_type]

    def total(self, logp: Tensor) -> Tensor:
        return sum(
            (self.term(logp[i, k], i, k) for i, k in self.mask.nonzero().tolist()),
            torch.zeros((), dtype=torch.float64),
        )

    def select(self, rows: Tensor) -> Loss:
        """Of these completions, as if there were no others."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("old", "ref", "advantages", "mask")})


def take_steps(
    *,
    loss_type: str = "grpo",
    optimizer: str = "adamw",
    max_norm: float | None = None,
    beta: float = 0.0,
    steps: int = 2,
    updates_per_rollout: int = 1,
    max_value: float | None = None,
    entropy_bonus: float = 0.0,
) -> Step:
    """Take ``steps`` steps in float64 on fresh rollouts and return the last, put back to the θ of before it.

    With ``updates_per_rollout`` > 1 the last step's U-batch was sampled by an older policy.
    """
    model = build_model(seed=1, vocab_size=20).double()
    chosen = OPTIMIZERS[optimizer](model.parameters())
    with float64_evaluation(model):
        for step in range(steps):
            if step % updates_per_rollout == 0:
                u = random_rollout(N, G, seed=step)
                advantages = torch.randn(N, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
                with torch.no_grad():
                    old = log_probs(model, u)
            theta = {name: p.detach().clone() for name, p in model.named_parameters()}
            logp = log_probs(model, u)
            logp.retain_grad()
            loss = Loss(old, old - 0.3, advantages, u.completion_mask, loss_type, beta)
            value = loss.total(logp)
            if entropy_bonus:
                value = value - entropy_bonus * mean_entropy(model, u)
            chosen.zero_grad()
            value.backward()
            coefficients, scale = logp.grad, 1.0
            if max_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                scale = float((max_norm / (norm + 1e-6)).clamp(max=1.0))
            if max_value is not None:
                torch.nn.utils.clip_grad_value_(model.parameters(), max_value)
            with record_update(model, chosen) as recorder:
                chosen.step()
    for name, parameter in model.named_parameters():
        parameter.data = theta[name]
    return Step(model, random_rollout(8, 1, seed=100), u, recorder.update, coefficients, scale, loss)


def direction_of(step: Step, value: Tensor) -> UpdateVector:
    """−c P∘∇value, the step per unit η that a term of the loss asked for."""
    assert step.update.preconditioner is not None
    names = list(step.update.preconditioner)
    parameters = dict(step.model.named_parameters())
    gradients = torch.autograd.grad(value, [parameters[name] for name in names])
    return UpdateVector(
        {
            name: -step.scale * step.update.preconditioner[name] * gradient
            for name, gradient in zip(names, gradients, strict=True)
        },
        lr=0.0,
    )


def direction_of_sequence(step: Step, row: int) -> UpdateVector:
    """v_u, of one completion's terms."""
    logp = log_probs(step.model, step.u)
    terms = [step.loss.term(logp[row, k], row, k) for k in range(int(step.u.completion_mask[row].sum()))]
    return direction_of(step, sum(terms, torch.zeros((), dtype=torch.float64)))


class Passes:
    """Counts what goes through a model: forward passes, and how many sequences each had."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: list[int] = []
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.rows.append(len(kwargs["input_ids"])), with_kwargs=True
        )


def mean_entropy(model: nn.Module, rollout: Rollout) -> Tensor:
    """Mean entropy over completion tokens."""
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], 1)
    log_p = model(input_ids=ids).logits[:, rollout.prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)[rollout.completion_mask].mean()
