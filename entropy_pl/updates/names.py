"""Parameter names as the model has them, whatever wrapped it when they were written down."""

from __future__ import annotations

# Path components that DDP, torch.compile, FSDP, activation checkpointing, strategies and PEFT put into a name.
WRAPPERS = frozenset(
    (
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "modules_to_save",
        "default",
    )
)


def unwrapped(name: str, *, also: frozenset[str] = frozenset()) -> str:
    """The name without what wrappers put in, nor the components in ``also``.

    Example:
        >>> unwrapped("_orig_mod.layers.0.lora_A.default.weight")
        'layers.0.lora_A.weight'
    """
    return ".".join(part for part in name.split(".") if part not in WRAPPERS and part not in also)
