"""The processes of one run, as a measurement sees them: work is shared out, results are brought together.

Everything that crosses between processes goes through one call, :meth:`Peers.exchange`, which every process makes the
same number of times, in the same order. That is also what keeps a failure from becoming a deadlock: a process that
fails sends its failure as its next exchange (:meth:`Peers.together`), so that the others, who are waiting there, learn
of it and give up too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")
_TOLD = "_told_to_peers"  # set on an exception that the others know of


class PeerError(RuntimeError):
    """Another process of the run failed, so that what was to be made together cannot be made."""


@dataclass(frozen=True)
class _Failure:
    message: str


@dataclass(frozen=True)
class Peers:
    """This process among those of its run; the default is a process on its own.

    Args:
        rank: of this process.
        size: how many there are.
        group: process group that carries CPU objects; None where there is nothing to carry.

    Example:
        >>> alone = Peers()
        >>> alone.exchange("mine"), alone.share(["a", "b"])
        (['mine'], ['a', 'b'])
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @classmethod
    def of_this_run(cls) -> Peers:
        """All processes of the run, if ``torch.distributed`` is initialised; every one of them must call it.

        They talk over a gloo group of their own: whatever backend trains, statistics travel as CPU memory and never
        fall between two collectives of the trainer.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def close(self) -> None:
        """Give the group back; nothing can be exchanged after it."""
        if self.group is not None and dist.is_initialized():
            with suppress(ValueError, RuntimeError):  # given back already
                dist.destroy_process_group(self.group)

    def share(self, items: list[T]) -> list[T]:
        """This process's part of a list, in order; parts differ by one item at most, and may be empty."""
        start, end = (len(items) * rank // self.size for rank in (self.rank, self.rank + 1))
        return items[start:end]

    def exchange(self, value: T) -> list[T]:
        """What every process has to say, in the order of their ranks.

        Raises:
            PeerError: if another process failed instead of coming here.
        """
        if self.size == 1:
            return [value]
        values = self._gather(value)
        failures = [
            f"process {rank} failed: {said.message}" for rank, said in enumerate(values) if isinstance(said, _Failure)
        ]
        if failures:
            raise PeerError("; ".join(failures))
        return values

    def agree(self, what: str, value: T) -> T:
        """A value that must be the same everywhere.

        Raises:
            ValueError: on every process, if it is not.
            PeerError: as :meth:`exchange`.
        """
        values = self.exchange(value)
        if any(other != values[0] for other in values):
            raise ValueError(f"expected {what} to be the same in all {self.size} processes, got {values}")
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which all processes make the same exchanges; one that fails in it tells the others.

        An exchange must follow in the block for those who have not failed: they learn of the failure there.
        """
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if self.size > 1 and not getattr(error, _TOLD, False):  # by a block inside this one
                self._gather(_Failure(f"{type(error).__name__}: {error}"))
                with suppress(AttributeError):
                    setattr(error, _TOLD, True)
            raise

    def _gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered


ALONE = Peers()
"""One process on its own."""
