"""The U-batch of a TRL trainer's optimizer step, kept as its micro-batches go by.

Of the loss nothing is assumed but that it is made of the log-probs, and maybe the entropies, of the trainer's own
``_get_per_token_logps_and_entropies``: ∂L/∂log π(t) is what autograd hands back to them, whatever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_pl.attribution import UpdateBatch
from entropy_pl.objectives import LossSettings, token_weights
from entropy_pl.policy_gradient import PolicyGradient, TrainingBatch
from entropy_pl.rollout import Rollout
from entropy_pl.updates.clipping import clip_factor

SCORING = "_get_per_token_logps_and_entropies"
PER_TOKEN = ("bnpo", "dapo", "cispo", "vespo")  # TRL's losses that are divided by a number of tokens
OURS = ("grpo", "dr_grpo", "bnpo", "dapo")
ROLLOUT = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
KEPT = (*ROLLOUT, "tool_mask", "advantages", "old_per_token_logps", "ref_per_token_logps", "num_items_in_batch")
ROUNDINGS = 32  # of the log-probs' dtype: what a loss is allowed that is computed in another order


@dataclass(eq=False)
class _MicroBatch:
    """What one call of ``compute_loss`` was given, and what its backward pass found; the loss scaler's scale in it."""

    inputs: dict[str, Tensor]
    logp: Tensor | None = None
    by_logp: Tensor | None = None
    by_entropy: Tensor | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def rollout(self) -> Rollout:
        return Rollout(**{name: self.inputs[name] for name in ROLLOUT}, temperature=self.temperature)

    @property
    def mask(self) -> Tensor:
        """Tokens in the loss: without those that a tool wrote."""
        mask = self.inputs["completion_mask"].bool()
        return mask & self.inputs["tool_mask"].bool() if "tool_mask" in self.inputs else mask


class StepCapture:
    """Keeps what the steps to be probed are made of; nothing of the others.

    Three methods are wrapped, of these very objects and until :meth:`close`: the trainer's ``compute_loss`` and
    ``_get_per_token_logps_and_entropies``, and its accelerator's ``clip_grad_norm_``. They return what they returned
    before, and what goes wrong in here goes wrong for :meth:`update_batch` alone.

    Args:
        trainer: TRL's GRPOTrainer, or another with these methods.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._watching = False
        self._parts: list[_MicroBatch] = []
        self._present: _MicroBatch | None = None
        self._clipped: list[tuple[Any, float]] = []  # norms before clipping, and what they were clipped to
        self._failure: Exception | None = None
        self._undo = [
            _replace(trainer, "compute_loss", self._computing_loss),
            _replace(trainer, SCORING, self._scoring),
            _replace(trainer.accelerator, "clip_grad_norm_", self._clipping),
        ]

    def close(self) -> None:
        """Leave the trainer as it was; a second call does nothing."""
        self.begin(False)
        while self._undo:
            self._undo.pop()()

    def begin(self, watching: bool) -> None:
        """Forget the step before.

        Args:
            watching: whether the step that begins is kept.
        """
        self._watching = watching
        self._parts, self._clipped = [], []
        self._present = self._failure = None

    def update_batch(self) -> UpdateBatch:
        """This process's part of the U-batch; to be called between the step's last backward pass and the next step.

        Raises:
            ValueError: if the step has not been watched, or is of a kind that log-probs alone do not tell.
        """
        if self._failure is not None:
            raise self._failure
        parts = [part for part in self._parts if part.by_logp is not None]
        if not parts:
            raise ValueError(
                f"expected a loss made of the log-probs of {type(self._trainer).__name__}.{SCORING}, got none in this "
                "step that a gradient went back to"
            )
        by_entropy = None
        if any(part.by_entropy is not None for part in parts):
            by_entropy = _rows([self._handed_back(part, part.by_entropy) for part in parts])
        limit = self._trainer.args.max_grad_norm or None
        advantages, old_logp, ref_logp = (
            _kept(parts, name) for name in ("advantages", "old_per_token_logps", "ref_per_token_logps")
        )
        batch = UpdateBatch(
            Rollout.concatenate([part.rollout for part in parts]),
            _rows([self._handed_back(part, part.by_logp) for part in parts]),
            gradient_scale=self._gradient_scale(limit),
            entropy_coefficients=by_entropy,
            divided_by="tokens" if getattr(self._trainer, "loss_type", None) in PER_TOKEN else "completions",
            advantages=torch.cat(advantages) if advantages and advantages[0].ndim == 1 else None,
            old_logp=_rows(old_logp) if old_logp else None,
            ref_logp=_rows(ref_logp) if ref_logp else None,
            max_grad_norm=limit,
        )
        return self._with_loss(batch, parts)

    # ---------------------------------------------------------------------------------------- in the trainer's methods

    def _computing_loss(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not (self._watching and torch.is_grad_enabled()):
            return original(*args, **kwargs)
        try:
            self._present = _micro_batch(self._trainer, *args, **kwargs)
        except Exception as error:
            self._failure = error
        try:
            return original(*args, **kwargs)
        finally:
            self._present = None

    def _scoring(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        part = self._present
        if part is not None:
            try:
                self._watch(part, *found[:2])
            except Exception as error:
                self._failure = error
        return found

    def _clipping(self, original: Callable[..., Any], parameters: Any, max_norm: float, *args: Any, **kw: Any) -> Any:
        norm = original(parameters, max_norm, *args, **kw)
        if self._watching:
            self._clipped.append((norm, max_norm))
        return norm

    def _watch(self, part: _MicroBatch, logp: Tensor, entropy: Tensor | None) -> None:
        if not logp.requires_grad:
            return
        if part.logp is not None:
            raise ValueError(f"expected one call of {SCORING} with a gradient for each loss, got two")
        part.logp = logp.detach()
        self._parts.append(part)
        scaler = getattr(self._trainer.accelerator, "scaler", None)

        def keep(name: str) -> Callable[[Tensor], None]:
            def hook(gradient: Tensor) -> None:
                try:  # a copy: autograd may add to its own in place
                    setattr(part, name, gradient.detach().clone())
                    part.scale = 1.0 if scaler is None else scaler.get_scale()
                except Exception as error:
                    self._failure = error

            return hook

        logp.register_hook(keep("by_logp"))
        if entropy is not None and entropy.requires_grad:
            entropy.register_hook(keep("by_entropy"))

    # -------------------------------------------------------------------------------------------------------- details

    def _handed_back(self, part: _MicroBatch, gradient: Tensor | None) -> Tensor:
        """This micro-batch's share of the optimizer's gradient, of which DDP takes the mean over processes."""
        if gradient is None:
            return torch.zeros_like(part.inputs["completion_ids"], dtype=torch.float32)
        return gradient / (part.scale * self._trainer.accelerator.num_processes)

    def _gradient_scale(self, limit: float | None) -> float:
        """As torch's clip_grad_norm_ computes it."""
        if limit is not None and not self._clipped:
            raise ValueError(
                f"expected {type(self._trainer).__name__} to clip by its accelerator's clip_grad_norm_ "
                f"(max_grad_norm={limit}), got a step without a call of it"
            )
        scale = 1.0
        for norm, to in self._clipped:
            scale *= float(clip_factor(float(norm), to))
        return scale

    def _with_loss(self, batch: UpdateBatch, parts: list[_MicroBatch]) -> UpdateBatch:
        """The batch with weights where the loss is one of this package's by name; with settings, if by number too."""
        settings, advantages = _settings(self._trainer), batch.advantages
        if settings is None or advantages is None:
            return batch
        weights = _rows([_weights(self._trainer, settings, part) for part in parts])
        logp = _rows([part.logp for part in parts if part.logp is not None])
        batch = replace(batch, weights=weights)
        if batch.entropy_coefficients is not None or (settings.kl_coefficient > 0 and batch.ref_logp is None):
            return batch
        objective = PolicyGradient(settings)
        training_batch = TrainingBatch(batch.rollout, advantages, weights, batch.ref_logp)
        expected, _ = objective.coefficients(training_batch, logp, batch.old_logp)
        # capped: half precision would take a loss for ours that is off by a quarter
        tolerance = min(ROUNDINGS * torch.finfo(logp.dtype).eps, 1e-2) * expected.abs().max()
        if (expected - batch.token_coefficients).abs().max() > tolerance:
            return batch
        return replace(batch, policy_gradient=objective)


def _micro_batch(trainer: Any, model: Any, inputs: Mapping[str, Any], *_: Any, **__: Any) -> _MicroBatch:
    """Of ``compute_loss(model, inputs, ...)``."""
    if inputs.get("pixel_values") is not None:
        raise ValueError("expected U-prompts of text alone, got some with images, without which they cannot be scored")
    lacking = [name for name in ROLLOUT if name not in inputs]
    if lacking:
        raise ValueError(f"expected a loss of prompts and completions, got inputs without {', '.join(lacking)}")
    kept = {name: inputs[name] for name in KEPT if inputs.get(name) is not None}
    return _MicroBatch(kept, temperature=getattr(trainer, "temperature", 1.0))


def _settings(trainer: Any) -> LossSettings | None:
    """The trainer's loss in this package's words; None where there are none for it."""
    if getattr(trainer, "loss_type", None) not in OURS:
        return None
    args = trainer.args
    options = {  # and what they are where they are off
        "delta": (args, None),
        "off_policy_mask_threshold": (args, None),
        "use_bias_correction_kl": (args, False),
        "importance_sampling_level": (trainer, "token"),
        "top_entropy_quantile": (trainer, 1.0),
        "use_vllm": (trainer, False),
    }
    if trainer.beta == 0:
        del options["use_bias_correction_kl"]
    if any(getattr(owner, name, off) != off for name, (owner, off) in options.items()):
        return None
    try:
        return LossSettings(
            loss_type=trainer.loss_type,
            clip_low=trainer.epsilon_low,
            clip_high=trainer.epsilon_high,
            kl_coefficient=trainer.beta,
            max_completion_length=trainer.max_completion_length,
        )
    except ValueError:  # a clip range, say, that this package does not know
        return None


def _weights(trainer: Any, settings: LossSettings, part: _MicroBatch) -> Tensor:
    """Of every token in the step's loss, ``[n, T]``: what TRL divides by, micro-batch by micro-batch."""
    mask, accumulated = part.mask, trainer.current_gradient_accumulation_steps
    processes = trainer.accelerator.num_processes
    if settings.loss_type != "dapo":
        of_its_own = token_weights(mask, settings.loss_type, settings.max_completion_length)
        return of_its_own / (accumulated * processes)
    # tokens of all that was generated together, which may serve more steps than one, or less than one
    tokens = part.inputs["num_items_in_batch"].clamp(min=1) * accumulated / trainer.args.steps_per_generation
    return mask.float() / tokens


def _kept(parts: list[_MicroBatch], name: str) -> list[Tensor]:
    """Of all micro-batches, or of none."""
    found = [part.inputs[name] for part in parts if name in part.inputs]
    return found if len(found) == len(parts) else []


def _rows(parts: list[Tensor]) -> Tensor:
    """The rows of all parts, padded on the right with zeros."""
    return pad_sequence([row for part in parts for row in part], batch_first=True)


def _replace(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Put ``around(method, ...)`` in a method's place, in this one object; what is returned puts it back."""
    original, own = getattr(owner, name), vars(owner).get(name)

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    def put_back() -> None:
        if vars(owner).get(name) is not method:
            return  # somebody has wrapped it meanwhile: it is called still, and looks on
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    setattr(owner, name, method)
    return put_back
