"""What a run of the benchmarks is told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Command-line options, for every benchmark.

    Args:
        policy: folder of a policy; None takes random weights of the same shape.
        data: folder of GSM8K, which goes with a policy.
        sequences: completions of the E-batch.
        rounds: that are counted; one before them is not.
        device: ``cpu`` or ``cuda``.
        small: sizes with which a benchmark takes seconds and its figures mean nothing.
    """

    policy: str | None = None
    data: str | None = None
    sequences: int = 256
    rounds: int = 3
    device: str = "cpu"
    small: bool = False

    def __post_init__(self) -> None:
        if (self.policy is None) != (self.data is None):
            raise ValueError("expected a policy and its data together, got one of them: give --policy and --data")

    def pick(self, full: int, small: int) -> int:
        """A size, by ``small``."""
        return small if self.small else full
