"""Processes as a person starts them: at a terminal, or with their output in a pipe."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

COLUMNS = 100
RUNS_THE_COMMAND = [sys.executable, "-m", "entropy_pl.cli"]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without what says that nobody is looking."""
    silent = ("CI", "LOCAL_RANK", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    kept = {name: value for name, value in os.environ.items() if name not in silent}
    return kept | {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | changes


def at_a_terminal(command: list[str], **changes: str) -> tuple[str, int]:
    """What a command shows at a terminal of 100 columns, stdout and stderr together, and its exit status."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(**changes)) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError as error:
                if error.errno != errno.EIO:  # Linux's way to say that nobody holds the other end any more
                    raise
                break
            if not part:
                break
            shown += part
    os.close(ours)
    return shown.decode(errors="replace"), process.returncode


def in_a_pipe(command: list[str], **changes: str) -> tuple[str, int]:
    """What a command writes into a pipe, stdout and stderr together, and its exit status."""
    found = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(**changes), check=False
    )
    return found.stdout.decode(), found.returncode
