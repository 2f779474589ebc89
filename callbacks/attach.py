"""Finding the policy, its tokenizer and prompts in a LightningModule that knows nothing of this package."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_NAMES = ("tokenizer", "processing_class")


def find_policy(module: nn.Module, path: str | None) -> nn.Module:
    """The Hugging Face or PEFT model of a module: at ``path``, or the only one there is.

    Raises:
        MisconfigurationException: if there is none, more than one, or something else at ``path``.
    """
    if path is not None:
        found: Any = module
        for name in path.split("."):
            if not hasattr(found, name):
                raise MisconfigurationException(
                    f"expected the policy at {path!r} of {type(module).__name__}, but there is no {name!r}"
                )
            found = getattr(found, name)
        found = getattr(found, "_orig_mod", found)  # a compiled model is probed through the one it wraps
        if not isinstance(found, PreTrainedModel | PeftModel):
            raise MisconfigurationException(
                f"expected a Hugging Face or PEFT model at {path!r}, got {type(found).__name__}"
            )
        return found
    candidates = {
        name: child for name, child in module.named_modules() if isinstance(child, PreTrainedModel | PeftModel)
    }
    outermost = {
        name: child
        for name, child in candidates.items()
        if not any(name != other and name.startswith(f"{other}." if other else "") for other in candidates)
    }
    if len(outermost) != 1:
        found_names = ", ".join(sorted(outermost)) or "none"
        raise MisconfigurationException(
            f"expected one Hugging Face or PEFT model in {type(module).__name__}, got {found_names}: "
            "name the policy, EntropyProbeCallback(policy='attribute.path')"
        )
    return next(iter(outermost.values()))


def find_tokenizer(trainer: Trainer, module: LightningModule, given: Any) -> PreTrainedTokenizerBase:
    """The tokenizer given, or the module's or datamodule's ``tokenizer`` or ``processing_class``.

    Raises:
        MisconfigurationException: if there is none.
    """
    datamodule = getattr(trainer, "datamodule", None)
    owners = [owner for owner in (module, datamodule) if owner is not None]
    for candidate in [given, *(getattr(owner, name, None) for owner in owners for name in TOKENIZER_NAMES)]:
        if candidate is not None:
            return candidate
    raise MisconfigurationException(
        f"expected a tokenizer as {' or '.join(TOKENIZER_NAMES)} of {type(module).__name__} or its datamodule, got "
        "none: EntropyProbeCallback(tokenizer=...)"
    )


def find_optimizer(trainer: Trainer, policy: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that holds the policy's trainable parameters.

    Raises:
        MisconfigurationException: if there is none, or more than one.
    """
    owned = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    holding = [
        optimizer
        for optimizer in trainer.optimizers
        if any(id(parameter) in owned for group in optimizer.param_groups for parameter in group["params"])
    ]
    if len(holding) != 1:
        raise MisconfigurationException(
            f"expected one optimizer over the policy's trainable parameters ({len(owned)} of them), got {len(holding)} "
            f"of the run's {len(trainer.optimizers)}"
        )
    return holding[0]


def find_prompts(trainer: Trainer, given: list[str] | None) -> list[str]:
    """The prompts given, or the datamodule's E split.

    Raises:
        MisconfigurationException: if there are none.
    """
    if given is not None:
        return list(given)
    prompts = getattr(getattr(trainer, "datamodule", None), "e_prompts", None)
    if not prompts:
        raise MisconfigurationException(
            "expected E prompts, got none: EntropyProbeCallback(prompts=[...]), or train with a PromptDataModule, "
            "which keeps an E split apart"
        )
    return list(prompts)
