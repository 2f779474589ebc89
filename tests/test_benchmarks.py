"""The benchmarks run, and count right. No time is asserted here."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth, memory, overhead, probes, scoring, timing
from benchmarks.__main__ import NAMES, parse
from benchmarks.hardware import DEVICES, Device
from benchmarks.operations import Counts
from benchmarks.options import Options
from benchmarks.policies import TINY, adamw_step, build_case, build_policy, random_rollout
from benchmarks.tables import Table, write_tables
from entropy_pl import Rollout, token_stats
from entropy_pl.policy.head import completion_logits
from entropy_pl.policy.rng import isolated_rng

ROOT = Path(__file__).parents[1]
SMALL = Options(rounds=1, small=True)
ROWS = {  # the first words of what each table has to show
    "floor": ["floor", "bare forward", "token_stats, float64"],
    "scoring": ["bare forward, all", "bare forward, completion", "naive", "TRL", "token_stats, float64", "token_stats"],
    "probes": ["bare forward", *probes.AT_MOST],
    "growth": list(growth.SERIES),
    "memory": ["token_stats, 1 ×", "token_stats, 16 ×", "TRL's", "naive", "one float64 tensor"],
    "memory_length": ["token_stats", "central differences", "forward mode"],
    "sampling": ["plain generate", "sample_completions"],
    "grpo_step": ["TRL's GRPOTrainer", "GRPOModule"],
    "overhead": ["H100 SXM: |E| = 256", "H200: |E| = 256"],
    "gpu": [f"{precision}: {part}" for precision in ("float32", "float64") for part in ("sampling", "in all")],
}


def lengths_of(rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor]:
    return rollout.prompt_lengths + rollout.completion_lengths, rollout.completion_lengths


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n == "memory" else []) for n in NAMES])
def test_a_benchmark_shows_what_it_promises(name):
    if name in ("scoring", "grpo_step"):
        pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    tables = importlib.import_module(f"benchmarks.{name}").run(SMALL)
    assert tables[0].name == name
    for table in tables:
        firsts = [row[0] for row in table.rows]
        for promised in ROWS[table.name]:
            assert any(first.startswith(promised) for first in firsts), f"{promised!r} is not among {firsts}"


def test_every_table_has_its_place_in_the_document():
    text = (ROOT / "docs/performance.md").read_text()
    for name in ["machine", *ROWS]:
        assert text.count(f"<!-- bench:{name} -->") == text.count(f"<!-- /bench:{name} -->") == 1


# ------------------------------------------------------------------------------------------------------------ counting


def test_operations_are_those_that_pytorch_counts():
    """Unfused attention multiplies all pairs."""
    model = TINY.model(attn_implementation="eager").eval()
    rollout = random_rollout(3, TINY.vocabulary, (7, 0), (5, 0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        completion_logits(model, rollout)
    lengths, completions = lengths_of(rollout)
    assert counter.get_total_flops() == Counts.of(model).forward(lengths, completions, causal=False)


def test_causal_attention_takes_each_pair_once():
    counts = Counts(body=0, head=0, attended=10, cached=0)
    lengths = torch.tensor([3, 5])
    pairs = sum(sum(1 for key in range(length) for query in range(length) if key <= query) for length in (3, 5))
    assert counts.forward(lengths, lengths) == 2 * 2 * 10 * pairs  # two products, of a product and a sum each


def test_sizes_count_as_their_model_does():
    sizes = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "head_size": 16, "inner": 48, "vocabulary": 128}
    assert Counts.from_sizes(**sizes, rank=16) == Counts.of(TINY.model())


def test_bytes_of_decoding_by_a_loop():
    counts = Counts(body=100, head=10, attended=0, cached=3)
    prompts, completions = [4, 2], [3, 5]
    expected = 0
    for step in range(5):
        expected += 110
        expected += sum(3 * (p + step + 1) for p, t in zip(prompts, completions, strict=True) if step < t)
    lengths = torch.tensor(prompts) + torch.tensor(completions)
    assert counts.decoding_bytes(lengths, torch.tensor(completions), 2) == 2 * expected


@pytest.mark.parametrize("power", [0.5, 1.0, 1.3])
def test_an_exponent_is_found(power):
    found, error = growth.exponent({size: 0.1 * size**power for size in (64, 128, 256, 1024)})
    assert found == pytest.approx(power, abs=1e-9)  # rounding of logarithms
    assert error < 1e-6  # a square root of rounding errors


# ------------------------------------------------------------------------------------------------------------ overhead


def test_the_schedule_is_the_configurations():
    run = overhead.read()
    assert (run.rollout, run.max_new_tokens, run.checkpointing) == (256, 512, True)
    assert run.passes == 3 + 3  # θ and two differences; three step sizes


def test_the_smallest_distance_keeps_the_fraction_and_the_next_does_not():
    assumed = overhead.Assumptions()
    for device in DEVICES.values():
        run = overhead.read()
        smallest = overhead.smallest_distance(run, device, assumed)
        assert overhead.fraction(replace(run, every_n_steps=smallest), device, assumed) <= overhead.AT_MOST
        assert overhead.fraction(replace(run, every_n_steps=smallest - 1), device, assumed) > overhead.AT_MOST


def test_time_by_hand():
    """One sequence of one completion token after none, on a device of one operation and one byte a second."""
    device = Device(bfloat16=1.0, float32=1.0, tf32=1.0, bytes_per_second=1.0, reach=1.0, reach_float32=0.5)
    counts = Counts(body=5, head=2, attended=0, cached=0)
    run = overhead.Run(counts, 1, 1, 1, True, 1, every_n_steps=1, sequences=1, passes=4)
    assumed = overhead.Assumptions(prompt=0, completion=1, launches_per_layer=1, launch=0.0)
    assert overhead.step_seconds(run, device, assumed) == 14 + 3 * 14  # as many bytes as operations; and three passes
    assert overhead.probe_seconds(run, device, assumed) == {
        "sampling": 28,  # in float32: twice as many bytes, and half the rate
        "tangents and sweep": 4 * 28,
        "attribution": 11 * 28,
    }


# ------------------------------------------------------------------------------------------------------------- scoring


def test_the_alternatives_compute_the_same():
    """What is compared in time is equal in value: float32 logits of one model, 1e-4 of sums of some 50 terms near 5."""
    pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    case = build_case(SMALL)
    batches = scoring.packed(case.model, case.rollout)
    ours = token_stats(case.model, case.rollout)
    for score in (scoring.naive, scoring.trl_stats):
        parts = scoring.each(score, case.model, batches)
        for index, expected in enumerate((ours.logp, ours.entropy)):
            assert float(sum(part[index].double().sum() for part in parts)) == pytest.approx(
                float(expected.sum()), abs=1e-2
            )


def test_packing_keeps_every_token():
    rollout = random_rollout(6, 50, (9, 3), (6, 2))
    for at_once in (False, True):
        batches = scoring.packed(TINY.model(), rollout, at_once=at_once)
        assert sum(int(batch.completion.sum()) for batch in batches) == int(rollout.completion_mask.sum())
        emitted = sorted(int(i) for batch in batches for i in batch.ids[:, 1:][batch.completion])
        assert emitted == sorted(rollout.completion_ids[rollout.completion_mask].tolist())


def test_the_step_is_the_second_and_still_to_come():
    """After the first step LoRA's B is no longer zero; the second is v, and the policy has not taken it."""
    model = TINY.model()
    update = adamw_step(model, random_rollout(4, TINY.vocabulary, (9, 3), (6, 2)), lr=1e-3)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert update.lr == 1e-3
    assert set(update.direction) == set(trainable)
    # AdamW moves a number by lr at the most in its first step, up to rounding in float32.
    assert all(0 < p.abs().max() <= 1.001e-3 for name, p in trainable.items() if "lora_B" in name)
    assert all(p.grad is None for p in trainable.values())


@pytest.mark.parametrize("work", memory.WORKS)
def test_every_work_of_the_memory_tables_runs(work):
    if work == "trl":
        pytest.importorskip("trl", reason="TRL is not installed (extra 'trl')")
    task = memory.Task(work, replace(memory.BODY, vocabulary=64), sequences=2, completion=8, device="cpu")
    assert memory.added_bytes(task) >= 0


def test_a_seed_draws_the_same_policy():
    models = []
    for _ in range(2):
        with isolated_rng(0):
            models.append(build_policy(SMALL, 2)[0])
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------- the frame


def test_rounds_take_turns_and_the_first_is_not_counted():
    calls: list[str] = []
    works = {name: lambda name=name: calls.append(name) for name in "ABC"}
    times = timing.interleaved(works, 2, torch.device("cpu"))
    assert "".join(calls) == "ABC" * 3
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"A": 2, "B": 2, "C": 2}


def test_ratios_are_within_a_round():
    times = timing.Timings({"a": [2.0, 6.0, 20.0], "b": [1.0, 2.0, 10.0]})
    assert times.ratio("a", "b") == timing.Ratio(median=2.0, low=2.0, high=3.0)
    assert str(times.ratio("a", "b")) == "2.00 (2.00–3.00)"


def test_tables_are_put_between_their_markers(tmp_path):
    document = tmp_path / "document.md"
    document.write_text("Before.\n<!-- bench:a -->\nold\n<!-- /bench:a -->\nAfter.\n")
    table = Table("a", "Title", ("work", "s"), [("x|y", "1")], ("A note.",))
    assert write_tables(document, [table, replace(table, name="b")]) == ["b"]
    once = document.read_text()
    assert once == (
        "Before.\n<!-- bench:a -->\n*Title*\n\n| work | s |\n| --- | ---: |\n| x\\|y | 1 |\n\nA note.\n"
        "<!-- /bench:a -->\nAfter.\n"
    )
    write_tables(document, [table])
    assert document.read_text() == once


def test_a_row_of_another_width_is_refused():
    with pytest.raises(ValueError, match="expected 2 cells in a row of 'a'"):
        Table("a", "Title", ("work", "s"), [("x",)])


def test_a_policy_comes_with_its_data():
    with pytest.raises(ValueError, match="a policy and its data together"):
        Options(policy="folder")


def test_without_names_there_are_none_chosen():
    assert parse([]).names == []
    assert parse(["floor", "--sequences", "8"]).sequences == 8


def test_the_gpu_benchmark_refuses_a_cpu_at_full_size():
    with pytest.raises(RuntimeError, match="expected a CUDA device"):
        importlib.import_module("benchmarks.gpu").run(Options())
