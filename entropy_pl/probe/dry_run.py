"""A probe tried out before the first step: what cannot work is told in the first minute, not at every probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from entropy_pl.peers import ALONE, Peers
from entropy_pl.policy.adapter import trainable_parameters
from entropy_pl.policy.gradients import weighted_gradient
from entropy_pl.policy.logits import NonFiniteError
from entropy_pl.policy.memory import wants_memory
from entropy_pl.policy.precision import quantized_layers
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.sample import sample_completions
from entropy_pl.policy.score import token_stats
from entropy_pl.probe.engine import EntropyProbe
from entropy_pl.probe.memory import what_happened
from entropy_pl.rollout import Rollout, TokenStats
from entropy_pl.updates.vector import LazyDirection, UpdateVector

NEW_TOKENS = 4
TINY = 1e-3  # of a parameter's own size
SEEN_BACKWARDS = (
    1e-3  # nats: rounding of float32 is 1e-6, of a large mixture of experts 1e-4; a trained BERT changes by 1
)

PHASES = {
    "sampling": "sampling them",
    "scoring": "scoring them",
    "tangents": "taking their derivatives along an update",
    "features": "reading their hidden states for the critic",
    "sweep": "scoring them at θ+ηv",
}


def take_dry_run(
    probe: EntropyProbe,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = NEW_TOKENS,
    attribution: bool = False,
    peers: Peers = ALONE,
) -> list[str]:
    """Take a probe's every kind of pass over two completions of four tokens, and leave no trace.

    They are sampled, scored, differentiated by the probe's own method and by differences, and scored a tiny step
    away, along a fixed direction over all trainable parameters. Nothing is kept: parameters, gradients, modes and
    random streams are afterwards as before, and no hook of the run's own backward passes is called.

    Args:
        probe: what will be measured.
        model: the policy.
        tokenizer: of the policy.
        prompts: of the E-batch; two short ones are taken, of different length if there are such.
        max_new_tokens: longest completion of the probe, if that is shorter than four.
        attribution: also differentiate the entropy by the trainable parameters, as an attribution will.
        peers: the run's processes. All of them try, and if one fails, none goes on.

    Returns:
        What does not stand in a probe's way and its reader should know, in sentences: logits that are not finite, and
        an attribution that cannot be made.

    Raises:
        ValueError: if anything fails, with the phase, the cause in its own words and what to do; and for a model that
            reads tokens behind the one it predicts.
        PeerError: if another process failed.
    """
    with peers.together():
        probe.check(model)
        found = _tried(probe, model, tokenizer, _two_short(prompts), min(max_new_tokens, NEW_TOKENS), attribution)
        peers.exchange(None)
    return found


def _tried(
    probe: EntropyProbe, model: Any, tokenizer: Any, prompts: list[Any], tokens: int, attribution: bool
) -> list[str]:
    phase = "sampling"

    def reached(next_phase: str) -> None:
        nonlocal phase
        phase = next_phase

    try:
        with isolated_rng(0), probe.evaluation(model):
            at = probe.sampling_temperature
            drawn = sample_completions(model, tokenizer, prompts, max_new_tokens=tokens, temperature=at, batch_size=2)
            rollout = _without_ends(drawn, tokens)
            phase = "scoring"
            seen = _seen_backwards(probe, model, rollout)
            phase = "tangents"
            once = replace(probe, etas=(), eta_multipliers=(), at_lr=True, symmetric=False)
            update = _tiny_update(model)
            once.collect(model, rollout, update, on_pass=reached)
            told = _without_gradient(probe, model, rollout, update) if attribution else []
    except (NonFiniteError, FloatingPointError) as error:  # the run's numbers, not what a probe can do
        return [f"the policy's logits were not finite before the first step, in {PHASES[phase]}: {error}"]
    except Exception as error:
        raise ValueError(_refusal(probe, phase, error)) from error
    if seen > SEEN_BACKWARDS:
        raise ValueError(
            f"expected a policy whose log-probs depend on earlier tokens alone, got {type(model).__name__}, in which "
            f"another last token changes those before it by up to {seen:.2g} nats: a causal language model is needed "
            "(is_decoder=True in the configuration of BERT's kind)"
        )
    return told


def _without_gradient(probe: EntropyProbe, model: nn.Module, rollout: Rollout, update: UpdateVector) -> list[str]:
    """Why no attribution can be made, which costs a probe nothing else; nothing where it can."""
    ones = rollout.completion_mask.double()
    each = TokenStats(torch.zeros_like(ones), ones, rollout.completion_mask)
    try:
        weighted_gradient(model, rollout, each, update.direction, **probe.scoring)
    except Exception as error:
        return [
            "No attribution can be made of this policy: a dry run failed in differentiating the entropy by trainable "
            f"parameters, {what_happened(error).rstrip('.')}. All else is measured; attribution=False says not to try"
        ]
    return []


def _two_short(prompts: Sequence[Any]) -> list[Any]:
    """The shortest, and the shortest of those that are longer, so that there is padding."""
    first, *others = sorted(prompts, key=len)
    return [first, next((prompt for prompt in others if len(prompt) > len(first)), others[0] if others else first)]


def _without_ends(rollout: Rollout, tokens: int) -> Rollout:
    """The same completions going on behind their end, so that all have as many tokens."""
    missing = tokens - rollout.completion_ids.shape[1]
    ids = torch.cat([rollout.completion_ids, rollout.completion_ids[:, -1:].expand(-1, missing)], 1)
    return replace(rollout, completion_ids=ids, completion_mask=torch.ones_like(ids, dtype=torch.bool))


def _seen_backwards(probe: EntropyProbe, model: nn.Module, rollout: Rollout) -> float:
    """By how much the earlier tokens' log-probs change with the last token, in nats.

    Not asked of quantized layers: 8-bit ones choose by all tokens of a batch which columns to round.
    """
    if quantized_layers(model):
        return 0.0
    other = rollout.completion_ids.clone()
    other[:, -1] = rollout.prompt_ids[:, -1]  # some token that the model knows
    other[:, -1] = torch.where(
        other[:, -1] == rollout.completion_ids[:, -1], rollout.completion_ids[:, 0], other[:, -1]
    )
    changed = replace(rollout, completion_ids=other)
    before, after = (token_stats(model, r, **probe.scoring).logp[:, :-1] for r in (rollout, changed))
    return float((before - after).abs().max()) if before.numel() else 0.0


def _tiny_update(model: nn.Module) -> UpdateVector:
    """A fixed direction in which every trainable parameter moves by a thousandth of its size, also where it is zero."""
    parameters = trainable_parameters(model)

    def direction(name: str) -> Tensor:
        theta = parameters[name].detach()
        size = float(theta.double().square().mean().sqrt())
        pattern = torch.arange(theta.numel(), device=theta.device, dtype=torch.float64).cos_().view(theta.shape)
        return pattern.mul_(size if 0 < size < float("inf") else 0.01)

    return UpdateVector(LazyDirection(parameters, direction), lr=TINY)


def _refusal(probe: EntropyProbe, phase: str, error: Exception) -> str:
    if wants_memory(error):
        todo = "Memory may have been short for another reason than the probe: if so, start again once it is free"
    elif phase == "tangents" and probe.method != "central_difference":
        todo = "method='central_difference' needs plain forward passes alone"
    elif probe.precision == "float64":
        todo = "precision='float32' needs no float64 of the policy's layers"
    else:
        todo = "Leave the probe out, or turn it off with every_n_steps=0, to train without it"
    return (
        f"expected a policy of which a probe can be taken, got an error in a dry run of two short completions "
        f"before the first step, in {PHASES[phase]}: {what_happened(error).rstrip('.')}. {todo}"
    )
