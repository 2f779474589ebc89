"""The command line: ``fit`` trains and probes, ``report`` shows a run, ``measure`` and ``study`` a checkpoint."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from tqdm import tqdm

from entropy_pl.progress import is_watched
from entropy_pl.registry import did_you_mean
from entropy_pl.version import __version__

NOISE = (
    ".*is_gradient_checkpointing.*",  # PEFT asking Transformers by an old name
    ".*does not have many workers.*",  # prompts are short strings
    ".*treespec.*",
    "(?s).*pre-optimization state.*",  # ModelCheckpoint: the state after a step is what a run goes on from
)
COMMANDS = {
    "fit": "train with GRPO and probe the entropy of chosen optimizer steps",
    "measure": "measure the entropy change of a checkpoint's next optimizer step, or between two checkpoints",
    "study": "repeat measurements: linear-regime, variance or convergence",
    "report": "draw a run as one HTML page: entropy-pl report RUN_DIR",
}
USAGE = "\n".join(
    [
        "usage: entropy-pl COMMAND --config FILE [--KEY VALUE ...]",
        "",
        "What one optimizer step does to a language model policy's entropy, measured with error bars.",
        "",
        "commands:",
        *(f"  {name:<9}{words}" for name, words in COMMANDS.items()),
        "",
        "entropy-pl COMMAND --help lists a command's keys; entropy-pl --version tells the version.",
    ]
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``entropy-pl``.

    Args:
        args: command-line words; None takes the process's own.

    Raises:
        SystemExit: with one message, on one screen, and status 2 for bad words, a bad config file or an impossible
            setting, 1 for a run that failed, 130 for one that Ctrl-C stopped and 143 for one that was terminated. With
            the environment variable ENTROPY_PL_TRACEBACK set, the error itself is raised.
    """
    words = list(sys.argv[1:] if args is None else args)
    command = next((word for word in words if not word.startswith("-")), None)
    if command is None and "--version" in words:
        print(f"entropy-pl {__version__}")
        raise SystemExit(0)
    if command is None and words and words[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0)
    if command not in COMMANDS or words[0] != command:
        got = f"{command!r}{did_you_mean(command, COMMANDS)}" if command else "none"
        print(
            f"entropy-pl: error: expected a command out of {', '.join(COMMANDS)}, got {got}\n\n{USAGE}", file=sys.stderr
        )
        raise SystemExit(2)

    _leave_out_what_nobody_can_act_on()
    if args is None:  # the process is this program's
        _warn_on_lines_of_their_own()
    try:
        _run(command, words, own=args is None)
    except (Exception, KeyboardInterrupt) as error:
        from entropy_pl.failures import SHOW_TRACEBACK

        if os.environ.get(SHOW_TRACEBACK):
            raise
        message, status = _ending(error, command)
        print(message, file=sys.stderr)
        raise SystemExit(status) from error


def _run(command: str, words: list[str], own: bool) -> None:
    # each command imports what it needs: an offline one no Trainer
    if command == "fit":
        from entropy_pl.training import run_fit

        run_fit(None if own else words)  # LightningCLI warns of words that are the process's own
    elif command == "report":
        from entropy_pl.report import run_report

        run_report(words[1:])
    else:
        from entropy_pl.offline import run_measure, run_study

        (run_measure if command == "measure" else run_study)(words[1:])


def _ending(error: BaseException, command: str) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    from entropy_pl.config import UsageError
    from entropy_pl.failures import (
        RunError,
        RunState,
        RunStopError,
        failure_message,
        fitted,
        stop_message,
        usage_message,
    )

    if isinstance(error, UsageError):
        return fitted(usage_message(error.__cause__ or error, str(error))), 2
    if isinstance(error, KeyboardInterrupt):
        error = RunStopError(RunState(command))
    if isinstance(error, RunStopError):
        return fitted(stop_message(error)), error.status
    if isinstance(error, RunError):
        return fitted(failure_message(error.__cause__ or error, error.state)), 1
    return fitted(failure_message(error, RunState(command))), 1


def _warn_on_lines_of_their_own() -> None:
    """Warnings without the source line, above the bars rather than in them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        tqdm.write(f"entropy-pl: warning: {message}", file=sys.stderr)

    warnings.showwarning = show


def _leave_out_what_nobody_can_act_on() -> None:
    """Set what must be set before the heavy imports: some of them print warnings when they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not is_watched():  # libraries' bars, which do not look
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Lightning advertises its hosted services at the start of every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
