"""Progress bars: one style, and one place that decides whether there is anybody to look at them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm import tqdm

PATIENCE = 3.0  # seconds that a part of a step takes before it has a bar of its own
OFF = ("", "0", "false", "no")

_SHOWN: ContextVar[bool] = ContextVar("progress bars are shown", default=False)


def is_watched(stream: TextIO | None = None) -> bool:
    """Whether somebody would see a bar: the stream is a terminal, no CI job's, and this is the node's first process.

    Args:
        stream: where the bar would be drawn; None: stderr.
    """
    stream = sys.stderr if stream is None else stream
    try:
        terminal = stream.isatty()
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False
    in_ci = os.environ.get("CI", "").lower() not in OFF
    return terminal and not in_ci and os.environ.get("LOCAL_RANK", "0") in ("", "0")


@contextmanager
def progress(
    description: str, total: int, unit: str, *, shown: bool = True, position: int | None = None
) -> Iterator[tqdm[Any]]:
    """A bar with the time left, which goes when the block ends; none where nobody would see it.

    Args:
        description: what is going on.
        total: of how many units.
        unit: what is counted.
        shown: False shows none, and none of :func:`part` within the block.
        position: line of the bar, counted from the trainer's own; None takes the first free one.

    Yields:
        The bar, to be moved by ``update``.
    """
    with _bars(shown), _bar(description, total, unit, position=position) as bar:
        yield bar


@contextmanager
def parts_shown(shown: bool) -> Iterator[None]:
    """Within the block, :func:`part` shows bars (where somebody would see them), or none, whatever held before."""
    with _bars(shown):
        yield


@contextmanager
def part(description: str, total: int, unit: str) -> Iterator[tqdm[Any]]:
    """A bar for a part of a step, below those of the step, once the part has taken a few seconds.

    None outside of :func:`progress` and :func:`parts_shown`: a library call draws on nobody's terminal by itself.

    Args:
        description: what is going on.
        total: of how many units.
        unit: what is counted.
    """
    with _bar(description, total, unit, delay=PATIENCE) as bar:
        yield bar


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    token = _SHOWN.set(shown and is_watched())
    try:
        yield
    finally:
        _SHOWN.reset(token)


def _bar(description: str, total: int, unit: str, **options: Any) -> tqdm[Any]:
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=not _SHOWN.get(),
        **options,
    )
