"""Peak memory beside a policy's own: of scoring with a large vocabulary, and of tangents of long completions.

Every figure comes from a process of its own, since what one call has freed the next one finds. On a CPU it is the
resident set that grows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

from benchmarks.growth import case_of, exponent
from benchmarks.options import Options
from benchmarks.policies import Case, Shape
from benchmarks.scoring import each, naive, packed, trl_stats
from benchmarks.tables import Table
from entropy_pl import token_stats, token_stats_jvp
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.policy.tangents import Method
from entropy_pl.probe import peak_memory

GIB = 2**30
BODY = Shape(hidden=64, layers=2, heads=2, kv_heads=1, inner=128, vocabulary=151_936, context=40_000)
SHARE = 16  # of the tokens, for what would not fit into a machine
LONG = (1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Task:
    """What a process of its own does.

    Args:
        work: see :data:`WORKS`.
        shape: of the policy.
        sequences: their number.
        completion: tokens of each.
        device: ``cpu`` or ``cuda``.
    """

    work: str
    shape: Shape
    sequences: int
    completion: int
    device: str


def run(options: Options) -> list[Table]:
    """Two tables: a large vocabulary, and long completions."""
    return [vocabulary_table(options), length_table(options)]


def vocabulary_table(options: Options) -> Table:
    """16,384 completion tokens, V = 151,936, float64 entropies."""
    shape = replace(BODY, vocabulary=options.pick(BODY.vocabulary, 512))
    tokens = options.pick(16_384, 512)
    per_sequence = options.pick(256, 32)
    rows = []
    for work, name in (("score", "token_stats"), ("trl", "TRL's functions, float32"), ("naive", "naive")):
        share = 1 if work == "score" else SHARE
        for sequences, length in ((1, tokens), (tokens // per_sequence, per_sequence)):
            if share > 1 and sequences == 1:
                task = Task(work, shape, 1, length // share, options.device)
            else:
                task = Task(work, shape, max(1, sequences // share), length, options.device)
            added = in_a_process(task)
            how = "measured" if share == 1 else f"measured on 1/{share} of the tokens at once, × {share}"
            what = f"{name}, {sequences} × {length} tokens"
            rows.append((what, f"{added * share / GIB:.2f}", "1.5" if work == "score" else "", how))
    formula = tokens * shape.vocabulary * 8 / GIB
    rows.append(("one float64 tensor of all logits", f"{formula:.2f}", "", "by formula"))
    title = f"Peak memory of scoring {tokens:,} completion tokens, V = {shape.vocabulary:,}, float64 entropies"
    return Table("memory", title, ("work", "GiB added", "at most", "how"), rows)


def length_table(options: Options) -> Table:
    """One completion of growing length, V = 2,048."""
    shape = replace(BODY, vocabulary=options.pick(2048, 128))
    lengths = (64, 128) if options.small else LONG
    rows = []
    for work, name in (("score", "token_stats"), ("differences", "central differences"), ("forward", "forward mode")):
        added = {t: in_a_process(Task(work, shape, 1, t, options.device)) for t in lengths}
        grows = exponent({t: max(1, amount) for t, amount in added.items()})
        amounts = (f"{amount / 2**20:.0f}" for amount in added.values())
        rows.append((name, *amounts, f"{grows[0]:.2f} ± {grows[1]:.2f}"))
    title = f"Peak memory of tangents, one completion, V = {shape.vocabulary:,}; MiB added"
    columns = ("work", *(f"{t:,} tokens" for t in lengths), "exponent")
    return Table("memory_length", title, columns, rows)


def in_a_process(task: Task) -> int:
    """Bytes that a task adds at its peak."""
    with get_context("spawn").Pool(1) as pool:
        return int(pool.apply(added_bytes, (task,)))


def added_bytes(task: Task) -> int:
    """Bytes that a task adds at its peak, in this process, after a small one of its kind."""
    with isolated_rng(0):
        case = case_of(task.shape, task.sequences, 4, task.completion, task.device)
    few = case_of(replace(task.shape, vocabulary=64), 1, 4, 8, task.device)
    WORKS[task.work](few)()
    work = WORKS[task.work](case)
    with peak_memory(case.device) as found:
        work()
    return found.added


def _score(case: Case) -> Callable[[], object]:
    return partial(token_stats, case.model, case.rollout)


def _at_once(score: Callable, case: Case) -> Callable[[], object]:
    return partial(each, score, case.model, packed(case.model, case.rollout, at_once=True))


def _tangents(method: Method, case: Case) -> Callable[[], object]:
    return partial(token_stats_jvp, case.model, case.rollout, case.update, method=method)


WORKS: dict[str, Callable[[Case], Callable[[], object]]] = {
    "score": _score,
    "trl": partial(_at_once, trl_stats),
    "naive": partial(_at_once, naive),
    "differences": partial(_tangents, "central_difference"),
    "forward": partial(_tangents, "forward_mode"),
}
