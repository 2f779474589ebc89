"""Things by name: what a config file calls a dataset or a reward, and what to say to a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Names of one kind of thing.

    Args:
        kind: what the things are called in messages, as ``dataset``.

    Example:
        >>> rewards = Registry("reward")
        >>> rewards.add("short", len)
        >>> rewards.get("shrt")
        Traceback (most recent call last):
        ...
        ValueError: expected a reward out of ['short'], got 'shrt'; did you mean 'short'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> None:
        """Give a thing a name.

        Raises:
            ValueError: if the name is taken by another thing.
        """
        if name in self._things and self._things[name] != thing:
            raise ValueError(f"expected a new {self.kind} name, got {name!r}, which is registered already")
        self._things[name] = thing

    def names(self) -> list[str]:
        """Registered names, sorted."""
        return sorted(self._things)

    def get(self, name: str) -> T:
        """Look a thing up.

        Raises:
            ValueError: if the name is not registered; the message names the nearest one and all there are.
        """
        if name not in self._things:
            raise ValueError(
                f"expected a {self.kind} out of {self.names()}, got {name!r}{did_you_mean(name, self.names())}"
            )
        return self._things[name]


def did_you_mean(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """``; did you mean 'x'?`` for the nearest name, or nothing where none is near."""
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
