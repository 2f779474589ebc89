"""Adapters that attach the probe to a training run that exists: one file per trainer.

Imported when first asked for: who trains with Transformers need not wait for Lightning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from entropy_pl.callbacks.entropy_probe import EntropyProbeCallback

__all__ = ["EntropyProbeCallback"]


def __getattr__(name: str) -> Any:
    if name != "EntropyProbeCallback":
        raise AttributeError(f"module 'entropy_pl.callbacks' has no attribute {name!r}")
    from entropy_pl.callbacks.entropy_probe import EntropyProbeCallback

    return EntropyProbeCallback
