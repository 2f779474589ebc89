"""Which kernels a probe's passes go through: those that know its precision, and that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

LOCKED_EXPERTS = "deepgemm_megamoe"  # it has rearranged the weights for good: Transformers refuses to leave it


@contextmanager
def attention_in_any_precision(model: nn.Module) -> Iterator[None]:
    """PyTorch's own attention in the place of kernels that know half precision only (FlashAttention and its like)."""
    supported = all(getattr(module, "_supports_sdpa", True) for module in model.modules())

    def instead(kernel: str) -> str:
        if kernel in ("eager", "sdpa"):
            return kernel
        return "sdpa" if supported else "eager"

    with _implementation(model, "_attn_implementation_internal", instead):
        yield


@contextmanager
def experts_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Experts of a mixture by products that know ``dtype``; elsewhere than on grouped products they are left alone.

    Transformers multiplies all experts' tokens by one grouped product. That knows no float64, and PyTorch before 2.10
    knows it for bfloat16 alone on a GPU. The loop over experts in the model's own class knows every precision.

    Args:
        model: any Hugging Face model.
        dtype: in which the parameters are held.
    """
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    grouped = dtype is not torch.float64 and (device == "cpu" or hasattr(torch.nn.functional, "grouped_mm"))

    def instead(kernel: str) -> str:
        known = ("eager", "batched_mm", LOCKED_EXPERTS, *(["grouped_mm"] if grouped else []))
        return kernel if kernel in known else "eager"

    with _implementation(model, "_experts_implementation_internal", instead):
        yield


@contextmanager
def differentiable_experts(model: nn.Module) -> Iterator[None]:
    """Experts of a mixture by the loop in the model's own class: grouped products have no forward-mode derivative."""

    def instead(kernel: str) -> str:
        return kernel if kernel == LOCKED_EXPERTS else "eager"

    with _implementation(model, "_experts_implementation_internal", instead):
        yield


@contextmanager
def _implementation(model: nn.Module, name: str, instead: Callable[[str], str]) -> Iterator[None]:
    """Another choice of kernel in the configurations of all modules, which look there in every forward pass."""
    chosen: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config = vars(module).get("config")
        kernel = getattr(config, name, None)
        if isinstance(kernel, str):
            chosen.setdefault(id(config), (config, kernel))
    changed = [(config, kernel) for config, kernel in chosen.values() if instead(kernel) != kernel]
    for config, kernel in changed:
        setattr(config, name, instead(kernel))
    try:
        yield
    finally:
        for config, kernel in changed:
            setattr(config, name, kernel)
