"""The command line: ``entropy-pl fit`` trains and probes, ``measure`` and ``study`` look at a checkpoint."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

from entropy_pl.registry import did_you_mean
from entropy_pl.version import __version__

SHOW_TRACEBACK = "ENTROPY_PL_TRACEBACK"
NOISE = (
    ".*is_gradient_checkpointing.*",  # PEFT asking Transformers by an old name
    ".*does not have many workers.*",  # prompts are short strings
    ".*treespec.*",
)
COMMANDS = {
    "fit": "train with GRPO and probe the entropy of chosen optimizer steps",
    "measure": "measure the entropy change of a checkpoint's next optimizer step, or between two checkpoints",
    "study": "repeat measurements: linear-regime, variance or convergence",
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
        SystemExit: with status 2 and one message for bad words, a bad config file or an impossible setting. With the
            environment variable ENTROPY_PL_TRACEBACK set, the error itself is raised.
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
    from entropy_pl.config import UsageError

    try:
        _run(command, words, own=args is None)
    except UsageError as error:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        print(f"entropy-pl: error: {error}\n(set {SHOW_TRACEBACK}=1 to see where)", file=sys.stderr)
        raise SystemExit(2) from error


def _run(command: str, words: list[str], own: bool) -> None:
    # each command imports what it needs: an offline one no Trainer
    if command == "fit":
        from entropy_pl.training import run_fit

        run_fit(None if own else words)  # LightningCLI warns of words that are the process's own
    else:
        from entropy_pl.offline import run_measure, run_study

        (run_measure if command == "measure" else run_study)(words[1:])


def _leave_out_what_nobody_can_act_on() -> None:
    """Before the heavy imports, since some of them speak while they are imported."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Lightning advertises its hosted services at the start of every run.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in str(record.msg))
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
