"""What attribution costs: an update of 128 completions, measured on 256, in scoring passes and in memory.

    python -m benchmarks.attribution_cost --policy path/to/policy --data path/to/gsm8k [--cache folder] [--threads 1]

A LoRA policy (configs/grpo_gsm8k.yaml's sizes) takes an AdamW step, and it is attributed to completions of the policy's
own to GSM8K prompts. The unit is one plain scoring pass over E and U together, in the same run. Memory is the peak
beside the run's, each in a process of its own, since what one call has freed the next one finds. Sampling takes long:
--cache keeps the completions. On a busy machine say --threads 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.policies import TEMPLATE, adamw_step, described, log_prob_coefficients
from entropy_pl import (
    PromptDataModule,
    Rollout,
    UpdateVector,
    load_policy,
    sample_completions,
    token_stats,
    token_stats_jvp,
)
from entropy_pl.attribution import (
    attribute_update,
    fisher_kernel,
    fisher_kernel_cost,
    influence_matrix,
    influence_matrix_cost,
)
from entropy_pl.policy.gradients import sequence_gradients
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.probe import peak_memory, timed
from entropy_pl.progress import parts_shown, progress

MIB = 2**20
FIELDS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def main() -> None:
    options = arguments()
    console = Console()
    with parts_shown(True):  # sampling
        model, e, u = build(options)
    console.print(f"E: {described(e)}; U: {described(u)}; {torch.get_num_threads()} threads")
    for part, table in (("times", lambda: times(options, model, e, u)), ("memory", lambda: memory(options))):
        if part in options.parts:
            console.print(table())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--parts", nargs="+", choices=["times", "memory"], default=["times", "memory"])
    for name, value in {"e": 256, "prompts": 16, "generations": 8, "tokens": 150, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-batch-tokens", type=int, default=None)
    return parser.parse_args()


def build(options: argparse.Namespace) -> tuple[nn.Module, Rollout, Rollout]:
    """The policy with its adapter, and both batches, drawn from it."""
    torch.set_num_threads(options.threads)
    with isolated_rng(0):
        model, tokenizer = load_policy(options.policy)
    cached = options.cache and options.cache / f"{options.e}-{options.prompts}x{options.generations}.pt"
    if cached and cached.is_file():
        saved = torch.load(cached, weights_only=True)
        return model, Rollout(*saved["e"]), Rollout(*saved["u"])
    prompts = PromptDataModule("gsm8k_r1_template", options.data, TEMPLATE, e_size=options.e, u_size=options.prompts)
    with isolated_rng(0):
        e = sample_completions(model, tokenizer, prompts.e_prompts, max_new_tokens=options.tokens)
        u = sample_completions(
            model, tokenizer, prompts.u_prompts, num_completions=options.generations, max_new_tokens=options.tokens
        )
    if cached:
        options.cache.mkdir(exist_ok=True, parents=True)
        torch.save({name: [getattr(batch, f) for f in FIELDS] for name, batch in (("e", e), ("u", u))}, cached)
    return model, e, u


def times(options: argparse.Namespace, model: nn.Module, e: Rollout, u: Rollout) -> Table:
    update, decayed = (adamw_step(model, u, weight_decay=decay) for decay in (0.0, 0.01))
    coefficients = log_prob_coefficients(u).logp / u.completion_mask.sum()
    signs = torch.where(torch.arange(len(u)) % 2 == 0, 1.0, -1.0)
    budget = {"max_batch_tokens": options.max_batch_tokens}
    base, tangent = token_stats_jvp(model, e, update, **budget)
    seconds: dict[str, float] = {}
    phases: dict[str, dict[str, float]] = {}

    def attribute(label: str, v: UpdateVector, **given: Any) -> None:
        with timed(seconds, "unit", model):  # next to it, so that what else the machine does falls on both alike
            token_stats(model, e, **budget)
            token_stats(model, u, **budget)
        clock = _Clock(phases.setdefault(label, {}))
        with timed(seconds, label, model):
            attribute_update(
                model, e, u, v, token_coefficients=coefficients, advantages=signs, on_pass=clock, **budget, **given
            )

    kinds: dict[str, tuple[UpdateVector, dict[str, Any]]] = {
        "attribute_update, alone": (update, {}),
        "  with weight decay": (decayed, {}),
        "  in a probe": (update, {"base": base, "tangent": tangent}),
    }
    with progress("attributions", options.repeats * len(kinds), "attribution") as bar:
        for _ in range(options.repeats):
            for label, (v, given) in kinds.items():
                attribute(label, v, **given)
                bar.update()
    unit = seconds.pop("unit") / (3 * options.repeats)
    rows = [(label, total / options.repeats, shares(phases[label], total)) for label, total in seconds.items()]
    metric = update.preconditioner
    rows.append(
        measured(
            model,
            f"influence_matrix [{len(e)}, {len(u)}]",
            lambda: influence_matrix(model, e, u, update, token_coefficients=coefficients, base=base),
            str(influence_matrix_cost(model, len(e), len(u), update)),
        )
    )
    rows.append(
        measured(
            model,
            f"fisher_kernel [{len(u)}, {len(u)}]",
            lambda: fisher_kernel(model, u, u, preconditioner=metric),
            str(fisher_kernel_cost(model, u, u, preconditioner=metric)),
        )
    )

    def one_by_one() -> None:
        for _ in sequence_gradients(model, few, log_prob_coefficients(few), update.direction):
            pass

    few = u.select(torch.arange(min(32, len(u))))
    label, took, _ = measured(model, f"gradients of {len(few)} single sequences", one_by_one, "")
    rows.append((label, took, f"{len(few) / took:.1f} a second"))
    table = Table(title=f"Time; one pass over E and U takes {unit:.2f} s")
    table.add_column("")
    table.add_column("passes", justify="right")
    table.add_column("s", justify="right")
    table.add_column("of which")
    for label, took, note in rows:
        table.add_row(label, f"{took / unit:.2f}", f"{took:.2f}", note)
    return table


class _Clock:
    """Seconds between one pass's end and the next one's, by phase."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now


def shares(phases: dict[str, float], total: float) -> str:
    parts = {**phases, "the rest": total - sum(phases.values())}
    return ", ".join(f"{phase} {100 * seconds / total:.0f} %" for phase, seconds in parts.items())


def measured(model: nn.Module, label: str, work: Callable[[], object], note: str) -> tuple[str, float, str]:
    seconds: dict[str, float] = {}
    with timed(seconds, label, model):
        work()
    return label, seconds[label], note


def memory(options: argparse.Namespace) -> Table:
    table = Table(title="MiB beside the run's")
    for name in ("U", "scoring E and U", "attribute_update", "fisher_kernel"):
        table.add_column(name, justify="right")
    for rows in (options.prompts * options.generations // 4, options.prompts * options.generations):
        found = [in_a_process(options, rows, what) / MIB for what in ("score", "attribute", "kernel")]
        table.add_row(str(rows), *(f"{amount:.0f}" for amount in found))
    return table


def in_a_process(options: argparse.Namespace, rows: int, what: str) -> int:
    with get_context("spawn").Pool(1) as pool:
        return int(pool.apply(added, (options, rows, what)))


def added(options: argparse.Namespace, rows: int, what: str) -> int:
    """Peak bytes of one call beyond those in use, the step itself taken before."""
    model, e, u = build(options)
    u = u.select(torch.arange(rows))
    update = adamw_step(model, u)
    coefficients = log_prob_coefficients(u).logp / u.completion_mask.sum()
    budget = {"max_batch_tokens": options.max_batch_tokens}
    with peak_memory(model_device(model)) as found:
        if what == "score":
            token_stats(model, e, **budget)
            token_stats(model, u, **budget)
        elif what == "attribute":
            attribute_update(model, e, u, update, token_coefficients=coefficients, **budget)
        else:
            fisher_kernel(model, u, u, preconditioner=update.preconditioner)
    return found.added


if __name__ == "__main__":
    main()
