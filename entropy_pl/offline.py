"""``measure`` and ``study``: what the command line does with a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from entropy_pl.config import SettingsParser, UsageError
from entropy_pl.failures import NO_ROOM, RunError, RunState, RunStopError, named_files, users_place
from entropy_pl.measurements import EntropyMeasurements, MeasurementSettings
from entropy_pl.measurements.results import CONFIG, FIGURE, PAGE, RESULTS, TOKENS
from entropy_pl.registry import did_you_mean
from entropy_pl.reporting import attribution_table, sweep_table

LESS_MEMORY = (
    "generation.max_batch_tokens (of every pass), generation.sample_batch_size (of sampling), or batch_config.B_E and "
    "batch_config.B_U (of everything)"
)


def run_measure(words: Sequence[str]) -> None:
    """Measure once, print the sweep and, if asked, who moved the entropy, and say where the results lie.

    Raises:
        UsageError: for a bad config, a checkpoint that cannot be used, or batches no estimate can be made of.
        RunError: for anything else that goes wrong.
        RunStopError: after Ctrl-C.
    """
    parser = SettingsParser(
        MeasurementSettings,
        program="entropy-pl measure",
        description="Measure the entropy change of a checkpoint's next optimizer step, or between two checkpoints.",
    )
    with _ending_well(RunState("reading the settings")):
        settings = parser.parse(words)
    with _ending_well(_state_of(settings, "the measurement")):
        results = EntropyMeasurements(settings).run_experiments()
    console = Console(soft_wrap=True)
    console.print(sweep_table(results))
    if results["attribution"] or results["counterfactuals"]:
        console.print(attribution_table(results))
    files: list[tuple[str, object]] = [("absent", f"{name}: {why}") for name, why in results["absent"].items()]
    files += [("caution", warning) for warning in results["warnings"]]
    if settings.output_directory is not None:
        folder = Path(settings.output_directory)
        files += [("results", folder / RESULTS), ("figure", folder / FIGURE)]
        files += [("tokens", f"{folder / PAGE} and {folder / TOKENS}")] if results["attribution"] else []
        files.append(("config", folder / CONFIG))
    if settings.detailed_logging.enabled:
        files.append(("log", settings.detailed_logging.output_directory))
    if files:
        console.print("\n".join(named_files(files)), highlight=False, markup=False)


def run_study(words: Sequence[str]) -> None:
    """Run a study, go on with an interrupted one, and say where its table, figures and report lie.

    Raises:
        UsageError: as :func:`run_measure`, or for a study there is none of.
        RunError: as :func:`run_measure`.
        RunStopError: as :func:`run_measure`.
    """
    from entropy_pl.studies import STUDIES

    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(f"usage: entropy-pl study {{{','.join(STUDIES)}}} --config FILE [--KEY VALUE ...]")
        raise SystemExit(0)
    if name not in STUDIES:
        raise UsageError(f"expected a study out of {', '.join(STUDIES)}, got {name!r}{did_you_mean(name, STUDIES)}")
    study = STUDIES[name]
    parser = SettingsParser(study.settings, program=f"entropy-pl study {name}", description=study.description)
    with _ending_well(RunState("reading the settings")):
        settings = parser.parse(words[1:])
    again = shlex.join(["entropy-pl", "study", *words])
    with _ending_well(_state_of(settings, f"the study {name}", resume=f"{again} (what is finished is kept)")):
        outcome = study.run(settings)
    Console(soft_wrap=True).print(outcome.text, highlight=False, markup=False)


def _state_of(settings: MeasurementSettings, doing: str, resume: str | None = None) -> RunState:
    folder = None if settings.output_directory is None else Path(settings.output_directory)
    return RunState(doing, folder, resume=resume, less_memory=LESS_MEMORY)


@contextmanager
def _ending_well(state: RunState) -> Iterator[None]:
    """What this package refuses is a matter of usage; anything else is a failure."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise RunStopError(state) from stop
    except (ValueError, OSError, ImportError) as error:
        if users_place(error) or (isinstance(error, OSError) and error.errno in NO_ROOM):
            raise RunError(state) from error
        raise UsageError(str(error)) from error
    except Exception as error:
        raise RunError(state) from error
