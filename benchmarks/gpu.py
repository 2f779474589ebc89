"""A probe of a 1.5B-parameter policy on a GPU, against a floor worked out beside it.

Qwen2.5-1.5B's shape with random weights and LoRA of rank 32; |E| completions of about 100 tokens to prompts of about
160; sampling, ΔH at 5 η, δH₁ and η*, in strict float32 or in float64. The floor is the operations of drawing E once
(every token through the model once) and of 8 passes, at the rate of a large product in the same precision, on the same
device, in the same run. ``--small`` runs the same code with a small model, on a CPU too.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.hardware import product_rate
from benchmarks.operations import Counts
from benchmarks.options import Options
from benchmarks.overhead import QWEN2_5_1_5B
from benchmarks.policies import TINY, Shape, adamw_step, described, random_prompts, word_tokenizer
from benchmarks.probes import FIVE_ETAS
from benchmarks.tables import Table
from benchmarks.timing import timed_once
from entropy_pl import EntropyProbe, Rollout, sample_completions
from entropy_pl.policy.precision import chosen_matmul
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.settings import LoraSettings
from entropy_pl.probe.settings import Precision

SHAPE = Shape(
    **{name: size for name, size in QWEN2_5_1_5B.items() if name != "head_size"},
    context=1024,
)
END_PROBABILITY = 0.008  # with at most 200 tokens, a mean of 100
AT_MOST = {"float32": 1.25, "float64": 2.0}
PRECISIONS: tuple[Precision, ...] = ("float32", "float64")


def run(options: Options) -> list[Table]:
    """One probe in each precision, once: a run takes minutes."""
    if options.device != "cuda" and not options.small:
        raise RuntimeError(
            "expected a CUDA device for the benchmark 'gpu', got the CPU: give --device cuda, or --small to see it run"
        )
    shape = TINY if options.small else SHAPE
    sequences = 8 if options.small else max(2048, options.sequences)
    longest = options.pick(200, 8)
    with isolated_rng(0):
        lora = LoraSettings(rank=options.pick(32, 4), alpha=64, target_modules="all-linear")
        model = shape.model(lora=lora, ends=max(1, round(END_PROBABILITY * shape.vocabulary))).to(options.device)
        mean = options.pick(160, 9)
        lengths = (mean + mean / 4 * torch.randn(sequences)).round().long().clamp(4, 2 * mean)
        prompts, tokenizer = random_prompts(lengths, shape.vocabulary), word_tokenizer(shape.vocabulary)
    rows: list[tuple[str, ...]] = []
    what = ""
    for precision in PRECISIONS:
        probe = EntropyProbe(eta_multipliers=FIVE_ETAS, precision=precision, method="central_difference")
        with isolated_rng(0):
            measured, rollout = _measured(model, tokenizer, prompts, probe, longest)
        floors = floor_seconds(model, rollout, probe, getattr(torch, precision))
        what = described(rollout)
        rows += [
            (
                f"{precision}: {part}",
                f"{measured[part]:.1f}",
                f"{floors[part]:.1f}",
                f"{measured[part] / floors[part]:.2f}",
                f"{AT_MOST[precision]:g}" if part == "in all" else "",
            )
            for part in measured
        ]
    title = f"A probe of {'a small policy' if options.small else 'Qwen2.5-1.5B in shape'} on {options.device}; {what}"
    notes = ("Small sizes: not the figures asked for.",) if options.small else ()
    return [Table("gpu", title, ("work", "s", "floor, s", "of the floor", "at most"), rows, notes)]


def _measured(
    model: Any, tokenizer: Any, prompts: list[str], probe: EntropyProbe, longest: int
) -> tuple[dict[str, float], Rollout]:
    """Seconds by part, after a warm-up on a few sequences, and the batch."""
    device = next(model.parameters()).device
    drawn: list[Rollout] = []

    def sample(some: list[str]) -> None:
        with probe.evaluation(model):
            drawn.append(sample_completions(model, tokenizer, some, max_new_tokens=longest))

    sample(prompts[:4])
    update = adamw_step(model, drawn[0])
    probe.measure(model, drawn[0], update)
    seconds = {"sampling": timed_once(lambda: sample(prompts), device)}
    seconds["passes and estimates"] = timed_once(lambda: probe.measure(model, drawn[-1], update), device)
    seconds["in all"] = sum(seconds.values())
    return seconds, drawn[-1]


def floor_seconds(model: Any, rollout: Rollout, probe: EntropyProbe, dtype: torch.dtype) -> dict[str, float]:
    """The same parts by their operations alone."""
    device, counts = next(model.parameters()).device, Counts.of(model)
    completions = rollout.completion_lengths
    lengths = rollout.prompt_lengths + completions
    with chosen_matmul():
        rate = product_rate(device, dtype, 8192 if device.type == "cuda" else 256)
    one = counts.forward(lengths, completions) / rate
    passes = probe.passes(lr=1.0)
    return {"sampling": one, "passes and estimates": passes * one, "in all": (1 + passes) * one}
