"""Run benchmarks: ``python -m benchmarks [names] [--policy FOLDER --data FOLDER] [--write docs/performance.md]``.

Without names all that the machine can run. Every figure is a ratio of times taken in turns in one run, or says what it
is. ``--write`` puts the tables between their markers in a document.
"""

from __future__ import annotations

import argparse
import importlib
import os
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks.hardware import machine
from benchmarks.options import Options
from benchmarks.tables import Table, write_tables
from entropy_pl.progress import progress

NAMES = ("floor", "scoring", "probes", "growth", "memory", "sampling", "grpo_step", "overhead", "gpu")


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may wait for a model hub
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    options = Options(chosen.policy, chosen.data, chosen.sequences, chosen.rounds, chosen.device, chosen.small)
    names = chosen.names or [name for name in NAMES if name != "gpu" or options.device == "cuda"]
    console = Console(width=None if Console().is_terminal else 160)
    console.print(machine(options.device))
    tables = [Table("machine", "Machine", ("what",), [(machine(options.device),)])]
    with progress("benchmarks", len(names), "benchmark") as bar:
        for name in names:
            bar.set_postfix_str(name)
            for table in importlib.import_module(f"benchmarks.{name}").run(options):
                with tqdm.external_write_mode(console.file):
                    console.print(table.rich())
                console.file.flush()  # into a file as well
                tables.append(table)
            if chosen.write:  # as they come: what follows may fail
                absent = write_tables(chosen.write, tables)
                if absent:
                    bar.write(f"no markers in {chosen.write} for: {', '.join(absent)}")
            bar.update()
    if chosen.write:
        console.print(f"tables   {chosen.write}", highlight=False)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="name", help=", ".join(NAMES))
    parser.add_argument("--policy", help="folder of a policy; without one: random weights of the 4M policy's shape")
    parser.add_argument("--data", help="folder with GSM8K's train.jsonl and test.jsonl; goes with --policy")
    parser.add_argument("--sequences", type=int, default=Options.sequences, help="completions of the E-batch")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="that are counted, after one that is not")
    parser.add_argument("--threads", type=int, help="of PyTorch on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--small", action="store_true", help="sizes that take seconds, and whose figures mean nothing")
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the tables between its markers")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
