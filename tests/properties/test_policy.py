"""What a policy's statistics and a probe's estimates do not depend on: padding, order, micro-batches, processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FEW, rollouts
from tiny import CHARACTERS, SPECIAL_TOKENS, build_model
from torch import Tensor
from torch.nn.functional import pad

from entropy_pl import EntropyProbe, Rollout, TokenStats, UpdateVector, float64_evaluation, token_stats, token_stats_jvp
from entropy_pl.peers import Peers

VOCABULARY = len(SPECIAL_TOKENS) + len(CHARACTERS)
# A float64 forward pass of two layers, sums in another order: 1e-13 of logits of size 10.
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}


def direction(model: torch.nn.Module) -> UpdateVector:
    noise = torch.Generator().manual_seed(2)
    return UpdateVector(
        {
            name: torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
            for name, parameter in model.named_parameters()
        },
        lr=1e-4,
    )


def garbage(rollout: Rollout, left: int, right: int, seed: int) -> Rollout:
    """More columns on either side, and any tokens wherever the masks are False."""
    noise = torch.Generator().manual_seed(seed)

    def widened(ids: Tensor, mask: Tensor, sides: tuple[int, int]) -> tuple[Tensor, Tensor]:
        ids, mask = pad(ids, sides), pad(mask, sides)
        return torch.where(mask, ids, torch.randint(VOCABULARY, ids.shape, generator=noise)), mask

    prompts = widened(rollout.prompt_ids, rollout.prompt_mask, (left, 0))
    return Rollout(*prompts, *widened(rollout.completion_ids, rollout.completion_mask, (0, right)))


def scored(model: torch.nn.Module, rollout: Rollout, kind: str, budget: int | None = None) -> list[TokenStats]:
    with float64_evaluation(model):
        if kind == "plain":
            return [token_stats(model, rollout, max_batch_tokens=budget)]
        return list(token_stats_jvp(model, rollout, direction(model), method="forward_mode", max_batch_tokens=budget))


def assert_alike(ours: list[TokenStats], theirs: list[TokenStats]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        width = other.mask.shape[1]
        assert torch.equal(mine.mask[:, :width], other.mask)
        assert not mine.mask[:, width:].any()
        for name in ("logp", "entropy"):
            torch.testing.assert_close(getattr(mine, name)[:, :width], getattr(other, name), **FLOAT64)
            assert not getattr(mine, name)[~mine.mask].any()


kinds = st.sampled_from(["plain", "derivatives"])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build_model()


@FEW
@given(
    rollout=rollouts(VOCABULARY), kind=kinds, left=st.integers(0, 3), right=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_padding(model, rollout, kind, left, right, seed):
    """A prompt's or a completion's padding, however wide and whatever in it."""
    assert_alike(scored(model, garbage(rollout, left, right, seed), kind), scored(model, rollout, kind))


@FEW
@given(rollout=rollouts(VOCABULARY), kind=kinds, budget=st.integers(1, 60), seed=st.integers(0, 99))
def test_micro_batches_and_order(model, rollout, kind, budget, seed):
    """The oracle is one sequence at a time, without padding."""
    order = torch.randperm(len(rollout), generator=torch.Generator().manual_seed(seed))
    found = scored(model, rollout.select(order), kind, budget)
    alone = [scored(model, rollout.select(order[i : i + 1]), kind) for i in range(len(order))]
    assert_alike(found, [TokenStats.concatenate(list(parts)) for parts in zip(*alone, strict=True)])


class UnheardError(BaseException):
    """The others have not said yet what this process is waiting for."""


@dataclass(frozen=True)
class ReplayedPeers(Peers):
    """A process among others that run one after the other: everything of Peers but the wire.

    It says what it has to say and breaks off where an answer is not known yet; once all have come that far, each runs
    again from the start. So no two are ever inside a measurement at once, as threads would be, who share what processes
    do not (forward-mode levels, precision flags).
    """

    said: list[dict[int, Any]] = field(default_factory=list)  # by exchange, by rank; of all processes
    made: list[None] = field(default_factory=list)  # exchanges of this run

    def _gather(self, value: Any) -> list[Any]:
        at = len(self.made)
        self.made.append(None)
        while len(self.said) <= at:
            self.said.append({})
        self.said[at][self.rank] = value
        if len(self.said[at]) < self.size:
            raise UnheardError
        return [self.said[at][rank] for rank in range(self.size)]


def together(work: Callable[[Peers], Any], size: int) -> list[Any]:
    """What ``work`` returns in each of ``size`` processes."""
    said: list[dict[int, Any]] = []
    results: dict[int, Any] = {}
    while len(results) < size:
        before = sum(map(len, said)) + len(results)
        for rank in sorted(set(range(size)) - results.keys()):
            with suppress(UnheardError):
                results[rank] = work(ReplayedPeers(rank, size, None, said))
        assert sum(map(len, said)) + len(results) > before, "every process waits for another: they would hang"
    return [results[rank] for rank in range(size)]


def numbers(result: Any) -> dict[str, list[float]]:
    """Every estimate of a probe, with its influences."""
    found = {"entropy": result.entropy, "first": result.first_order, "second": result.second_order}
    found |= {f"{point.eta:.6g}": point.true for point in result.sweep}
    return {
        name: [estimate.value, estimate.stderr, estimate.ess, estimate.ess_min, *estimate.influence.tolist()]
        for name, estimate in found.items()
    }


@settings(FEW, max_examples=6)
@given(
    rollout=rollouts(VOCABULARY),
    cuts=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    weighting=st.sampled_from(["prefix", "sequence"]),
    method=st.sampled_from(["forward_mode", "central_difference"]),
)
def test_number_of_processes(rollout, cuts, weighting, method):
    """Two or three, with shares of any size, empty ones too: everyone has what one process makes of all sequences."""
    probe = EntropyProbe(precision="float64", weighting=weighting, method=method)
    ends = [0, *sorted(min(cut, len(rollout)) for cut in cuts), len(rollout)]
    shares = [torch.arange(start, end) for start, end in pairwise(ends)]

    def measure(peers: Peers, share: Tensor) -> dict[str, list[float]]:
        model = build_model()  # of its own: a measurement moves the parameters and puts them back
        return numbers(probe.measure(model, rollout.select(share), direction(model), peers=peers))

    alone = measure(Peers(), torch.arange(len(rollout)))
    for found in together(lambda peers: measure(peers, shares[peers.rank]), len(shares)):
        assert found.keys() == alone.keys()
        for name, values in alone.items():
            # sums over other micro-batches: 1e-13 of every log-prob, divided by the difference step's square, 1e-5
            assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-7), name
