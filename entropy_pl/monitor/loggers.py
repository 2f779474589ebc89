"""Where a record goes once it is written: the run's own loggers, and the terminal at its end."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.files import written_whole
from entropy_pl.records import Record, probes_of, read_records
from entropy_pl.reporting import (
    AttributedTokens,
    add_margin_charts,
    attribution_page,
    attribution_table,
    components_figure,
    delta_entropy_figure,
    eta_sweep_figure,
    exchange_rate_figure,
    influence_matrix_figure,
    influence_scatter_figure,
    influence_share_figure,
    probe_table,
    scalars,
    top_tokens_figure,
)
from entropy_pl.reporting.tensorboard import WARNINGS
from entropy_pl.reporting.trust import warnings_by_text

SWEEP_TAG, ATTRIBUTION_TAG = "entropy_probe/eta_sweep", "entropy_probe/attribution/"
ATTRIBUTION_FOLDER = "attribution"
CAUTIONS = 10  # warnings under the closing table; the records and the report have all of them


class RunLogger:
    """One of the run's loggers, which takes numbers and need not take more."""

    tensorboard: str | None = None
    """Folder to open TensorBoard on, if it is one of its."""

    def prepare(self, reward: bool, counterfactuals: Sequence[str]) -> None:
        """Before the first number comes: whether there will be rewards, and which other losses."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        raise NotImplementedError

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture, where the logger takes pictures."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Log a text, where the logger takes texts."""


class TensorBoardRunLogger(RunLogger):
    """A TensorBoard writer, whoever owns it.

    Args:
        writer: of event files.
        folder: to open TensorBoard on.
    """

    def __init__(self, writer: SummaryWriter, folder: str) -> None:
        self.tensorboard = folder
        self._writer = writer

    def prepare(self, reward: bool, counterfactuals: Sequence[str]) -> None:
        """Lay out the margin charts."""
        add_margin_charts(self._writer, reward=reward, counterfactuals=counterfactuals)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture."""
        self._writer.add_figure(tag, draw(), global_step=step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Log a text."""
        self._writer.add_text(tag, text, step)


def publish(record: Record, loggers: Sequence[RunLogger], tokens: AttributedTokens | None, folder: Path) -> None:
    """Log a record's scalars and pictures, and write what was attributed beside the records; what fails is warned of.

    Args:
        record: of one probe.
        loggers: the run's loggers.
        tokens: what every token did, where that is known.
        folder: of the records.
    """
    step, values = record.step, scalars(record)
    assert step is not None  # every probe has one
    figures: dict[str, Callable[[], Figure]] = {}
    if record.is_ok:
        figures[SWEEP_TAG] = partial(eta_sweep_figure, record)
    if tokens is not None:
        drawings = {
            "top_tokens": top_tokens_figure,
            "influence": influence_scatter_figure,
            "share": influence_share_figure,
            "matrix": influence_matrix_figure,
        }
        if tokens.matrix is None:
            del drawings["matrix"]
        figures |= {f"{ATTRIBUTION_TAG}{tag}": partial(draw, tokens) for tag, draw in drawings.items()}
        with without_ending_the_run(f"write the attributed tokens of step {step}"):
            _write_tokens(tokens, folder / ATTRIBUTION_FOLDER / f"step_{step:06d}")
    for logger in loggers:
        with without_ending_the_run(f"log the probe of step {step}"):
            if values:
                logger.scalars(values, step)
            for tag, draw in figures.items():
                logger.figure(tag, draw, step)
            if record.warnings:
                logger.text(WARNINGS, "\n\n".join(record.warnings), step)


def _write_tokens(tokens: AttributedTokens, name: Path) -> None:
    """All numbers, and a page; each appears once it is whole."""
    tokens.save(name.with_suffix(".npz"))
    title = f"Who moved the entropy: optimizer step {tokens.step}"
    with written_whole(name.with_suffix(".html")) as page:
        page.write_text(attribution_page(tokens, title=title), encoding="utf-8")


@contextmanager
def without_ending_the_run(what: str, advice: str | Callable[[], str] = "") -> Iterator[None]:
    """A full disk or a logger that is down must not end a training run.

    Args:
        what: is tried, for the warning.
        advice: what comes of it, or what to do; asked for once it has failed.
    """
    try:
        yield
    except Exception as error:
        more = advice() if callable(advice) else advice
        reason = f"{type(error).__name__}: {error}" + (f": {more}" if more else "")
        warnings.warn(f"could not {what}, training goes on. {reason}", stacklevel=3)


def _at(steps: Sequence[int | None]) -> str:
    """Which steps a warning is of, before its text."""
    shown = ", ".join(map(str, steps[:4])) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")
    return f"(step{'s' if len(steps) > 1 else ''} {shown}) "


def summarize(records_path: Path, loggers: Sequence[RunLogger]) -> None:
    """Draw the run's figures beside its records, print its table, and say where everything lies."""
    records = probes_of([record for record in read_records(records_path) if isinstance(record.get("step"), int)])
    drawings = {"delta_entropy": delta_entropy_figure}
    if any(record.attribution for record in records):
        drawings["components"] = components_figure
    if any(record.exchange_rate for record in records):
        drawings["exchange_rate"] = exchange_rate_figure
    pictures = []
    for name, draw in drawings.items():
        with without_ending_the_run(f"draw {name}.png"):
            draw(records).savefig(records_path.with_name(f"{name}.png"))
            pictures.append(records_path.with_name(f"{name}.png"))
    console = Console(soft_wrap=True)
    console.print(probe_table(records))
    attributed = [record for record in records if record.attribution or record.counterfactuals]
    if attributed:
        console.print(attribution_table(attributed[-1]))
    lines = [f"caution  {_at(steps)}{text}" for text, steps in list(warnings_by_text(records).items())[:CAUTIONS]]
    lines += [f"records  {records_path}", *(f"figure   {path}" for path in pictures)]
    pages = sorted((records_path.parent / ATTRIBUTION_FOLDER).glob("step_*.html"))
    lines += [f"tokens   {pages[-1]}" + (f" and {len(pages) - 1} more" if len(pages) > 1 else "")] if pages else []
    lines += [
        f"curves   tensorboard --logdir {logger.tensorboard}" for logger in loggers if logger.tensorboard is not None
    ]
    run = records_path.parent.parent if records_path.parent.name == "entropy_probe" else records_path.parent
    lines.append(f"report   entropy-pl report {shlex.quote(str(run))}")
    console.print("\n".join(lines), highlight=False, markup=False)
