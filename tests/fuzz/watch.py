"""What a file made the process do while it was read: commands run, code executed, pickled globals found, imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from typing import Any

from mutate import SENTINEL

# Audit events (Python's own table of them) that only code of the file's could cause here. An audit hook cannot be taken
# away again, so that one is put in place once and asked only while something is being read.
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.startfile",
    "subprocess.Popen",
    "pickle.find_class",
)
FORBIDDEN += ("socket.connect", "socket.getaddrinfo", "ctypes.dlopen", "shutil.rmtree", "os.putenv")
_seen: list[str] | None = None


class _Finder(MetaPathFinder):
    """Sees whether the module is looked for that only the files name."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> None:
        if _seen is not None and fullname.partition(".")[0] == SENTINEL:
            _seen.append(f"import of {fullname}")


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r:.200}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Everything of that kind that the block does."""
    global _seen
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        sys.addaudithook(_hook)
    _seen = seen = []
    try:
        yield seen
    finally:
        _seen = None


class Payload:
    """A pickle of it runs a command wherever it is unpickled by more than torch's `weights_only`."""

    def __init__(self, marker: os.PathLike[str]) -> None:
        self.marker = os.fspath(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)
