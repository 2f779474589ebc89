"""Where a record goes once it is written: the Trainer's loggers, and the terminal at the end of the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from rich.console import Console

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


def prepare(loggers: Sequence[Logger]) -> None:
    """Lay out TensorBoard's margin charts before the first number comes."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            add_margin_charts(logger.experiment)


def publish(record: Record, loggers: Sequence[Logger]) -> None:
    """Log a record's scalars, and its η-sweep where the logger takes pictures."""
    values = scalars(record)
    for logger in loggers:
        if values:
            logger.log_metrics(values, step=record["step"])
        if record["status"] != "ok":
            continue
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure(SWEEP_TAG, eta_sweep_figure(record), global_step=record["step"])
        elif hasattr(logger, "log_image"):  # W&B's and its like
            logger.log_image(key=SWEEP_TAG, images=[eta_sweep_figure(record)], step=record["step"])


def summarize(records_path: Path, loggers: Sequence[Logger]) -> None:
    """Draw the run's figure beside its records, print its table, and say where everything lies."""
    records = latest_per_step(read_records(records_path))
    picture = records_path.parent / "delta_entropy.png"
    delta_entropy_figure(records).savefig(picture)
    console = Console(soft_wrap=True)
    console.print(probe_table(records))
    lines = [f"records  {records_path}", f"figure   {picture}"]
    lines += [f"curves   tensorboard --logdir {log.root_dir}" for log in loggers if isinstance(log, TensorBoardLogger)]
    console.print("\n".join(lines), highlight=False, markup=False)
