"""Finding the policy, its tokenizer and its optimizer in a run that knows nothing of this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_pl.policy.causal import refuse_not_causal
from entropy_pl.registry import did_you_mean
from entropy_pl.updates.in_backward import may_move_in_backward
from entropy_pl.updates.steps import holders, parameters_of, stepper_name

ALL = "all"
TOKENIZER_NAMES = ("tokenizer", "processing_class")
NOT_TRAINING = (
    "the probe measures optimizer steps. Leave it out, turn it off with every_n_steps=0, or measure a checkpoint with "
    "entropy-pl measure"
)
NOT_ONE_DEVICE = (
    "probe a run whose processes each hold the whole policy (one device, or DDP), or measure between two saved "
    "checkpoints of this one: entropy-pl measure with checkpoint.checkpoint_path and checkpoint.after_checkpoint_path"
)

NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (1,),
    "top_k": (0, -1),  # both mean all: Transformers', vLLM's
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
}
"""Options of sampling that change the distribution, and the values with which they do not."""


def find_policy(module: nn.Module, path: str | None) -> nn.Module:
    """The Hugging Face or PEFT model of a module: at ``path``, or the only one there is, or the only one trained.

    Raises:
        ValueError: if there is none, more than one, something else at ``path``, or no causal language model.
    """
    policy = _found(module, path)
    refuse_not_causal(policy)
    return policy


def _found(module: nn.Module, path: str | None) -> nn.Module:
    if path is not None:
        found: Any = module
        for name in path.split("."):
            if not hasattr(found, name):
                there = [child for child, _ in found.named_children()] if isinstance(found, nn.Module) else []
                raise ValueError(
                    f"expected the policy at {path!r} of {type(module).__name__}, but there is no {name!r}"
                    f"{did_you_mean(name, there)}"
                )
            found = getattr(found, name)
        found = getattr(found, "_orig_mod", found)  # a compiled model is probed through the one it wraps
        if not isinstance(found, PreTrainedModel | PeftModel):
            raise ValueError(f"expected a Hugging Face or PEFT model at {path!r}, got {type(found).__name__}")
        return found
    candidates = {
        name: child for name, child in module.named_modules() if isinstance(child, PreTrainedModel | PeftModel)
    }
    outermost = {
        name: child
        for name, child in candidates.items()
        if not any(name != other and name.startswith(f"{other}." if other else "") for other in candidates)
    }
    trained = {name: child for name, child in outermost.items() if any(p.requires_grad for p in child.parameters())}
    if len(trained) == 1:
        outermost = trained  # beside a frozen reference or reward model
    if len(outermost) != 1:
        found_names = ", ".join(sorted(outermost)) or "none"
        raise ValueError(
            f"expected one Hugging Face or PEFT model in {type(module).__name__}, got {found_names}: "
            f"name the policy, policy='{next(iter(sorted(outermost)), 'attribute.path')}'"
        )
    return next(iter(outermost.values()))


def find_tokenizer(given: Any, owners: Sequence[Any]) -> PreTrainedTokenizerBase:
    """The tokenizer given, or ``tokenizer`` or ``processing_class`` of the first owner that has one.

    A processor (of a multimodal model) is asked for its tokenizer.

    Raises:
        ValueError: if there is none.
    """
    for candidate in [given, *(getattr(owner, name, None) for owner in owners for name in TOKENIZER_NAMES)]:
        if candidate is not None:
            found = (
                candidate if isinstance(candidate, PreTrainedTokenizerBase) else getattr(candidate, "tokenizer", None)
            )
            if found is None:
                raise ValueError(
                    f"expected a Hugging Face tokenizer, got {type(candidate).__name__}: give the one loaded"
                )
            return found
    names = " or ".join(type(owner).__name__ for owner in owners) or "the trainer"
    raise ValueError(
        f"expected a tokenizer as {' or '.join(TOKENIZER_NAMES)} of {names}, got none: give it as tokenizer="
    )


def check_which(optimizer: Any) -> None:
    """Refuse what does not say which optimizers are watched.

    Raises:
        ValueError: unless it is None, a number, several numbers, or "all".
    """
    numbers = optimizer if isinstance(optimizer, list) else [optimizer]
    if optimizer in (None, ALL) or (numbers and all(type(number) is int and number >= 0 for number in numbers)):
        return
    raise ValueError(
        f'expected optimizer as a number, several numbers, "all", or None for the only one, got {optimizer!r}'
    )


def find_optimizers(
    optimizers: Sequence[Any],
    policy: nn.Module,
    which: int | list[int] | str | None,
    watches: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
) -> list[Any]:
    """The optimizers that hold the policy's trainable parameters: those named, all of them, or the only one.

    Args:
        optimizers: the run's.
        policy: whose parameters are looked for.
        which: a number, several, "all", or None.
        watches: which parameters count as the policy's trainable ones.

    Raises:
        ValueError: if there is none, one named holds none, or there are several and none was named.
    """
    owned = {id(parameter) for parameter in policy.parameters() if watches(parameter)}
    held = [
        sum(id(parameter) in owned for holder in holders(optimizer) for parameter in parameters_of(holder))
        for optimizer in optimizers
    ]
    holding = [i for i, count in enumerate(held) if count]
    found = "; ".join(
        f"{i}: {stepper_name(optimizer)} with {count}"
        for i, (optimizer, count) in enumerate(zip(optimizers, held, strict=True))
    )
    if which == ALL and holding:
        return [optimizers[i] for i in holding]
    if isinstance(which, int | list):
        numbers = list(dict.fromkeys([which] if isinstance(which, int) else which))
        for number in numbers:
            if number not in holding:
                raise ValueError(
                    f"expected optimizer {number} to hold trainable parameters of the policy ({len(owned)} of them), "
                    f"got {found or 'no optimizer'}"
                )
        return [optimizers[number] for number in numbers]
    if len(holding) != 1:
        if holding:
            advice = (
                'say optimizer="all" for the step that they take together, or which of them, '
                f"optimizer={holding[0]}, for its part of it alone"
            )
        elif may_move_in_backward(policy.parameters()):
            advice = (
                "the parameters have hooks for their gradients, by which an optimizer may move them in the backward "
                "pass. To have that measured, give the trainer an optimizer over these parameters with the learning "
                "rate of those hooks; nobody need call its step()"
            )
        else:
            advice = "give its parameters to the optimizer, of this very object"
        raise ValueError(
            f"expected one optimizer over the policy's trainable parameters ({len(owned)} of them), got "
            f"{found or 'no optimizer'}: {advice}"
        )
    return [optimizers[holding[0]]]


def truncated_sampling(owners: Sequence[Any], temperature: float) -> str | None:
    """That the run samples from another distribution than the probe measures, as a sentence; None where it does not.

    Args:
        owners: mappings and objects that may have the run's options of sampling; of each option, the first that has it
            is right.
        temperature: the probe's.
    """
    found: dict[str, float] = {}
    for owner in owners:
        for name in NEUTRAL:
            value = owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(name, value)
    options = ", ".join(f"{name}={value:g}" for name, value in found.items() if value not in NEUTRAL[name])
    if not options:
        return None
    return (
        f"the run samples with {options}, the probe without: entropy, ΔH and δH₁ are those of the policy's whole "
        f"distribution at temperature {temperature:g}, not of the truncated one that the run's completions come from"
    )


def refuse_sharded(policy: nn.Module, what: str | None) -> None:
    """Refuse a policy of which no process holds every parameter whole.

    Args:
        policy: to be looked at for shards: FSDP's modules and flat parameters, DTensors, DeepSpeed's partitions.
        what: name of a strategy known to shard; None where none is.

    Raises:
        ValueError: naming what works instead.
    """
    modules = (
        f"{type(m).__name__} around {n or 'it'}"
        for n, m in policy.named_modules()
        if "FullyShardedDataParallel" in type(m).__name__
    )
    parameters = (
        f"{n} as a shard"
        for n, p in policy.named_parameters()
        if type(p.data).__name__ == "DTensor" or hasattr(p, "ds_id") or hasattr(p, "_fsdp_flattened")
    )
    got = what or next(modules, None) or next(parameters, None)
    if got is not None:
        raise ValueError(f"expected every process to hold the whole policy, got {got}: {NOT_ONE_DEVICE}")
