"""The floor of a forward pass here: its operations over the rate at which this machine multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from benchmarks.hardware import product_rate
from benchmarks.operations import Counts
from benchmarks.options import Options
from benchmarks.policies import build_case
from benchmarks.scoring import reference
from benchmarks.tables import Table
from benchmarks.timing import interleaved
from entropy_pl import token_stats


def run(options: Options) -> list[Table]:
    """A bare forward and a scoring pass in units of the floor."""
    case = build_case(options)
    counts = Counts.of(case.model)
    completions = case.rollout.completion_lengths
    lengths = case.rollout.prompt_lengths + completions
    flops = counts.forward(lengths, completions)
    rate = product_rate(case.device, torch.float32, options.pick(2048, 64))
    works: dict[str, Callable[[], object]] = {
        "bare forward": reference(case),
        "token_stats, float64 entropies": partial(token_stats, case.model, case.rollout),
    }
    times = interleaved(works, options.rounds, case.device)
    rows = [("floor: products, at the rate of a large one", f"{flops / 1e9:.1f}", f"{flops / rate:.2f}", "1")]
    for name in works:
        seconds = times.median(name)
        rows.append((name, "", f"{seconds:.2f}", f"{seconds * rate / flops:.2f}"))
    note = f"Products of large float32 matrices run here at {rate / 1e9:.0f} GFLOP/s."
    return [Table("floor", f"Floor; {case.what}", ("work", "GFLOP", "s", "of the floor"), rows, (note,))]
