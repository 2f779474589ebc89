"""Finding the policy, its tokenizer and its optimizer in a run that knows nothing of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from entropy_pl.registry import did_you_mean
from entropy_pl.updates.steps import inner_optimizer

TOKENIZER_NAMES = ("tokenizer", "processing_class")
NOT_TRAINING = (
    "the probe measures optimizer steps. Leave it out, turn it off with every_n_steps=0, or measure a checkpoint with "
    "entropy-pl measure"
)
NOT_ONE_DEVICE = (
    "probe a run whose processes each hold the whole policy (one device, or DDP), or measure between two saved "
    "checkpoints of this one: entropy-pl measure with checkpoint.checkpoint_path and checkpoint.after_checkpoint_path"
)


def find_policy(module: nn.Module, path: str | None) -> nn.Module:
    """The Hugging Face or PEFT model of a module: at ``path``, or the only one there is, or the only one trained.

    Raises:
        ValueError: if there is none, more than one, or something else at ``path``.
    """
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


def find_optimizer(
    optimizers: Sequence[Any],
    policy: nn.Module,
    index: int | None,
    watches: Callable[[nn.Parameter], bool] = lambda parameter: parameter.requires_grad,
) -> Any:
    """The optimizer that holds the policy's trainable parameters: the one named, or the only one that does.

    Args:
        optimizers: of the run.
        policy: what is measured.
        index: the number of the one that is meant; None finds it.
        watches: which parameters count as the policy's trainable ones.

    Raises:
        ValueError: if there is none, or more than one and none was named.
    """
    owned = {id(parameter) for parameter in policy.parameters() if watches(parameter)}
    held = [
        sum(id(parameter) in owned for group in optimizer.param_groups for parameter in group["params"])
        for optimizer in optimizers
    ]
    holding = [i for i, count in enumerate(held) if count]
    found = "; ".join(
        f"{i}: {type(inner_optimizer(optimizer)).__name__} with {count}"
        for i, (optimizer, count) in enumerate(zip(optimizers, held, strict=True))
    )
    if index is not None:
        if index not in holding:
            raise ValueError(
                f"expected optimizer {index} to hold trainable parameters of the policy ({len(owned)} of them), got "
                f"{found or 'no optimizer'}"
            )
        return optimizers[index]
    if len(holding) != 1:
        raise ValueError(
            f"expected one optimizer over the policy's trainable parameters ({len(owned)} of them), got "
            f"{found or 'no optimizer'}"
            + (": say which, optimizer=0" if holding else ": give its parameters to the optimizer, of this very object")
        )
    return optimizers[holding[0]]


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
