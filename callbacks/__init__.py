"""Doors to the probe: attach it to a training run that exists."""

from entropy_pl.callbacks.entropy_probe import EntropyProbeCallback

__all__ = ["EntropyProbeCallback"]
