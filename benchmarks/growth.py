"""How the time of ΔH grows with the batch, its completions, the vocabulary and the number of step sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from scipy.stats import linregress

from benchmarks.options import Options
from benchmarks.policies import TINY, Case, Shape, adamw_step, random_rollout
from benchmarks.tables import Table
from benchmarks.timing import Timings, interleaved
from entropy_pl import token_stats
from entropy_pl.estimators import snis_delta_entropy
from entropy_pl.policy.rng import isolated_rng

SERIES: dict[str, tuple[int, ...]] = {
    "E, sequences of 20 + 40 tokens": (64, 128, 256, 512, 1024),
    "completion tokens a sequence (16 sequences, prompts of 4)": (32, 64, 128, 256, 512),
    "V (16 sequences of 8 + 64 tokens, d = 64)": (2048, 8192, 32_768, 151_936),
    "number of η (64 sequences of 20 + 40 tokens)": (1, 2, 4, 8),
}
SMALL: dict[str, tuple[int, ...]] = {name: (1, 2, 4) if "η" in name else (16, 32, 64) for name in SERIES}
BODY = Shape(layers=2, context=1024)
TINY_BODY = replace(TINY, context=1024)


def run(options: Options) -> list[Table]:
    """Every size of a series in every round."""
    rows = []
    for (name, sizes), build in zip((SMALL if options.small else SERIES).items(), (_e, _t, _v, _etas), strict=True):
        with isolated_rng(0):
            works = {size: build(size, options) for size in sizes}
        times = interleaved({str(size): work for size, work in works.items()}, options.rounds, works[sizes[0]].device)
        power, error = fitted(sizes, times)
        seconds = ", ".join(f"{size}: {times.median(str(size)):.2f}" for size in sizes)
        # What the project holds itself to; the vocabulary's is not among it.
        rows.append((name, f"{power:.3f} ± {error:.3f}", "" if name.startswith("V") else "1.05", seconds))
    notes = (
        "ΔH at one η, baseline included, but in the last row; 2 layers of d = 256 with random weights, V = 2,048 where "
        "not said otherwise. Exponent b of t = a · sizeᵇ, by least squares in logarithms, nothing subtracted; ± is its "
        "standard error.",
    )
    return [Table("growth", "Growth of cost", ("with", "exponent", "at most", "s by size"), rows, notes)]


def fitted(sizes: Sequence[int], times: Timings) -> tuple[float, float]:
    """Exponent and its standard error, of medians over rounds."""
    return exponent({size: times.median(str(size)) for size in sizes})


def exponent(seconds: Mapping[int, float]) -> tuple[float, float]:
    """The power b in t = a · sizeᵇ and its standard error, by least squares in logarithms."""
    fit = linregress(np.log(list(seconds)), np.log(list(seconds.values())))
    return float(fit.slope), float(fit.stderr)


class _Work:
    """ΔH at a number of step sizes, its baseline included."""

    def __init__(self, case: Case, etas: int = 1) -> None:
        self.device = case.device
        self._run: Callable[[], object] = partial(delta_entropies, case, etas)

    def __call__(self) -> None:
        self._run()


def delta_entropies(case: Case, etas: int) -> None:
    """A sweep whose baseline is scored once."""
    base = token_stats(case.model, case.rollout)
    for i in range(etas):
        eta = case.update.lr * (i + 1) / etas
        snis_delta_entropy(base, token_stats(case.model, case.rollout, update=case.update, eta=eta))


def case_of(shape: Shape, sequences: int, prompt: int, completion: int, device: str) -> Case:
    """Random weights, and sequences of equal lengths."""
    model = shape.model()
    rollout = random_rollout(sequences, shape.vocabulary, (prompt, 0), (completion, 0))
    update = adamw_step(model.to(device), rollout)
    return Case(model.eval(), rollout.to(device), update, "")


def _e(size: int, options: Options) -> _Work:
    return _Work(case_of(_body(options), size, 20, options.pick(40, 4), options.device))


def _t(size: int, options: Options) -> _Work:
    # Prompts that are short beside every completion, or the exponent would be below that of completions.
    return _Work(case_of(_body(options), options.pick(16, 2), 4, size, options.device))


def _v(size: int, options: Options) -> _Work:
    shape = replace(BODY, hidden=64, inner=128, heads=2, kv_heads=1, vocabulary=size)
    return _Work(case_of(shape, options.pick(16, 2), 8, options.pick(64, 8), options.device))


def _etas(size: int, options: Options) -> _Work:
    return _Work(case_of(_body(options), options.pick(64, 4), 20, options.pick(40, 8), options.device), size)


def _body(options: Options) -> Shape:
    return TINY_BODY if options.small else BODY
