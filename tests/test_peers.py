"""Processes that measure together: shares, exchanges, and failures that reach everyone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run_processes
from tiny import build_model, build_tokenizer

from entropy_pl import EntropyProbe, Rollout, UpdateVector, sample_completions
from entropy_pl.peers import PeerError, Peers
from entropy_pl.policy.rng import isolated_rng
from entropy_pl.probe import take_dry_run

PROMPTS = [f"{a}+{b}=" for a in range(3) for b in range(4)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 13])
def test_shares_are_the_whole_in_order(size):
    shares = [Peers(rank, size).share(list(range(12))) for rank in range(size)]
    assert [item for share in shares for item in share] == list(range(12))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_nothing_travels():
    value = object()
    assert Peers.of_this_run() == Peers()
    assert Peers().exchange(value)[0] is value
    with pytest.raises(KeyError), Peers().together():
        raise KeyError


def talk(rank: int) -> dict[str, Any]:
    """Rank 1 fails at one point and another; what each says afterwards."""
    peers = Peers.of_this_run()
    seen: dict[str, Any] = {"size": peers.size, "exchanged": peers.exchange(rank * 10)}
    try:
        with peers.together():
            if rank == 1:
                raise MemoryError("no room")
            peers.exchange("fine here")
    except (MemoryError, PeerError) as error:
        seen["failed"] = f"{type(error).__name__}: {error}"
    try:
        with peers.together():
            peers.agree("the seed", rank)
    except ValueError as error:
        seen["disagreed"] = str(error)
    return seen | {"after": peers.exchange(rank)}


def test_a_failure_reaches_everyone(tmp_path):
    first, second = run_processes(talk, 2, tmp_path)
    assert first["size"] == second["size"] == 2
    assert first["exchanged"] == second["exchanged"] == [0, 10]
    assert first["failed"] == "PeerError: process 1 failed: MemoryError: no room"
    assert second["failed"] == "MemoryError: no room"
    assert first["disagreed"] == second["disagreed"]
    assert "expected the seed to be the same in all 2 processes, got [0, 1]" in first["disagreed"]
    assert first["after"] == second["after"] == [0, 1]  # still in step with one another


def e_batch() -> tuple[Any, Rollout, UpdateVector]:
    """A policy in float64's range of exactness, 12 completions of it, a direction."""
    model = build_model()
    with isolated_rng(1):
        rollout = sample_completions(model, build_tokenizer(), PROMPTS, max_new_tokens=9)
    noise = torch.Generator().manual_seed(2)
    direction = {
        name: torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }
    return model, rollout, UpdateVector(direction, lr=1e-4)


def measure(rank: int, shares: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
    model, rollout, update = e_batch()
    share = rollout.select(torch.tensor(shares[rank], dtype=torch.long))
    result = EntropyProbe(**options).measure(model, share, update, peers=Peers.of_this_run())
    return result.to_dict() | {"influence": result.taken.true.influence.tolist()}


@pytest.mark.parametrize(
    ("shares", "options"),
    [
        ([list(range(5)), list(range(5, 12))], {"precision": "float64"}),
        ([list(range(12)), []], {"precision": "float64", "method": "central_difference", "baseline": "critic"}),
    ],
    ids=["uneven", "one without"],
)
def test_together_is_as_alone(tmp_path, shares, options):
    """Every process has the estimates that one process makes of the same rollouts, to 1e-10 (float64: 1e-13 a sum)."""
    model, rollout, update = e_batch()
    alone = EntropyProbe(**options).measure(model, rollout, update)
    expected = alone.to_dict() | {"influence": alone.taken.true.influence.tolist()}
    results = run_processes(measure, 2, tmp_path, shares, options)
    assert {k: v for k, v in results[0].items() if k != "seconds"} == {
        k: v for k, v in results[1].items() if k != "seconds"
    }
    for name in ("entropy", "first_order", "second_order"):
        for field in ("value", "stderr", "ess", "ci_low"):
            assert results[0][name][field] == pytest.approx(expected[name][field], rel=1e-10), (name, field)
    for mine, theirs in zip(results[0]["sweep"], expected["sweep"], strict=True):
        assert mine["eta"] == theirs["eta"]
        for field in ("value", "stderr", "ess", "ess_min"):
            assert mine["true"][field] == pytest.approx(theirs["true"][field], rel=1e-10), field
    assert results[0]["influence"] == pytest.approx(expected["influence"], rel=1e-9, abs=1e-15)
    assert results[0]["difference_step"] == expected["difference_step"]


def diverge(rank: int) -> str:
    """Rank 1's policy has diverged: its logits are NaN."""
    model, rollout, update = e_batch()
    if rank == 1:
        with torch.no_grad():
            model.lm_head.weight[0, 0] = torch.nan
    try:
        EntropyProbe().measure(model, rollout.select(torch.arange(6) + 6 * rank), update, peers=Peers.of_this_run())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "measured"


def cannot(rank: int) -> list[str]:
    """What rank 1 cannot do: score, and score in a dry run."""
    said, model = [diverge(rank)], build_model()
    if rank == 1:
        model.lm_head.register_forward_hook(lambda *_: model.no_such_kernel)
    try:
        take_dry_run(EntropyProbe(), model, build_tokenizer(), ["1+1=", "2+2="], peers=Peers.of_this_run())
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_share_that_cannot_be_scored_fails_the_measurement_everywhere(tmp_path):
    (first, refused_too), (second, refused) = run_processes(cannot, 2, tmp_path)
    assert second.startswith("NonFiniteError: expected finite logits")
    assert first.startswith("PeerError: process 1 failed: NonFiniteError: expected finite logits")
    assert refused.startswith("ValueError: expected a policy of which a probe can be taken")
    assert "in sampling them: AttributeError: " in refused
    assert refused_too == f"PeerError: process 1 failed: {refused}"


def test_a_failure_in_a_block_within_a_block_is_told_once(monkeypatch):
    """Told twice, it would stand for this process's next exchange, and shift all that follow."""
    told = []
    monkeypatch.setattr(Peers, "_gather", lambda self, value: told.append(value) or [value, value])
    peers = Peers(0, 2, None)
    with pytest.raises(ValueError, match="no room"), peers.together(), peers.together():
        raise ValueError("no room")
    assert [said.message for said in told] == ["ValueError: no room"]
