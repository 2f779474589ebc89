"""Several optimizers whose steps, one after another, are one step of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from entropy_pl.updates.steps import stepper_name, was_skipped, watch_steps


class StepsTogether:
    """Watches the steps of some optimizers until each has stepped once; of one optimizer, each of its steps.

    A round begins with the first step of any of them and is over when all have stepped. If one steps again before
    that, the round is none: it stays open, and nothing more is called, until :meth:`close`.

    Args:
        optimizers: as for :func:`~entropy_pl.updates.steps.watch_steps`.
        before: called right before the first step of a round.
        each: called right after every step of a round but those that a fused kernel left out, with the optimizer.
        after: called when a round is over; its argument says whether a step was taken, or all were left out.
        spoilt: called when a round turns out to be none.
    """

    def __init__(
        self,
        optimizers: Sequence[object],
        before: Callable[[], object],
        each: Callable[[Any], object],
        after: Callable[[bool], object],
        spoilt: Callable[[], object],
    ) -> None:
        self._optimizers = list(optimizers)
        self._before, self._each, self._after, self._spoilt = before, each, after, spoilt
        self._steps: Counter[int] = Counter()  # of this round, by the optimizer's number
        self._left_out: Counter[int] = Counter()
        self._watches = [
            watch_steps(optimizer, partial(self._begin, i), partial(self._end, i))
            for i, optimizer in enumerate(self._optimizers)
        ]

    @property
    def under_way(self) -> bool:
        """Whether a step of one of them has begun and not ended."""
        return any(watch.under_way for watch in self._watches)

    @property
    def is_open(self) -> bool:
        """Whether some have stepped and some have not, or one more often than the others."""
        return bool(self._steps)

    def has_stepped(self, which: int) -> bool:
        """Whether the optimizer of this number has stepped in this round."""
        return bool(self._steps[which])

    def reset(self) -> None:
        """Between steps: forget those that raised."""
        for watch in self._watches:
            watch.reset()

    def close(self) -> str:
        """End an open round: who has stepped in it, and how often, in words."""
        said = ", ".join(
            f"{i}: {stepper_name(optimizer)} {self._steps[i] - self._left_out[i]}×"
            for i, optimizer in enumerate(self._optimizers)
        )
        self._steps.clear()
        self._left_out.clear()
        return said

    def remove(self) -> None:
        """Stop watching."""
        for watch in self._watches:
            watch.remove()

    def _begin(self, which: int) -> None:
        if not self._steps:
            self._before()
        elif self._steps[which] == 1 and max(self._steps.values()) == 1:
            self._spoilt()

    def _end(self, which: int) -> None:
        self._steps[which] += 1
        if was_skipped(self._optimizers[which]):
            self._left_out[which] += 1
        elif max(self._steps.values()) == 1:
            self._each(self._optimizers[which])
        if max(self._steps.values()) == 1 and len(self._steps) == len(self._optimizers):
            taken = len(self._steps) - self._left_out.total()
            if taken in (0, len(self._steps)):
                self.close()
                self._after(bool(taken))
