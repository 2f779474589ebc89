"""What a probe schedule adds to the wall time of a training run on a GPU, by counting: nothing is run.

A step of training: draw the rollout, one forward and backward pass. A probe: draw E, the passes of tangents and sweep
in float32, and of attribution. Drawing is decoding steps, each as long as its launches, its bytes or its operations,
whichever take longest.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.hardware import DEVICES, Device
from benchmarks.operations import Counts
from benchmarks.options import Options
from benchmarks.tables import Table
from entropy_pl.probe import EntropyProbe
from entropy_pl.probe.settings import ATTRIBUTION_PASSES, ATTRIBUTION_PASSES_OVER_U

CONFIG = Path(__file__).parents[1] / "configs/grpo_gsm8k_qwen2_5_1_5b.yaml"
QWEN2_5_1_5B = {
    "hidden": 1536,
    "layers": 28,
    "heads": 12,
    "kv_heads": 2,
    "head_size": 128,
    "inner": 8960,
    "vocabulary": 151_936,
}
AT_MOST = 0.1


@dataclass(frozen=True)
class Assumptions:
    """What no configuration says.

    Args:
        prompt: mean tokens of a prompt.
        completion: mean tokens of a completion; the longest is as long as allowed.
        launches_per_layer: kernels of a decoding step in eager mode, with a LoRA branch beside seven linear layers.
        launch: seconds from one to the next, Python's share included.
    """

    prompt: int = 160
    completion: int = 250
    launches_per_layer: int = 65
    launch: float = 15e-6


@dataclass(frozen=True)
class Run:
    """A training run and the schedule of its probe.

    Args:
        counts: of the policy.
        layers: of it.
        rollout: completions a step.
        max_new_tokens: of the longest.
        checkpointing: whether the forward pass is done again on the way back.
        updates: optimizer steps a rollout.
        every_n_steps: distance of probes.
        sequences: completions of E.
        passes: over E, of tangents and sweep.
        attribution: whether there is one.
        precision: of the probe's products, ``float32`` or ``tf32``.
    """

    counts: Counts
    layers: int
    rollout: int
    max_new_tokens: int
    checkpointing: bool
    updates: int
    every_n_steps: int
    sequences: int
    passes: int
    attribution: bool = True
    precision: str = "float32"


def read(path: Path = CONFIG) -> Run:
    """The run of a configuration file, of the shape of Qwen2.5-1.5B."""
    config: dict[str, Any] = yaml.safe_load(path.read_text())
    model, probe = config["model"], config["probe"]
    matmul = probe.get("matmul_precision", "highest")
    return Run(
        counts=Counts.from_sizes(**QWEN2_5_1_5B, rank=model["policy"]["lora"]["rank"]),
        layers=QWEN2_5_1_5B["layers"],
        rollout=config["data"]["batch_size"] * model["num_generations"],
        max_new_tokens=model["max_new_tokens"],
        checkpointing=model["policy"]["gradient_checkpointing"],
        updates=model["updates_per_rollout"],
        every_n_steps=probe["every_n_steps"],
        sequences=probe["num_sequences"],
        passes=EntropyProbe(eta_multipliers=probe["eta_multipliers"]).passes(lr=1.0),
        attribution=probe.get("attribution", True),
        precision="float32" if matmul == "highest" else "tf32",
    )


def run(options: Options) -> list[Table]:
    """The fraction that the configuration's schedule adds, and others."""
    here, assumed = read(), Assumptions()
    cases = [(name, here, assumed) for name in DEVICES]
    others = [
        replace(here, attribution=not here.attribution),
        *(replace(here, sequences=n, attribution=a) for n in (128, 64) for a in (True, False)),
        *(replace(here, precision="tf32", attribution=a) for a in (True, False)),
    ]
    cases += [("H100 SXM", schedule, assumed) for schedule in others]
    cases.append(("H100 SXM", here, replace(assumed, launch=assumed.launch / 3)))
    rows = [_row(*case) for case in cases]
    columns = ("schedule", "step, s", "probe, s", "of which", f"adds, every {here.every_n_steps}", "≤ 10 % from every")
    notes = (
        f"By counting, not by measurement, for {CONFIG.name}. Assumed: prompts of {assumed.prompt} tokens, completions "
        f"of {assumed.completion} and at most {here.max_new_tokens}; {assumed.launches_per_layer} launches of "
        f"{1e6 * assumed.launch:.0f} µs a layer and decoding step where not said otherwise; "
        f"{100 * DEVICES['H200'].reach:.0f} % of the tensor cores' peak and "
        f"{100 * DEVICES['H200'].reach_float32:.0f} % of strict float32's.",
    )
    return [Table("overhead", "What a probe adds to training", columns, rows, notes)]


def _row(name: str, schedule: Run, assumed: Assumptions) -> tuple[str, ...]:
    device = DEVICES[name]
    probe = probe_seconds(schedule, device, assumed)
    what = (
        f"{name}: |E| = {schedule.sequences}, {schedule.precision}, "
        f"{'with' if schedule.attribution else 'no'} attribution"
    )
    if assumed != Assumptions():
        what += f", {1e6 * assumed.launch:.0f} µs a launch"
    return (
        what,
        f"{step_seconds(schedule, device, assumed):.1f}",
        f"{sum(probe.values()):.1f}",
        ", ".join(f"{part} {seconds:.1f}" for part, seconds in probe.items()),
        f"{100 * fraction(schedule, device, assumed):.0f} %",
        str(smallest_distance(schedule, device, assumed)),
    )


def fraction(run: Run, device: Device, assumed: Assumptions) -> float:
    """The probe's share of a step's time, averaged over steps: 0.1 is ten per cent more wall time."""
    probe = sum(probe_seconds(run, device, assumed).values())
    return probe / run.every_n_steps / step_seconds(run, device, assumed)


def smallest_distance(run: Run, device: Device, assumed: Assumptions, at_most: float = AT_MOST) -> int:
    """The smallest ``every_n_steps`` that keeps the fraction."""
    once = fraction(replace(run, every_n_steps=1), device, assumed)
    return max(1, -int(-once // at_most))


def step_seconds(run: Run, device: Device, assumed: Assumptions) -> float:
    """An optimizer step, with its share of the rollout."""
    forward = _pass_flops(run, run.rollout, assumed) / device.rate("bfloat16")
    # Backward through frozen weights makes gradients of activations alone: as much as a forward pass.
    passes = 2 + run.checkpointing
    return sampling_seconds(run, run.rollout, device, assumed) / run.updates + passes * forward


def probe_seconds(run: Run, device: Device, assumed: Assumptions) -> dict[str, float]:
    """A probe's parts."""
    rate = device.rate(run.precision)
    over_e, over_u = (_pass_flops(run, n, assumed) / rate for n in (run.sequences, run.rollout))
    parts = {
        "sampling": sampling_seconds(run, run.sequences, device, assumed, run.precision),
        "tangents and sweep": run.passes * over_e,
    }
    if run.attribution:
        # Of the passes over E the first has a backward one to it; without weight decay one is left out. The gradients
        # by sign are a forward and a backward pass over U together.
        parts["attribution"] = (
            ATTRIBUTION_PASSES - ATTRIBUTION_PASSES_OVER_U
        ) * over_e + ATTRIBUTION_PASSES_OVER_U * over_u
    return parts


def sampling_seconds(
    run: Run, sequences: int, device: Device, assumed: Assumptions, precision: str = "bfloat16"
) -> float:
    """Prefill and decoding in one batch; a rollout in bfloat16, E in the probe's float32."""
    completions = torch.full((sequences,), assumed.completion)
    lengths = completions + assumed.prompt
    steps = run.max_new_tokens  # as many as the longest completion's tokens
    launches = steps * run.layers * assumed.launches_per_layer * assumed.launch
    size = 2 if precision == "bfloat16" else 4
    weights = size * (steps - assumed.completion) * (run.counts.body + run.counts.head)
    read = (run.counts.decoding_bytes(lengths, completions, size) + weights) / device.bytes_per_second
    return max(launches, read, _pass_flops(run, sequences, assumed) / device.rate(precision))


def _pass_flops(run: Run, sequences: int, assumed: Assumptions) -> float:
    completions = torch.full((sequences,), assumed.completion)
    return run.counts.forward(completions + assumed.prompt, completions)
