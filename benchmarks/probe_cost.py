"""What a probe costs, against the formulas of docs/scaling.md: forward passes, and bytes beside the run's.

    python -m benchmarks.probe_cost [--layers 4] [--hidden 256] [--vocabulary 2048] [--sequences 64] [--tokens 100]

A Qwen2 of the given shape with random weights takes one AdamW step, with a LoRA adapter and as a whole, in float32 and
in bfloat16 weights, and is probed. Times are ratios to one plain scoring pass over the same tokens, in the same run;
memory is the process's resident set on a CPU, PyTorch's allocator on a GPU. Under torchrun the sequences are shared by
its processes, and the tables are the first one's.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.policies import LORA, Shape, random_rollout
from entropy_pl import EntropyProbe, Rollout, token_stats
from entropy_pl.peers import Peers
from entropy_pl.policy.micro_batches import model_device
from entropy_pl.probe import peak_memory, probe_memory, timed
from entropy_pl.progress import progress
from entropy_pl.updates import UpdateRecorder

MIB = 2**20


def main() -> None:
    options = arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    peers = Peers.of_this_run()
    torch.manual_seed(0)
    times, memory = Table(title="Forward passes"), Table(title="MiB beside the run's")
    for name in ("policy", "one pass, s", "formula", "tangents", "sweep", "all passes", "per η", "probe, s"):
        times.add_column(name, justify="right")
    for name in ("policy", "trainable", "formula", "measured", "snapshot", "displaced", "scoring", "reading"):
        memory.add_column(name, justify="right")
    kinds = ("LoRA", "whole", "whole, bfloat16")
    with progress("probes", len(kinds), "policy") as bar:
        for kind in kinds:
            model = build(options, kind).to(device)
            rows = torch.tensor(peers.share(list(range(options.sequences))), device=model_device(model))
            report(kind, model, batch(options, model_device(model)).select(rows), options, peers, times, memory)
            del model
            gc.collect()
            bar.update()
    if peers.rank == 0:
        Console().print(times, memory)
    if dist.is_initialized():
        dist.destroy_process_group()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = {
        "layers": 4,
        "hidden": 256,
        "vocabulary": 2048,
        "sequences": 64,
        "prompt": 100,
        "tokens": 100,
        "etas": 5,
    }
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--max-batch-tokens", type=int, default=None)
    return parser.parse_args()


def build(options: argparse.Namespace, kind: str) -> Any:
    shape = Shape(
        hidden=options.hidden,
        layers=options.layers,
        heads=max(1, options.hidden // 64),
        kv_heads=max(1, options.hidden // 128),
        inner=3 * options.hidden,
        vocabulary=options.vocabulary,
        context=options.prompt + options.tokens,
        tied=False,
    )
    model = shape.model(lora=LORA if kind == "LoRA" else None)
    return model.bfloat16() if "bfloat16" in kind else model


def batch(options: argparse.Namespace, device: torch.device) -> Rollout:
    return random_rollout(options.sequences, options.vocabulary, (options.prompt, 0), (options.tokens, 0)).to(device)


def report(
    kind: str,
    model: Any,
    rollout: Rollout,
    options: argparse.Namespace,
    peers: Peers,
    times: Table,
    memory: Table,
) -> None:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    tokens = rollout.completion_ids[:2, :16]
    for _ in range(2):  # the first step makes the moments, which are the run's
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    probe = EntropyProbe(
        eta_multipliers=[0.5 * (i + 1) for i in range(options.etas)],
        at_lr=False,
        max_batch_tokens=options.max_batch_tokens,
    )
    expected = probe_memory(
        model, probe, rows=len(rollout), prompt_tokens=options.prompt, max_new_tokens=options.tokens
    )
    token_stats(model, rollout, max_batch_tokens=options.max_batch_tokens)  # warm
    gc.collect()
    with peak_memory(model_device(model)) as found:
        recorder = UpdateRecorder(model, optimizer)
        recorder.snapshot()
        optimizer.step()
        update = recorder.read_lazily()
        with recorder.at_theta_before():
            result = probe.measure(model, rollout, update, peers=peers)
    seconds: dict[str, float] = {}
    for _ in range(3):
        with timed(seconds, "pass", model):
            token_stats(model, rollout, max_batch_tokens=options.max_batch_tokens)
    one = seconds["pass"] / 3
    tangents, sweep = (result.seconds[phase] / one for phase in ("tangents", "sweep"))
    times.add_row(
        kind,
        f"{one:.2f}",
        str(probe.passes(1.0)),
        f"{tangents:.2f}",
        f"{sweep:.2f}",
        f"{tangents + sweep:.2f}",
        f"{sweep / options.etas:.2f}",
        f"{sum(result.seconds.values()):.1f}",
    )
    unsampled = replace(expected, cache=0).total
    shown = (unsampled, found.added, expected.snapshot, expected.displaced, expected.scoring, expected.reading)
    memory.add_row(
        kind, f"{sum(p.numel() for p in trainable) / 1e6:.1f} M", *(f"{amount / MIB:.0f}" for amount in shown)
    )


if __name__ == "__main__":
    main()
