"""``measure`` and ``study``: what the command line does with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from entropy_pl.config import SettingsParser, UsageError
from entropy_pl.measurements import EntropyMeasurements, MeasurementSettings
from entropy_pl.measurements.results import FIGURE, PAGE, RESULTS, TOKENS
from entropy_pl.registry import did_you_mean
from entropy_pl.reporting import attribution_table, sweep_table


def run_measure(words: Sequence[str]) -> None:
    """Measure once, print the sweep and, if asked, who moved the entropy, and say where the results lie.

    Raises:
        UsageError: for a bad config, a checkpoint that cannot be used, or batches no estimate can be made of.
    """
    parser = SettingsParser(
        MeasurementSettings,
        program="entropy-pl measure",
        description="Measure the entropy change of a checkpoint's next optimizer step, or between two checkpoints.",
    )
    with _as_usage_errors():
        settings = parser.parse(words)
        results = EntropyMeasurements(settings).run_experiments()
    console = Console(soft_wrap=True)
    console.print(sweep_table(results))
    if results["attribution"] or results["counterfactuals"]:
        console.print(attribution_table(results))
    lines = [f"absent   {name}: {why}" for name, why in results["absent"].items()]
    if settings.output_directory is not None:
        folder = Path(settings.output_directory)
        lines += [f"results  {folder / RESULTS}", f"figure   {folder / FIGURE}"]
        lines += [f"tokens   {folder / PAGE} and {folder / TOKENS}"] if results["attribution"] else []
    if settings.detailed_logging.enabled:
        lines.append(f"log      {settings.detailed_logging.output_directory}")
    if lines:
        console.print("\n".join(lines), highlight=False, markup=False)


def run_study(words: Sequence[str]) -> None:
    """Run a study, go on with an interrupted one, and say where its table, figures and report lie.

    Raises:
        UsageError: as :func:`run_measure`, or for a study there is none of.
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
    with _as_usage_errors():
        outcome = study.run(parser.parse(words[1:]))
    Console(soft_wrap=True).print(outcome.text, highlight=False, markup=False)


@contextmanager
def _as_usage_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, ArithmeticError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error
