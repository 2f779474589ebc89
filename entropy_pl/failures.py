"""What a command says when it fails: one screen, with what to do next; the whole traceback goes into a file."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import site
import sys
import sysconfig
import tempfile
import textwrap
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from entropy_pl.config import ERROR_LOG
from entropy_pl.peers import PeerError
from entropy_pl.policy.memory import wants_memory

SHOW_TRACEBACK = "ENTROPY_PL_TRACEBACK"
COLUMNS = 100
MESSAGE_LINES = 6  # of an error's own words; all of them are in the log
MESSAGE_WIDTH = 4 * COLUMNS  # of each
PEER_IS_GONE = ("connection closed by peer", "connection reset by peer", "nccl", "gloo", "store", "broken pipe")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class RunState:
    """Where a run was when it failed, and what is left of it.

    Args:
        doing: what it was at: ``training at optimizer step 7``.
        folder: of the run, for the log; None: there is none.
        kept: what has been written → where it lies.
        resume: the command that goes on; None: there is none.
        without: what to do where nothing to go on from was kept.
        less_memory: the settings that take less memory.
    """

    doing: str
    folder: Path | None = None
    kept: Mapping[str, object] = field(default_factory=dict)
    resume: str | None = None
    without: str | None = None
    less_memory: str = "batch sizes"


class RunError(Exception):
    """A command failed after it had begun. What failed is its ``__cause__``.

    Args:
        state: of the run at that moment.
    """

    def __init__(self, state: RunState) -> None:
        super().__init__(state.doing)
        self.state = state


class RunStopError(Exception):
    """A command was told to stop, by Ctrl-C or a signal.

    Args:
        state: of the run at that moment.
        by: what stopped it.
        status: exit status.
    """

    def __init__(self, state: RunState, by: str = "interrupted", status: int = 130) -> None:
        super().__init__(state.doing)
        self.state, self.by, self.status = state, by, status


def failure_message(error: BaseException, state: RunState) -> str:
    """What to show of an error that ended a run, the traceback being written to a file.

    Args:
        error: the one that was raised.
        state: of the run.

    Returns:
        At most a screenful: what failed, the error, where in the user's own code it was raised, what to do, what was
        kept, how to go on, and the traceback's file.
    """
    log = write_traceback(error, state.folder)
    place = users_place(error)
    lines = [f"entropy-pl: error: {_process()}{state.doing} failed", shortened(f"{type(error).__name__}: {error}")]
    lines += [f"  raised at {place}"] if place else []
    lines.append(what_to_do(error, state, place, log))
    shown_in = f"{log}" if log else f"nowhere, since no file could be written; {SHOW_TRACEBACK}=1 shows it"
    return "\n".join(
        [*lines, *_what_is_left(state), _named("details", f"{shown_in} (the whole traceback)" if log else shown_in)]
    )


def stop_message(stopped: RunStopError) -> str:
    """What to show of a run that was told to stop."""
    return "\n".join([f"entropy-pl: {_process()}{stopped.by}: {stopped.state.doing}", *_what_is_left(stopped.state)])


def usage_message(error: BaseException, said: str) -> str:
    """What to show of words, a config file or a setting that cannot be.

    Args:
        error: the one that was raised; where the user's own code raised it, the place is shown.
        said: in words.
    """
    place = users_place(error)
    at = f"\n  raised at {place}" if place else ""
    return f"entropy-pl: error: {shortened(said)}{at}\n(set {SHOW_TRACEBACK}=1 to see where)"


def what_to_do(error: BaseException, state: RunState, place: str | None, log: Path | None) -> str:
    """The next thing to try, by the kind of error."""
    said = str(error).lower()
    if wants_memory(error):
        return f"to do: lower {state.less_memory}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return "to do: make room on that disk, or give a folder on another one"
    if isinstance(error, OSError) and error.errno in NOT_ALLOWED:
        return "to do: give a folder that can be written to"
    if isinstance(error, PeerError) or (
        isinstance(error, RuntimeError | ConnectionError) and any(sign in said for sign in PEER_IS_GONE)
    ):
        return "to do: look for what another process of this run said: it failed first, or was killed"
    if place:
        return "to do: fix that line; it is in your code"
    if isinstance(error, ArithmeticError):
        return "to do: lower the learning rate, or compute in float32 or bfloat16 instead of float16"
    if isinstance(error, ImportError):
        return "to do: install what is missing"
    where = log.name if log else "the traceback"
    return f"to do: read the end of {where}; if nothing there is yours, report it together with the command"


def users_place(error: BaseException) -> str | None:
    """``file:line, in function`` of the innermost code that is neither Python's, a library's nor this package's."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if _is_users(frame.f_code.co_filename):
            place = f"{frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}"
    return place


def write_traceback(error: BaseException, folder: Path | None) -> Path | None:
    """Append the whole traceback to the run's log, or to one in the folder for temporary files.

    Returns:
        The file; None where neither can be written.
    """
    rank = os.environ.get("LOCAL_RANK", "")
    name = ERROR_LOG if rank in ("", "0") else f"error-{rank}.log"
    text = "".join(traceback.format_exception(error))
    head = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {' '.join(sys.argv)}\n\n"
    for make in (lambda: folder and folder.is_dir() and folder / name, _temporary_log):
        try:
            file = make()
            if file:
                with open(file, "a", encoding="utf-8") as stream:
                    stream.write(f"{head}{text}\n")
                return file
        except OSError:
            continue
    return None


def shortened(text: str) -> str:
    """The beginning of a long message, lines and all."""
    lines = [line for line in text.splitlines() if line.strip()] or [""]
    kept = [
        textwrap.shorten(line, MESSAGE_WIDTH, placeholder=" …") if len(line) > MESSAGE_WIDTH else line for line in lines
    ]
    return "\n".join(kept[:MESSAGE_LINES] + (["…"] if len(kept) > MESSAGE_LINES else []))


def fitted(text: str) -> str:
    """Lines broken between words to the terminal's width, 100 at most; as they are where stderr is none."""
    if not sys.stderr.isatty():
        return text
    width = min(COLUMNS, shutil.get_terminal_size().columns)
    wrap = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False, subsequent_indent="  ")
    return "\n".join(wrap.fill(line) if len(line) > width else line for line in text.splitlines())


def named_files(files: Mapping[str, object] | Iterable[tuple[str, object]]) -> list[str]:
    """A line each: what kind of file, and where it lies."""
    return [_named(kind, path) for kind, path in (files.items() if isinstance(files, Mapping) else files)]


def _named(kind: str, path: object) -> str:
    return f"{kind:<9}{path}"


def _what_is_left(state: RunState) -> list[str]:
    lines = named_files(state.kept)
    if state.resume:
        return [*lines, _named("go on", state.resume)]
    return [*lines, *([_named("go on", state.without)] if state.without else [])]


def _process() -> str:
    rank = os.environ.get("LOCAL_RANK", "")
    return "" if rank in ("", "0") else f"process {rank}: "


def _temporary_log() -> Path:
    handle, path = tempfile.mkstemp(prefix="entropy-pl-", suffix=".log")
    os.close(handle)
    return Path(path)


def _is_users(file: str) -> bool:
    if file.startswith("<"):
        return False
    path = os.path.abspath(file)
    installed = {"site-packages", "dist-packages"} & set(Path(path).parts)  # the latter are Debian's
    return not installed and not path.startswith(tuple(_not_users()))


def _not_users() -> Iterable[str]:
    """Folders of Python's, of libraries', of this package's code, wherever it is installed."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    own = [importlib.util.find_spec(package) for package in ("entropy_pl", "entropy_pl.callbacks")]  # not imported
    paths += [os.path.dirname(spec.origin) for spec in own if spec is not None and spec.origin is not None]
    return [os.path.join(os.path.abspath(path), "") for path in (*paths, site.getusersitepackages())]
