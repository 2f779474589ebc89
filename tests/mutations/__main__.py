"""Does a test see it? ``python -m tests.mutations [words] [--write docs/reliability.md]``.

Every mistake in :mod:`.mutations` is made in a throw-away copy of the repository, and the tests that should see it run
until one fails. Words choose those whose file or description holds one of them. The mistakes are chosen by hand: tools
that change operators at random (mutmut, cosmic-ray) find other gaps, but know nothing of prefixes and base policies.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks.tables import Table, write_tables
from tests.mutations.mutations import MUTATIONS, Mutation
from tests.mutations.sandbox import SECONDS, copy_of_the_repository, run_tests

FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)
SURVIVED = "**none**"


def main(arguments: list[str] | None = None) -> int:
    """Returns the number of survivors, and of tests that fail without any mutation."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="of file or description; none: all mutations")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table between its markers")
    chosen = parser.parse_args(arguments)
    mutations = [m for m in MUTATIONS if not chosen.words or any(word in f"{m.file} {m.what}" for word in chosen.words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    console = Console(width=None if Console().is_terminal else 160)
    with copy_of_the_repository() as copy:
        seen = []
        with Progress(console=console) as progress:
            for mutation in progress.track(mutations, description="mutations"):
                seen.append(first_failure(copy, mutation))
                console.print(f"{mutation.file}: {mutation.what}: {seen[-1] or 'SURVIVED'}", markup=False)
                console.file.flush()
        killers = sorted({test for test in seen if test})
        unsound = FAILED.findall(run_tests(copy, *killers)) if killers else []
    table = table_of(mutations, seen)
    console.print(table.rich())
    for test in unsound:
        console.print(f"fails without any mutation: {test}")
    if chosen.write:
        write_tables(chosen.write, [table])
    return seen.count(None) + len(unsound)


def first_failure(copy: Path, mutation: Mutation) -> str | None:
    """The test that sees the mutation; None if none does.

    Raises:
        RuntimeError: if no test ran.
    """
    path = copy / mutation.file
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        said = run_tests(copy, "-x", *mutation.tests)
    except TimeoutError:
        return f"{mutation.tests[0]}: no end after {SECONDS} s"
    finally:
        path.write_text(text)
    failed = FAILED.search(said)
    if failed is None and " passed" not in said:
        raise RuntimeError(f"expected tests of {mutation.file} to run, got\n{said}")
    return failed and failed.group(1)


def without_parameters(test: str) -> str:
    """File and function of a test, as docs/reliability.md names it."""
    file, *names = test.split("[")[0].split("::")
    return "::".join([file, *names[-1:]])


def table_of(mutations: list[Mutation], seen: list[str | None]) -> Table:
    """One row per mutation."""
    killed = len(seen) - seen.count(None)
    rows = [
        (mutation.what, f"`{mutation.file}`", SURVIVED if test is None else f"`{without_parameters(test)}`")
        for mutation, test in zip(mutations, seen, strict=True)
    ]
    title = f"{len(mutations)} mutations, {killed} of them seen by a test"
    return Table("mutations", title, ("mutation", "file", "test"), rows)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
