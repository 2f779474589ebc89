"""A process of a test's own, which is stopped from outside at a point that it has announced."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import pytest

from entropy_pl.monitor.run_probe import RunProbe

DEADLINE = 120.0  # seconds; a forked process is there at once, but the machine may be busy
if not hasattr(os, "fork"):
    pytest.skip("no fork, and no signals, on this platform", allow_module_level=True)

Announce = Callable[[], None]


class OtherProcess:
    """Runs ``work(announce)``; ``announce()`` tells the test that the point is reached, and waits to be let go on.

    It is forked, so what the test has patched and loaded is there.
    """

    def __init__(self, work: Callable[[Announce], Any]) -> None:
        self._reached, reached = os.pipe()
        released, self._released = os.pipe()
        self._terminal, terminal = os.pipe()  # not a file: a test may forbid files to grow
        os.set_blocking(self._terminal, False)
        self._said = b""
        self.pid = os.fork()
        if not self.pid:
            status = 99
            try:
                status = _run(work, reached, released, terminal)
            finally:
                os._exit(status)
        for end in (reached, released, terminal):
            os.close(end)
        self.status: int | None = None

    def reach(self) -> None:
        """Wait until the process is at its point."""
        there, _, _ = select.select([self._reached], [], [], DEADLINE)
        if not there or not os.read(self._reached, 1):
            raise AssertionError(f"the process did not reach its point:\n{self.said()}")

    def stop(self, number: int) -> int:
        """Send a signal, and let a process that lives on go on; the exit code, negative if it died of the signal."""
        os.kill(self.pid, number)
        with suppress(BrokenPipeError):
            os.write(self._released, b".")
        return self.wait()

    def wait(self) -> int:
        """The exit code."""
        end = time.monotonic() + DEADLINE
        while self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise AssertionError(f"the process did not end:\n{self.said()}")
            else:
                self.said()  # so that the pipe does not fill
                time.sleep(0.01)
        return self.status

    def said(self) -> str:
        """What it wrote to the terminal."""
        with suppress(BlockingIOError):
            while some := os.read(self._terminal, 1 << 16):
                self._said += some
        return self._said.decode()

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for end in (self._reached, self._released, self._terminal):
            os.close(end)


@contextmanager
def other_process(work: Callable[[Announce], Any]) -> Iterator[OtherProcess]:
    process = OtherProcess(work)
    try:
        yield process
    finally:
        process.close()


def _run(work: Callable[[Announce], Any], reached: int, released: int, terminal: int) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test's runner may ignore it
    sys.stdout = sys.stderr = os.fdopen(terminal, "w", buffering=1)
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: print(message)

    def announce() -> None:
        os.write(reached, b".")
        os.read(released, 1)

    try:
        work(announce)
    except SystemExit as error:  # Lightning's answer to Ctrl-C
        return int(error.code or 0)
    except KeyboardInterrupt:
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def stop_within_probe(monkeypatch: pytest.MonkeyPatch, step: int, after: str | None, announce: Announce) -> None:
    """Announce in the midst of a model pass of one step's probe: the first pass, or the first after a phase."""
    measure = RunProbe.measure

    def measured(self: RunProbe, at: int, on_pass: Callable[[str], None] = lambda phase: None) -> Any:
        over: list[str | None] = [None]

        def noted(phase: str) -> None:
            over.append(phase)
            on_pass(phase)

        def within(*_: Any) -> None:
            if at == step and over[-1] == after and next(calls) == 0:
                announce()

        calls = count()
        layer = next(module for name, module in self.model.named_modules() if name.endswith("q_proj"))
        handle = layer.register_forward_hook(within)
        try:
            return measure(self, at, noted)
        finally:
            handle.remove()

    monkeypatch.setattr(RunProbe, "measure", measured)
