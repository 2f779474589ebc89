"""Where a record goes once it is written: the run's own loggers, and the terminal at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from entropy_pl.reporting import (
    Record,
    add_margin_charts,
    delta_entropy_figure,
    eta_sweep_figure,
    latest_per_step,
    probe_table,
    read_records,
    scalars,
)

SWEEP_TAG = "entropy_probe/eta_sweep"


class Sink:
    """One of the run's loggers, which takes numbers and need not take more."""

    tensorboard: str | None = None
    """Folder to open TensorBoard on, if it is one of its."""

    def prepare(self) -> None:
        """Before the first number comes."""

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        raise NotImplementedError

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture, where the logger takes pictures."""


class TensorBoardSink(Sink):
    """A TensorBoard writer, whoever owns it.

    Args:
        writer: of event files.
        folder: to open TensorBoard on.
    """

    def __init__(self, writer: SummaryWriter, folder: str) -> None:
        self.tensorboard = folder
        self._writer = writer

    def prepare(self) -> None:
        """Lay out the margin charts."""
        add_margin_charts(self._writer)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Log numbers by tag."""
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def figure(self, tag: str, draw: Callable[[], Figure], step: int) -> None:
        """Log a picture."""
        self._writer.add_figure(tag, draw(), global_step=step)


def publish(record: Record, sinks: Sequence[Sink]) -> None:
    """Log a record's scalars, and its η-sweep."""
    values = scalars(record)
    for sink in sinks:
        if values:
            sink.scalars(values, record["step"])
        if record["status"] == "ok":
            sink.figure(SWEEP_TAG, lambda: eta_sweep_figure(record), record["step"])


def summarize(records_path: Path, sinks: Sequence[Sink]) -> None:
    """Draw the run's figure beside its records, print its table, and say where everything lies."""
    records = latest_per_step(read_records(records_path))
    picture = records_path.parent / "delta_entropy.png"
    delta_entropy_figure(records).savefig(picture)
    console = Console(soft_wrap=True)
    console.print(probe_table(records))
    lines = [f"records  {records_path}", f"figure   {picture}"]
    lines += [f"curves   tensorboard --logdir {sink.tensorboard}" for sink in sinks if sink.tensorboard is not None]
    console.print("\n".join(lines), highlight=False, markup=False)
