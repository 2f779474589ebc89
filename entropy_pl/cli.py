"""The command line: ``entropy-pl fit --config run.yaml`` trains with GRPO and probes the entropy while it does."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence

SHOW_TRACEBACK = "ENTROPY_PL_TRACEBACK"
NOISE = (
    ".*is_gradient_checkpointing.*",  # PEFT asking Transformers by an old name
    ".*does not have many workers.*",  # prompts are short strings
    ".*treespec.*",
)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of ``entropy-pl``.

    Args:
        args: command-line words; None takes the process's own.

    Raises:
        SystemExit: with status 2 and one message for bad words, a bad config file or an impossible setting. With the
            environment variable ENTROPY_PL_TRACEBACK set, the error itself is raised.
    """
    _leave_out_what_nobody_can_act_on()
    from entropy_pl.training import UsageError, run_cli

    try:
        run_cli(args)
    except UsageError as error:
        if os.environ.get(SHOW_TRACEBACK):
            raise
        print(f"entropy-pl: error: {error}\n(set {SHOW_TRACEBACK}=1 to see where)", file=sys.stderr)
        raise SystemExit(2) from error


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
